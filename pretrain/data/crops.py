# SPDX-License-Identifier: Apache-2.0
"""Random crops of pictures: the part of the augmentation that loader workers do.

A picture is decoded once and cropped, resized and flipped in uint8 for each of its views; colours are changed later, on
the training device (`pretrain.augment`). A crop is a pure function of (seed, index, draw, view).

Shapes: `N` samples, `V` views, `S` side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_views import ViewConfig, expand_views
from pretrain.data.dice import Dice
from pretrain.data.images import ImageSet
from pretrain.data.render import U8
from pretrain.engine.identity import identity_of


def crop_box(height: int, width: int, view: ViewConfig, dice: Dice) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width) with torchvision's distribution: area uniform, ratio uniform in the log.

    Ten tries; then the largest centred box whose ratio is allowed.
    """
    low, high = (math.log(ratio) for ratio in view.crop_ratio)
    for _ in range(10):
        area = height * width * dice.uniform(*view.crop_scale)
        ratio = math.exp(dice.uniform(low, high))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return dice.below(height - tall + 1), dice.below(width - wide + 1), tall, wide
    narrowest, widest = view.crop_ratio
    wide = max(1, min(width, round(height * widest)))
    tall = max(1, min(height, round(width / narrowest)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resized(picture: U8, size: int, interpolation: str) -> U8:
    """(H, W, 3) uint8 → (size, size, 3), antialiased like torchvision and PIL (which differ by at most 1 of 255)."""
    height, width = picture.shape[:2]
    if interpolation == "bilinear" and height <= size and width <= size:  # enlarging needs no antialiasing
        return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)
    # OpenCV has no antialiased bilinear filter, and its bicubic one has another coefficient (-.75; here -.5).
    # The batch axis comes first: only then has it the stride that makes torch see channels last, compute and answer so.
    pixels = torch.from_numpy(np.ascontiguousarray(picture)[None]).permute(0, 3, 1, 2)
    small = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True, align_corners=False)
    return np.ascontiguousarray(small.permute(0, 2, 3, 1)[0].numpy())


@dataclass(frozen=True)
class Views:
    """One sample: V crops (S, S, 3) uint8, and where they come from."""

    crops: list[U8]
    index: int
    label: int


class ViewBatch(TypedDict):
    """A batch of views.

    Attributes:
        views: V uint8 tensors (N, 3, S, S).
        index: (N,) int64, the pictures' numbers.
        label: (N,) int64, −1 where there is none.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor


class ViewSource:
    """Random views of the pictures of a set: a sample source of `pretrain.engine.sampling`.

    Args:
        images: the pictures.
        views: what to crop; a ``count`` above 1 means that many views.
        seed: crops of different seeds share nothing.
    """

    def __init__(self, images: ImageSet, views: Sequence[ViewConfig], seed: int) -> None:
        if not views:
            raise ValueError("at least one view is needed")
        self.images, self.views, self.seed = images, expand_views(views), seed

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures."""
        return identity_of(self.images)

    def sample(self, index: int, draw: int) -> Views:
        """The views of picture ``index``.

        Raises:
            BadImageError: it cannot be read.
        """
        picture = self.images.image(index)
        height, width = picture.shape[:2]
        dice = Dice(self.seed, index, draw)
        crops = []
        for view in self.views:
            top, left, tall, wide = crop_box(height, width, view, dice)
            crop = resized(picture[top : top + tall, left : left + wide], view.size, view.interpolation)
            crops.append(crop[:, ::-1] if dice.chance(view.flip) else crop)
        return Views(crops, index, self.images.label(index))

    @staticmethod
    def collate(samples: list[Views]) -> ViewBatch:
        """A batch; the views are channels last in memory (no copy of what OpenCV and PIL make)."""
        stacked: list[Tensor] = [
            torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
            for crops in zip(*(sample.crops for sample in samples), strict=True)
        ]
        return {
            "views": stacked,
            "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
            "label": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        }
