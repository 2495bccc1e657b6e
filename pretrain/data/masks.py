# SPDX-License-Identifier: Apache-2.0
"""Segmentations of annotation and result files: the one place where they are checked and decoded.

pycocotools trusts its input: a distant coordinate crashes the process, and run lengths that do not fill the mask leave
uninitialised memory. So nothing reaches it unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from pretrain.engine.errors import UserError
from pretrain.engine.stored import is_number

Size = tuple[int, int]
"""(height, width) in pixels."""

LARGEST_SIDE = 100_000
"""Pixels; no picture is larger, and pycocotools counts in 32 bits."""

FAR = 1.0
"""Polygons may reach out of their picture by this many picture sides; a point farther away is a mistake."""


class Rle(TypedDict):
    """COCO's compressed run lengths; ``size`` is height, width."""

    size: list[int]
    counts: bytes


class JsonRle(TypedDict):
    """The same as JSON holds them."""

    size: list[int]
    counts: str


class Extent(NamedTuple):
    """What the check of a segmentation found.

    Attributes:
        lines: degenerate polygons (two points), which are left out when decoding.
        bounds: x1, y1, x2, y2 around the mask in pixels; None where it has no area.
    """

    lines: int
    bounds: tuple[float, float, float, float] | None

    def mostly_outside(self, box: Sequence[float]) -> bool:
        """Whether less than half of the bounds lies in a box x, y, width, height, give or take a pixel.

        Objects may be hidden in part, so a mask may well be smaller than its box. Points as shares of the picture, or
        run lengths that go along rows, are elsewhere.
        """
        if self.bounds is None:
            return False
        x1, y1, x2, y2 = self.bounds
        width = min(x2, box[0] + box[2] + 1) - max(x1, box[0] - 1)
        height = min(y2, box[1] + box[3] + 1) - max(y1, box[1] - 1)
        return max(width, 0.0) * max(height, 0.0) < 0.5 * (x2 - x1) * (y2 - y1)


