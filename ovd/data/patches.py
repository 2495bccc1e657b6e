# SPDX-License-Identifier: Apache-2.0
"""Random query patches: the boxes of an unlabelled picture that UP-DETR learns to localise.

A set of patches is a pure function of (seed, picture, variant). They are cut from the picture as it is stored, before
any resize, and their boxes follow the resize.

Shapes: ``M`` patches, ``K`` crops of a patch (scales), ``S`` their side; boxes are (M, 4) x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.config_detr import PatchConfig
from ovd.data.mapper import TrainingTransform, move_boxes
from ovd.data.samples import PatchSample
from ovd.data.selective_search import likely_boxes
from ovd.regions.crops import crop_regions
from pretrain.augment import ViewAugment
from pretrain.config_views import ViewConfig
from pretrain.data.images import ImageSet
from pretrain.engine.errors import BadImageError
from pretrain.engine.identity import identity_of
from pretrain.engine.sampling import derive_seed

TOO_SMALL = 16  # pictures with a side up to this are skipped (released code)
TRIES = 40  # draws for one patch before an overlapping one is accepted


def official_boxes(width: int, height: int, rng: np.random.Generator, config: PatchConfig) -> NDArray[Any]:
    """(M, 4) boxes of the released sampler: both sides uniform from ``min_side`` to the whole picture, then a uniform
    position.

    Its patches are large (median area 19 % of the picture), often long, and a third overlaps another by half.
    """
    boxes = np.zeros((config.count, 4), dtype=np.float32)
    for box in boxes:
        w = int(rng.integers(config.min_side, max(width - config.min_side, config.min_side) + 1))
        h = int(rng.integers(config.min_side, max(height - config.min_side, config.min_side) + 1))
        w, h = min(w, width), min(h, height)
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        box[:] = x, y, x + w, y + h
    return boxes


def log_uniform_boxes(
    width: int, height: int, rng: np.random.Generator, config: PatchConfig, *, start: NDArray[Any] | None = None
) -> NDArray[Any]:
    """(M, 4) boxes of sizes even over scales, bounded aspect, and no near duplicates.

    The square root of area(box) / area(picture) and the aspect are drawn log-uniformly, from ``scale`` and up to
    ``max_aspect``. A box that overlaps an earlier one by more than ``max_iou`` is drawn again, at most `TRIES` times.

    Args:
        width, height: of the picture.
        rng: of this picture.
        config: of the patches.
        start: boxes that are there already.
    """
    boxes = np.zeros((0, 4), dtype=np.float32) if start is None else start[: config.count].astype(np.float32)
    smallest, largest = map(math.log, config.scale)
    side = math.sqrt(width * height)
    while len(boxes) < config.count:
        candidate = np.zeros(4, dtype=np.float32)
        for _ in range(TRIES):
            size = side * math.exp(rng.uniform(smallest, largest))
            stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(config.max_aspect))
            w = min(max(round(size * stretch), config.min_side), width)
            h = min(max(round(size / stretch), config.min_side), height)
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            candidate[:] = x, y, x + w, y + h
            if len(boxes) == 0 or float(_iou(candidate, boxes).max()) <= config.max_iou:
                break
        boxes = np.concatenate([boxes, candidate[None]])
    return boxes


def prior_boxes(image: NDArray[np.uint8], rng: np.random.Generator, config: PatchConfig) -> NDArray[Any]:
    """Boxes around likely objects: up to ``count`` of a selective search, jittered.

    Their order is drawn, what stands out more often first. They are objects more often than random patches are, as
    DETReg's targets (arXiv 2106.04550); unlike those, each is a query patch.
    """
    height, width = image.shape[:2]
    candidates, values = likely_boxes(image, scale=config.scale, max_aspect=config.max_aspect)
    order = np.argsort(-values * np.exp(rng.normal(0, 0.5, len(values))), kind="stable")
    boxes = np.zeros((0, 4), dtype=np.float32)
    for box in candidates[order]:
        sides = np.tile(box[2:] - box[:2], 2)
        box = box + rng.uniform(-0.1, 0.1, 4) * sides
        box = np.round(np.clip(box, 0, [width, height, width, height])).astype(np.float32)
        if min(box[2:] - box[:2]) < config.min_side or (len(boxes) and _iou(box, boxes).max() > config.max_iou):
            continue
        boxes = np.concatenate([boxes, box[None]])
        if len(boxes) == config.count:
            break
    return boxes


def _iou(box: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inner = np.clip(high - low, 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1)
    return inner / ((box[2:] - box[:2]).prod() + areas - inner)


def colour_jitter(size: int) -> ViewConfig:
    """The released code's SimCLR-like changes of a patch: p .8 jitter .4/.4/.4/.1, p .2 grey, p .5 blur; no flip."""
    return ViewConfig(
        size=size,
        crop_scale=(1.0, 1.0),
        flip=0.0,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        grey_p=0.2,
        blur_p=0.5,
        blur_sigma=(0.1, 2.0),
        solarise_p=0.0,
        normalise=None,
    )


