# SPDX-License-Identifier: Apache-2.0
"""Mosaic augmentation (YOLOv4, arXiv:2004.10934, section 3.3): training canvases of one labelled photo or four.

Shapes: ``S`` side of a canvas, ``T`` boxes on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.config_finetune import FinetuneDataConfig
from ovd.data.finetune_photos import BoxLabels, FinetunePhotos
from ovd.data.negatives import NegativePhotos
from ovd.pictures import resized
from pretrain.engine.identity import file_identity

NEGATIVE_SCALE = (0.5, 4.0)
"""Range of the factor on a negative's size: what it shows is seen from afar and from near."""
MIN_VISIBLE = 0.25
"""Share of a box that a cut must leave for it to stay a label; less is neither object nor background."""


class Tile(NamedTuple):
    """A picture to be put onto a canvas.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: of it.
        scale: range of a random factor on its size.
    """

    image: NDArray[np.uint8]
    labels: BoxLabels
    scale: tuple[float, float]


class FinetuneSample(TypedDict):
    """A training canvas.

    Attributes:
        image: (3, S, S) uint8 RGB.
        boxes: (T, 4) x1, y1, x2, y2 in its pixels.
        classes: (T,) int64, -1 where the class is unknown.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor


class MosaicSource:
    """The training loop's samples: square canvases of one photo or four, each flipped, resized and cropped at random.

    All canvases have one size: each new shape costs seconds of planning on a CPU.

    Args:
        photos: with labels.
        chosen: of them, to be trained on.
        augment: side of a canvas, and how the photos are changed.
        seed: with the draw number it seeds each sample.
        negatives: photos of other kinds; None: there are none.
        detector: folder of the detector that is fine-tuned and exported with the classes; part of the identity.
    """

    def __init__(
        self,
        *,
        photos: FinetunePhotos,
        chosen: Sequence[int],
        augment: FinetuneDataConfig,
        seed: int,
        negatives: NegativePhotos | None = None,
        detector: Path | None = None,
    ) -> None:
        self.photos, self.chosen, self.side, self.augment = photos, tuple(chosen), augment.side, augment
        self.seed, self.negatives, self.detector = seed, negatives, detector

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> dict[str, str]:
        """Fingerprint of all photos, held-out ones too, which choose the weights, and of the detector."""
        negatives = {} if self.negatives is None else self.negatives.identity()
        files = [] if self.detector is None else [self.detector / name for name in ("model.json", "model.safetensors")]
        detector = {"detector's files": file_identity(files)} if files else {}
        return {**self.photos.identity(range(len(self.photos))), **negatives, **detector}

    def sample(self, index: int, draw: int) -> FinetuneSample:
        """A canvas with photo ``index`` in it; pure function of (index, draw).

        Raises:
            BadImageError: one of its photos cannot be read. With another index the others are others, too.
        """
        rng = np.random.default_rng([self.seed, draw, index])
        canvas = np.zeros((self.side, self.side, 3), dtype=np.uint8)
        if rng.random() < self.augment.mosaic:
            half = self.side // 2
            others = rng.integers(len(self.chosen), size=3).tolist()
            parts = [self._paste(self._labelled(index), canvas, 0, 0, half, rng)]
            for photo, (x, y) in zip(others, [(half, 0), (0, half), (half, half)], strict=True):
                is_negative = self.negatives is not None and rng.random() < self.augment.negative_share
                tile = self._negative(rng) if is_negative else self._labelled(photo)
                parts.append(self._paste(tile, canvas, x, y, half, rng))
        else:
            parts = [self._paste(self._labelled(index), canvas, 0, 0, self.side, rng)]
        return FinetuneSample(
            image=torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1))),
            boxes=torch.from_numpy(np.concatenate([part.corners for part in parts])),
            classes=torch.from_numpy(np.concatenate([part.classes for part in parts])),
        )

    def _labelled(self, index: int) -> Tile:
        photo = self.chosen[index]
        return Tile(self.photos.image(photo), self.photos.boxes(photo), self.augment.scale)

    def _negative(self, rng: np.random.Generator) -> Tile:
        assert self.negatives is not None
        index = int(rng.integers(len(self.negatives)))
        return Tile(self.negatives.image(index), self.negatives.boxes(index), NEGATIVE_SCALE)

    def _paste(
        self, tile: Tile, canvas: NDArray[np.uint8], left: int, top: int, side: int, rng: np.random.Generator
    ) -> BoxLabels:
        """Put a picture into a square of the canvas; its boxes there."""
        image, labels, scale = tile
        height, width = image.shape[:2]
        factor = side / max(height, width) * float(np.exp(rng.uniform(*np.log(scale))))
        image = resized(image, factor)
        boxes = labels.corners * np.array([image.shape[1] / width, image.shape[0] / height] * 2, dtype=np.float32)
        height, width = image.shape[:2]
        if rng.random() < self.augment.flip:
            image = image[:, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if rng.random() < self.augment.flip_vertical:
            image = image[::-1]
            boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        gain = rng.uniform(1 - self.augment.colour, 1 + self.augment.colour, 3).astype(np.float32)
        x, y = int(rng.integers(max(0, width - side) + 1)), int(rng.integers(max(0, height - side) + 1))
        cut = image[y : y + side, x : x + side]
        canvas[top : top + cut.shape[0], left : left + cut.shape[1]] = (cut * gain).clip(0, 255).astype(np.uint8)
        return _cut(boxes - np.array([x, y] * 2, dtype=np.float32), labels.classes, cut.shape[:2], (left, top))

    @staticmethod
    def collate(samples: list[FinetuneSample]) -> list[FinetuneSample]:
        """A list: canvases have different numbers of boxes."""
        return samples


def _cut(
    boxes: NDArray[np.float32], classes: NDArray[np.int64], size: tuple[int, int], offset: tuple[int, int]
) -> BoxLabels:
    """Boxes clipped to (height, width) and moved; the class of what is mostly cut off becomes unknown (-1)."""

    def area(corners: NDArray[np.float32]) -> NDArray[np.float32]:
        sides: NDArray[np.float32] = (corners[:, 2:] - corners[:, :2]).clip(0)
        return sides[:, 0] * sides[:, 1]

    limit = np.array([size[1], size[0]] * 2, dtype=np.float32)
    clipped = boxes.clip(0, limit)
    visible = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)
    mostly_inside = area(clipped) >= MIN_VISIBLE * area(boxes)
    moved = clipped + np.array(offset * 2, dtype=np.float32)
    return BoxLabels(corners=moved[visible], classes=np.where(mostly_inside, classes, -1)[visible])