def check_segmentation(segmentation: object, size: Size | None, entry: str) -> Extent:
    """Refuse a segmentation that cannot be decoded.

    Args:
        segmentation: polygons ``[[x, y, …], …]``, or ``{"size": [h, w], "counts": list | str | bytes}``.
        size: of the picture; None where the file does not say.
        entry: where it stands, for messages.

    Raises:
        UserError: see `to_rle`.
    """
    if isinstance(segmentation, list):
        polygons = _polygons(segmentation, size, entry)
        xs, ys = ([v for polygon in polygons for v in polygon[axis::2]] for axis in (0, 1))
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    else:
        from pycocotools import mask as mask_tools

        polygons = []
        x1, y1, w, h = map(float, mask_tools.toBbox(to_rle(segmentation, size, entry)))
        x2, y2 = x1 + w, y1 + h
    lines = len(segmentation) - len(polygons) if isinstance(segmentation, list) else 0
    return Extent(lines, (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None)


def to_rle(segmentation: object, size: Size | None, entry: str) -> Rle:
    """Compressed run lengths of a segmentation, as pycocotools makes them.

    Args:
        segmentation, size, entry: see `check_segmentation`.

    Raises:
        UserError: neither polygons nor run lengths, a size that is not the picture's, damaged counts or counts that do
            not fill the mask, polygons on a picture of unknown size, a coordinate that is not finite or far outside,
            or no polygon with three points.
    """
    from pycocotools import mask as mask_tools

    if isinstance(segmentation, list):
        if size is None:
            raise UserError(f"{entry}: polygons need the image's width and height in the ground truth.")
        merged = mask_tools.merge(mask_tools.frPyObjects(_polygons(segmentation, size, entry), *size))
        return Rle(size=list(size), counts=merged["counts"])
    height, width, counts = _run_lengths(segmentation, size, entry)
    if isinstance(counts, bytes):
        return Rle(size=[height, width], counts=counts)
    packed = mask_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return Rle(size=[height, width], counts=packed["counts"])


def decode(segmentation: object, size: Size, entry: str) -> NDArray[np.bool_]:
    """(H, W) mask of a segmentation; see `to_rle` for arguments and errors."""
    from pycocotools import mask as mask_tools

    return np.asarray(mask_tools.decode(to_rle(segmentation, size, entry))).astype(bool)


def encode_mask(mask: NDArray[np.bool_]) -> JsonRle:
    """Run lengths of an (H, W) mask, as JSON holds them."""
    from pycocotools import mask as mask_tools

    rle = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def area(segmentation: object, size: Size | None, entry: str) -> float:
    """Pixels of a segmentation; see `to_rle` for arguments and errors."""
    from pycocotools import mask as mask_tools

    return float(mask_tools.area(to_rle(segmentation, size, entry)))


def _polygons(segmentation: list[object], size: Size | None, entry: str) -> list[list[float]]:
    """The polygons with at least three points.

    Two points are a line. pycocotools reads such a list as x, y, width, height, which it is not.
    """
    polygons = []
    for polygon in segmentation:
        if (
            not isinstance(polygon, (list, tuple))
            or len(polygon) < 4
            or len(polygon) % 2
            or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in polygon)
        ):
            raise UserError(f"{entry}: segmentation is neither polygons [[x, y, …], …] nor run lengths.")
        if not all(map(is_number, polygon)):
            raise UserError(f"{entry}: a polygon has a coordinate that is no finite number.")
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        if size is not None:
            side = np.array([size[1], size[0]])
            if (points < -FAR * side).any() or (points > (1 + FAR) * side).any():
                x, y = points[int(np.abs(points - side / 2).max(axis=1).argmax())]
                raise UserError(
                    f"{entry}: a polygon reaches to ({x:g}, {y:g}), far outside its image of {size[1]}×{size[0]} px."
                )
        if len(polygon) >= 6:
            polygons.append([float(v) for v in polygon])
    if not polygons:
        raise UserError(
            f"{entry}: segmentation has no polygon of three points or more; remove it to keep the box alone."
        )
    return polygons


def _run_lengths(segmentation: object, size: Size | None, entry: str) -> tuple[int, int, bytes | list[int]]:
    """(height, width, counts) of a mask in run lengths, after all checks."""
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise UserError(f"{entry}: segmentation is neither polygons nor an object with size and counts.")
    counts, hw = segmentation["counts"], segmentation["size"]
    if not (
        isinstance(hw, (list, tuple)) and len(hw) == 2 and all(type(v) is int and 0 < v <= LARGEST_SIDE for v in hw)
    ):
        raise UserError(f"{entry}: the mask's size must be [height, width], is {hw!r}.")
    if size is not None and tuple(hw) != size:
        raise UserError(f"{entry}: the mask's [height, width] is {list(hw)}, its image's {list(size)}.")
    height, width = hw
    if isinstance(counts, list):
        if not all(type(v) is int and v >= 0 for v in counts) or sum(counts) != height * width:
            raise UserError(f"{entry}: run lengths must be whole numbers that add up to height × width.")
        return height, width, counts
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise UserError(f"{entry}: damaged run lengths.") from None
    lengths = unpacked(counts) if isinstance(counts, bytes) else None
    if not lengths or min(lengths) < 0:
        raise UserError(f"{entry}: damaged run lengths.")
    if sum(lengths) != height * width:
        raise UserError(f"{entry}: damaged run lengths (they cover {sum(lengths):,} of {height * width:,} pixels).")
    return height, width, counts


def unpacked(counts: bytes) -> list[int] | None:
    """The numbers in COCO's compressed run lengths; None where the bytes hold none.

    Each byte less 48 holds five bits, least significant first, and 0x20 for "more follows"; the last one's 0x10 is the
    sign. From the fourth number on they are differences to the number two before.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value = shift = 0
    return None if shift else lengths