class PatchSource:
    """The training loop's sample source: a picture and the patches to find in it.

    Args:
        images: unlabelled pictures.
        transform: resize of the picture (no flip: a patch must keep its appearance).
        seed: of the patches.
        config: how patches are drawn; ``variants`` are different sets per picture, one per epoch in turn.
        crop_scales: (1,) cuts the patch itself; (1, 1.5) with its surroundings, as the joint space's regions are cut.
    """

    def __init__(
        self,
        *,
        images: ImageSet,
        transform: TrainingTransform,
        seed: int,
        config: PatchConfig,
        crop_scales: tuple[float, ...] = (1.0,),
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.config, self.crop_scales = config, crop_scales
        self.augment = ViewAugment(colour_jitter(config.size)) if config.jitter else None

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures."""
        return identity_of(self.images)

    def boxes(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
        """(M, 4) boxes in pixels of ``image``."""
        height, width = image.shape[:2]
        if self.config.sampler == "official":
            return official_boxes(width, height, rng, self.config)
        start = prior_boxes(image, rng, self.config) if self.config.sampler == "prior" else None
        return log_uniform_boxes(width, height, rng, self.config, start=start)

    def variant(self, index: int, variant: int, *, draw: int = 0) -> PatchSample:
        """Picture ``index`` with its set of patches number ``variant``.

        Returns:
            ``image`` (3, H, W) uint8 after the resize, ``boxes`` (M, 4) float32 in its pixels, ``patches``
            (M, K, 3, S, S) uint8 cut from the stored picture, ``size`` (H, W).

        Raises:
            BadImageError: unreadable, or too small to cut patches from.
        """
        image = self.images.image(index)
        height, width = image.shape[:2]
        if min(height, width) <= TOO_SMALL:
            raise BadImageError(f"picture {index}", f"{width}x{height} pixels; patches need more than {TOO_SMALL}")
        rng = np.random.default_rng([self.seed, index, variant])
        boxes = self.boxes(image, rng)
        patches = crop_regions(image, boxes, size=self.config.size, scales=self.crop_scales)
        if self.augment is not None:
            patches = self._jittered(patches, seed=derive_seed(self.seed, index, variant))
        transforms = self.transform.draw(height, width, np.random.default_rng([self.seed, draw]))
        resized = transforms.apply_image(image)
        moved, _ = move_boxes(boxes, transforms, resized.shape[:2])
        return {
            "image": torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))),
            "boxes": torch.from_numpy(moved),
            "patches": patches,
            "size": (resized.shape[0], resized.shape[1]),
        }

    def _jittered(self, patches: Tensor, *, seed: int) -> Tensor:
        assert self.augment is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = self.augment(patches.flatten(0, 1))
        return (changed.clamp(0, 1) * 255).round().to(torch.uint8).view_as(patches)

    def sample(self, index: int, draw: int) -> PatchSample:
        """Sample of picture ``index``; the set of patches changes from epoch to epoch."""
        return self.variant(index, (draw // len(self)) % self.config.variants, draw=draw)

    @staticmethod
    def collate(samples: list[PatchSample]) -> list[PatchSample]:
        """A list, as Detectron2's models take."""
        return samples
