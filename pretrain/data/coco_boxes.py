# SPDX-License-Identifier: Apache-2.0
"""Boxes of COCO files, of annotations and of results: x, y, width, height in pixels, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.data.coco_entries import ImageId
from pretrain.engine.errors import UserError
from pretrain.engine.stored import is_number

BORDER = 0.5  # pixels that a box may reach over the border of its picture: what rounding does


def checked_box(value: Any, entry: str) -> list[float]:
    """A box x, y, width, height.

    Raises:
        UserError: it is not four finite numbers, or has a negative size.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(is_number(v) for v in value):
        raise UserError(f"{entry}: bbox must be four finite numbers x, y, width, height; is {value!r}.")
    if value[2] < 0 or value[3] < 0:
        raise UserError(f"{entry}: bbox {list(value)} has a negative width or height.")
    return list(value)


def over_border(box: Iterable[float], size: tuple[int, int], what: str, image_id: ImageId) -> tuple[bool, bool]:
    """Whether a box crosses the border of its image, and whether it would fit if read as corners.

    Raises:
        UserError: it lies wholly outside.
    """
    x, y, w, h = box
    height, width = size
    if x > width or y > height or x + w < 0 or y + h < 0:
        raise UserError(f"{what} lies wholly outside image {image_id!r} of {width}×{height} px.")
    over = x < -BORDER or y < -BORDER or x + w > width + BORDER or y + h > height + BORDER
    return over, over and x < w <= width + 1 and y < h <= height + 1


def require_pixels(boxes: Iterable[Sequence[float]], where: str) -> None:
    """Refuse relative coordinates: all numbers of all boxes are from 0 to 1, and not all are integers.

    Args:
        boxes: x, y, width, height of a whole file.
        where: the file, for messages.

    Raises:
        UserError: they are.
    """
    whole = True
    for box in boxes:
        if max(box) > 1:
            return
        whole = whole and all(float(value).is_integer() for value in box)
    if not whole:
        raise UserError(
            f"{where}: all boxes lie between 0 and 1, as shares of a picture do. COCO's boxes are in pixels: multiply "
            "x and width by the picture's width, y and height by its height."
        )
