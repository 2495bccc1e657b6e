# SPDX-License-Identifier: Apache-2.0
"""Boxes, masks and labels drawn onto a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ovd.colours import class_styles

if TYPE_CHECKING:
    from ovd.detections import Detections

Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels


def draw_detections(pixels: NDArray[np.uint8], detections: Detections, *, masks: bool = True) -> NDArray[np.uint8]:
    """Draw boxes, masks and labels onto a copy of the picture.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        detections: of the picture.
        masks: fill the masks.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = pixels.shape[:2]
    styles = class_styles(detections.names)
    canvas = pixels.copy()
    if masks:
        for i in reversed(range(len(detections))):  # the best score is drawn last, on top
            mask = detections.mask_of(i)
            if mask is not None:
                colour = np.array(styles[detections.class_id[i]].rgb, dtype=np.float32)
                canvas[mask] = (canvas[mask] * 0.6 + colour * 0.4 + 0.5).astype(np.uint8)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    widest = max(2, round(min(height, width) / 200))
    largest = max(11, round(min(height, width) / 32))
    labels: list[tuple[Rectangle, Image.Image]] = []
    for i in range(len(detections)):  # the best score chooses first where its label goes
        text = f"{detections.class_name[i]} {detections.confidence[i]:.2f}"
        size = min(largest, max(16, round(longer_side(detections.xyxy[i]) / 4)))
        ink = Image.fromarray(text_coverage(text, size))
        taken = [place for place, _ in labels]
        place = place_label(
            corners_of(detections.xyxy[i]), (ink.width + 8, ink.height + 4), taken=taken, size=(width, height)
        )
        labels.append((place, ink))
    for i in reversed(range(len(detections))):
        colour = styles[detections.class_id[i]].colour
        line = min(widest, max(2, round(longer_side(detections.xyxy[i]) / 20)))
        pen.rectangle(corners_of(detections.xyxy[i]), outline="white", width=line + 2)
        pen.rectangle(corners_of(detections.xyxy[i]), outline=colour, width=line)
    for i in reversed(range(len(detections))):  # no box crosses a label
        style, (place, ink) = styles[detections.class_id[i]], labels[i]
        pen.rectangle(place, fill=style.colour)
        pen.bitmap((place[0] + 4, place[1] + 2), ink, fill=style.ink)
    return np.asarray(image)


def corners_of(box: NDArray[np.float32]) -> Rectangle:
    """The pixels of the corners of a box."""
    x1, y1, x2, y2 = (float(v) for v in box)
    return round(x1), round(y1), max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1)


def longer_side(box: NDArray[np.float32]) -> float:
    """Of a box, in pixels: a frame and a label must not hide what is small in a large picture."""
    return float(max(box[2] - box[0], box[3] - box[1]))


def place_label(
    box: Rectangle, label: tuple[int, int], *, taken: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle:
    """Where the label of a box goes: above or below it, or inside, where it covers the least of other labels.

    Args:
        box: its corners.
        label: (width, height).
        taken: the labels that have their place.
        size: (width, height) of the picture.
    """
    (w, h), (width, height) = label, size
    left, right = (min(max(0, x), max(0, width - w)) for x in (box[0], box[2] - w + 1))
    top, bottom = max(0, box[1]), min(box[3], height - 1)
    spots = (
        *((left, top - h), (left, top), (right, top - h), (right, top)),
        *((left, bottom), (left, bottom - h), (right, bottom), (right, bottom - h)),
    )
    places = [(x, y, x + w, y + h) for x, y in spots if 0 <= y <= height - h]
    return min(places, key=lambda a: sum(shared_area(a, b) for b in taken), default=(left, top, left + w, top + h))


def shared_area(a: Rectangle, b: Rectangle) -> int:
    """Of two rectangles, in pixels."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def text_coverage(text: str, size: int) -> NDArray[np.uint8]:
    """Draw one line of text in any script.

    OpenCV 5 carries a font with Latin, Cyrillic, Greek, CJK and more letters; with OpenCV 4 Pillow's own font is used,
    which draws an empty box for what it lacks.

    Args:
        text: the line.
        size: letter height in pixels.

    Returns:
        (h, w) uint8, 255 where the ink covers a pixel wholly.
    """
    if cv2.__version__.partition(".")[0] != "4":
        face = cv2.FontFace("uni")
        x, y, w, h = cv2.getTextSize((1, 1), text, (0, 0), face, size, 600)
        canvas = np.zeros((h, w, 3), dtype=np.uint8)
        cv2.putText(canvas, text, (-x, -y), (255, 255, 255), face, size, 600)
        return canvas[:, :, 0]
    font = ImageFont.load_default(size)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return np.asarray(image)
