# SPDX-License-Identifier: Apache-2.0
"""Boxes, masks and labels drawn onto a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ovd.colours import class_styles

if TYPE_CHECKING:
    from ovd.detections import Detections


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
    for i in reversed(range(len(detections))):
        style = styles[detections.class_id[i]]
        x1, y1, x2, y2 = (float(v) for v in detections.xyxy[i])
        corners = (round(x1), round(y1), max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1))
        side = max(x2 - x1, y2 - y1)  # a frame and a label must not hide what is small in a large picture
        line, size = min(widest, max(2, round(side / 20))), min(largest, max(16, round(side / 4)))
        pen.rectangle(corners, outline="white", width=line + 2)
        pen.rectangle(corners, outline=style.colour, width=line)
        text = f"{detections.class_name[i]} {detections.confidence[i]:.2f}"
        ink = Image.fromarray(text_coverage(text, size))
        w, h = ink.width + 8, ink.height + 4
        x = min(max(0, corners[0]), max(0, width - w))
        y = corners[1] - h if corners[1] >= h else max(0, corners[1])
        pen.rectangle((x, y, x + w, y + h), fill=style.colour)
        pen.bitmap((x + 4, y + 2), ink, fill=style.ink)
    return np.asarray(image)


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
