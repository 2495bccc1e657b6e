# SPDX-License-Identifier: Apache-2.0
"""Pictures in any form -> upright (H, W, 3) uint8 RGB."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from pretrain.data.folder import open_image, orientation, pixel_limit, read_image, upright
from pretrain.engine.errors import UserError

ImageLike: TypeAlias = str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[Any]


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header; nothing is decoded.

    Raises:
        BadImageError: no such file, or no picture.
    """
    with open_image(path) as (image, _):
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose size is that of the stored or of the turned rows, by Pillow's age
            width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        turned = orientation(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def frame_count(path: Path) -> int:
    """Frames or pages of a picture, of which the first is read; the preview that a camera adds (MPO) is none.

    Raises:
        BadImageError: no such file, or no picture.
    """
    with open_image(path) as (image, _):
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def require_decodable(path: Path) -> None:
    """Decode a picture, as small as its format allows.

    Raises:
        BadImageError: its header may be whole, the rest is not.
    """
    read_image(path, max_side=64)


def resized(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """An (H, W, 3) picture with both sides times ``factor``, at least a pixel each; averaged where it shrinks.

    A large picture of even sides is halved first, which takes a tenth of the time of any other factor.
    """
    height, width = image.shape[:2]
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if size == (height, width):
        return image
    while factor <= 0.25 and image.shape[0] % 2 == image.shape[1] % 2 == 0:
        half = image.shape[1] // 2, image.shape[0] // 2
        image, factor = cv2.resize(image, half, interpolation=cv2.INTER_AREA).astype(np.uint8), 2 * factor
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, size[::-1], interpolation=how).astype(np.uint8)


def resized_copy(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An (H, W, 3) picture with its longest side at ``side`` pixels, in memory of its own.

    For what is computed later: the caller may draw on the picture, or read the next frame into it.
    """
    small = resized(image, side / max(image.shape[:2]))
    return small.copy() if small is image else small


def to_rgb(image: ImageLike, *, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Read any picture into an upright (H, W, 3) uint8 RGB array.

    Args:
        image: path, encoded bytes, Pillow image, or array: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, uint8.
        max_pixels: larger pictures are refused before they are decoded; None: `pretrain.data.folder.pixel_limit`.

    Raises:
        UserError: unsupported type, shape, format, size, or a damaged file (`BadImageError` for files).
    """
    max_pixels = pixel_limit() if max_pixels is None else max_pixels
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"picture arrays must be uint8, 0 to 255, not {image.dtype}")
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
            raise UserError(f"picture arrays must be (H, W), (H, W, 3) or (H, W, 4), not {image.shape}")
        if image.shape[0] * image.shape[1] > max_pixels:
            raise UserError(f"picture has {image.shape[1]}×{image.shape[0]} pixels; at most {max_pixels:,} are allowed")
        if image.shape[2] == 4:
            alpha = image[:, :, 3:].astype(np.uint16)
            image = ((image[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(image)
    if isinstance(image, (str, Path)):
        return read_image(Path(image), max_pixels=max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_image(bytes(image), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        if image.width * image.height > max_pixels:
            raise UserError(f"picture has {image.width}×{image.height} pixels; at most {max_pixels:,} are allowed")
        if image.mode[0] in "IF":
            raise UserError(f"pictures of mode {image.mode} have no fixed white: convert to 8 bits first")
        turned = upright(image)
        transparent = turned.has_transparency_data
        return to_rgb(np.array(turned.convert("RGBA" if transparent else "RGB")), max_pixels=max_pixels)
    several = "; several go one by one, in a loop" if isinstance(image, Iterable) else ""
    raise UserError(f"a picture must be a path, bytes, a Pillow image or an array, not {type(image).__name__}{several}")
