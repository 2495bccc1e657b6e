# SPDX-License-Identifier: Apache-2.0
"""Crop refinement: the image encoder itself embeds the crops of a picture's best regions.

ViLD's region head is distilled from the encoder's embeddings of crops and predicts them for all regions in one pass.
The encoder's own are better but cost a forward pass per crop (ViLD, section 3.2: "CLIP on cropped regions" and
"ViLD-text+CLIP"). So both are averaged, for the regions with the best objectness only.

Shapes: R regions, D joint embedding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import best_first, unit_rows
from ovd.inference.scoring import RegionSet
from ovd.regions.cutting import crop_rows
from ovd.regions.proposals import large_enough, resize_boxes

if TYPE_CHECKING:
    from ovd.regions.cutting import CropEncoder

ENCODER_SHARE = 0.7
"""Weight of the encoder's embedding in the average. Average precision of typed base words on the scenes that
calibration fits on: .330 without it, .366 with .3, .380 with .5, .379 with .7 and .371 with 1; on other scenes, with
novel words too, .349, .389, .403, .416 and .396."""

LONG_SIDE = 1280
"""Pixels. Larger pictures are shrunk before they are cropped: the network found its boxes at a few hundred pixels, so a
crop of one has enough left, and eighty crops of a phone's picture would otherwise take longer than the network."""


def shrunk(image: NDArray[np.uint8], boxes: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A (H, W, 3) picture with its longest side at `LONG_SIDE` at most, and its (P, 4) boxes in its new pixels."""
    height, width = image.shape[:2]
    scale = LONG_SIDE / max(height, width)
    if scale >= 1:
        return image, boxes
    smaller = max(1, round(height * scale)), max(1, round(width * scale))
    resized = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return resized, resize_boxes(boxes, (height, width), smaller)


def refine_with_crops(regions: RegionSet, image: NDArray[np.uint8], encoder: CropEncoder, *, count: int) -> RegionSet:
    """Average the embeddings of the best regions with the encoder's embeddings of their crops.

    Args:
        regions: of one picture. The head that was distilled from the encoder is changed: the image head where there is
            one, else the only head.
        image: (H, W, 3) uint8 RGB, the picture.
        encoder: the one the detector was distilled from.
        count: regions to refine, best objectness first. Boxes with a side under two pixels cannot be cropped and stay
            as they are, like all others.

    Returns:
        the same regions in the same order, with new unit rows for those that were refined.

    Raises:
        UserError: the encoder returns NaN, infinity or a zero vector.
    """
    order = best_first(regions.objectness, count)
    chosen = order[large_enough(regions.boxes[order])]
    if not len(chosen):
        return regions
    crops = crop_rows(encoder, *shrunk(image, regions.boxes[chosen]))
    head = regions.distilled
    mixed = head.copy()
    mixed[chosen] = unit_rows((1 - ENCODER_SHARE) * head[chosen] + ENCODER_SHARE * crops)
    return replace(regions, text=mixed) if regions.image is None else replace(regions, image=mixed)
