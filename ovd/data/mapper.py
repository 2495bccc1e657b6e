# SPDX-License-Identifier: Apache-2.0
"""From a labelled picture to Detectron2's training input; offline regions move with the picture.

Every random choice comes from a generator seeded by (seed, draw), so a sample is a pure function of its place in the
run.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.data.transforms import ResizeTransform
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.transforms.transform import CropTransform, HFlipTransform, NoOpTransform, Transform, TransformList

from ovd.config import CutConfig
from ovd.data.catalog import Labelled, LabelledImages
from ovd.data.samples import LabelledSample
from ovd.regions.store import RegionStore
from pretrain.engine.identity import identity_of
from pretrain.engine.sampling import derive_seed


class TrainingTransform:
    """Resize about a short side, optional large-scale-jitter crop or DETR's cut, horizontal flip.

    Args:
        short_side, long_side: pixels.
        scale: range of a random factor on the resize.
        crop: side of the random crop after it, or None.
        cut: DETR's cut before it, or None.
        flip: probability.
    """

    def __init__(
        self,
        *,
        short_side: int,
        long_side: int,
        scale: tuple[float, float] = (1.0, 1.0),
        crop: int | None = None,
        cut: CutConfig | None = None,
        flip: float = 0.5,
    ) -> None:
        self.short_side, self.long_side = short_side, long_side
        self.scale, self.crop, self.cut, self.flip = scale, crop, cut, flip

    def draw(self, height: int, width: int, rng: np.random.Generator) -> TransformList:
        """The transforms of one sample of a (height, width) picture."""
        steps: list[Transform] = []
        if self.cut is not None and rng.random() < self.cut.probability:
            steps, height, width = self._cut(self.cut, height, width, rng)
        factor = min(self.short_side / min(height, width), self.long_side / max(height, width))
        factor *= rng.uniform(*self.scale)
        if self.crop is None:  # what is not cropped never grows beyond the long side, whatever was drawn
            factor = min(factor, self.long_side / max(height, width))
        new_height, new_width = max(1, round(height * factor)), max(1, round(width * factor))
        steps.append(
            ResizeTransform(height, width, new_height, new_width)
            if (new_height, new_width) != (height, width)
            else NoOpTransform()
        )
        if self.crop is not None:
            crop_height, crop_width = min(self.crop, new_height), min(self.crop, new_width)
            top = int(rng.integers(new_height - crop_height + 1))
            left = int(rng.integers(new_width - crop_width + 1))
            steps.append(CropTransform(left, top, crop_width, crop_height))
            new_width = crop_width
        if rng.random() < self.flip:
            steps.append(HFlipTransform(new_width))
        return TransformList(steps)

    @staticmethod
    def _cut(cut: CutConfig, height: int, width: int, rng: np.random.Generator) -> tuple[list[Transform], int, int]:
        """Resize to a drawn short side and cut a rectangle of drawn sides: the two steps, and its height and width."""
        factor = cut.short_sides[int(rng.integers(len(cut.short_sides)))] / min(height, width)
        tall, wide = max(1, round(height * factor)), max(1, round(width * factor))
        least, largest = cut.sides
        high, long = (int(rng.integers(min(least, side), min(largest, side) + 1)) for side in (tall, wide))
        top, left = int(rng.integers(tall - high + 1)), int(rng.integers(wide - long + 1))
        return [ResizeTransform(height, width, tall, wide), CropTransform(left, top, long, high)], high, long


def move_boxes(boxes: np.ndarray, transforms: TransformList, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes after ``transforms``, clipped to (height, width) ``size``, and which are still there (≥ 1 px each side)."""
    if len(boxes) == 0:
        return boxes.reshape(0, 4).astype(np.float32), np.zeros(0, dtype=bool)
    moved = transforms.apply_box(boxes.astype(np.float64))
    moved[:, 0::2] = moved[:, 0::2].clip(0, size[1])
    moved[:, 1::2] = moved[:, 1::2].clip(0, size[0])
    keep = ((moved[:, 2] - moved[:, 0]) >= 1.0) & ((moved[:, 3] - moved[:, 1]) >= 1.0)
    return moved.astype(np.float32), keep


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """(n, 4) float32 tight boxes of (n, H, W) masks; empty masks give zeros."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def map_sample(
    labelled: Labelled,
    *,
    transform: TrainingTransform,
    rng: np.random.Generator,
    offline: tuple[np.ndarray, np.ndarray] | None,
    regions_per_image: int,
) -> LabelledSample:
    """Detectron2's training dict.

    Args:
        labelled: picture and labels.
        transform: augmentation.
        rng: of this draw.
        offline: ((P, 4) boxes in original pixels, (P, D) embeddings), or None where nothing is distilled.
        regions_per_image: how many of them are drawn, without replacement.

    Returns:
        ``image`` (3, H, W) uint8, ``instances``, ``image_id`` and, with ``offline``, ``regions``.
    """
    height, width = labelled.image.shape[:2]
    transforms = transform.draw(height, width, rng)
    image = transforms.apply_image(labelled.image)
    size = (image.shape[0], image.shape[1])
    masks = (
        np.stack([transforms.apply_segmentation(m.astype(np.uint8)).astype(bool) for m in labelled.masks])
        if len(labelled.masks)
        else np.zeros((0, *size), dtype=bool)
    )
    # A crop can cut an object: its box is then the extent of what is left, not the clipped old box (vital under scale
    # jitter). DETR's own cut clips.
    boxes, keep = move_boxes(labelled.boxes, transforms, size)
    if transform.crop is not None and len(masks):
        boxes = mask_boxes(masks)
    keep &= masks.any(axis=(1, 2)) if len(masks) else keep
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes[keep].reshape(-1, 4)))
    instances.gt_classes = torch.from_numpy(labelled.classes[keep])
    instances.gt_masks = BitMasks(torch.from_numpy(np.ascontiguousarray(masks[keep])))
    out: LabelledSample = {
        "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        "instances": instances,
        "image_id": labelled.image_id,
    }
    if offline is not None:
        region_boxes, embeddings = offline
        chosen = rng.permutation(len(region_boxes))[:regions_per_image]
        moved, visible = move_boxes(region_boxes[chosen], transforms, size)
        regions = Instances(size)
        regions.proposal_boxes = Boxes(torch.from_numpy(moved[visible].reshape(-1, 4)))
        regions.embedding = torch.from_numpy(np.asarray(embeddings[chosen][visible], dtype=np.float32))
        out["regions"] = regions
    return out


class DetectionSource:
    """The training loop's sample source over labelled pictures.

    Args:
        images: data set.
        transform: augmentation.
        seed: with the draw number it seeds each sample's augmentation.
        store: offline regions, or None.
        regions_per_image: drawn from the store per sample.
        agnostic: every label is class 0.
    """

    def __init__(
        self,
        *,
        images: LabelledImages,
        transform: TrainingTransform,
        seed: int,
        store: RegionStore | None = None,
        regions_per_image: int = 32,
        agnostic: bool = False,
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.store, self.regions_per_image, self.agnostic = store, regions_per_image, agnostic

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures and labels, and the offline regions."""
        regions = {} if self.store is None else {"regions": self.store.identity()}
        return {**identity_of(self.images), **regions}

    def sample(self, index: int, draw: int) -> LabelledSample:
        """Sample of picture ``index``; pure function of (index, draw)."""
        rng = np.random.default_rng([self.seed, draw])
        labelled = self.images.load(index)
        offline = None
        if self.store is not None:
            boxes, embeddings, _ = self.store[labelled.image_id]
            offline = (np.asarray(boxes), np.asarray(embeddings))
        out = map_sample(
            labelled, transform=self.transform, rng=rng, offline=offline, regions_per_image=self.regions_per_image
        )
        out["seed"] = derive_seed(self.seed, draw, 1) % 2**62  # of which anchors and proposals are learned from
        if self.agnostic:
            out["instances"].gt_classes = torch.zeros_like(out["instances"].gt_classes)
        return out

    @staticmethod
    def collate(samples: list[LabelledSample]) -> list[LabelledSample]:
        """Detectron2 takes a list."""
        return samples
