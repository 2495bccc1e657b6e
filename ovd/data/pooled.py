# SPDX-License-Identifier: Apache-2.0
"""Training samples of a region head: a photo's regions with their cached features and their targets.

Shapes: ``P`` regions kept of each photo, ``N`` regions of a batch, ``M`` offline regions of it, ``V`` words, ``F``
pooled features, ``K`` known words, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.data.photo_words import Photo, PhotoLabels, localization_quality, region_targets
from ovd.regions.store import RegionStore
from pretrain.data.coco import ImageId


@dataclass(frozen=True, kw_only=True)
class OfflineBatch:
    """Offline regions of one or several photos, which the encoder saw as crops.

    Attributes:
        features: (M, F).
        target: (M, D) embeddings of the crops, unit rows.
    """

    features: Tensor
    target: Tensor

    def to(self, device: torch.device) -> OfflineBatch:
        """The same on a device."""
        return OfflineBatch(features=self.features.to(device), target=self.target.to(device))

    @staticmethod
    def joined(parts: Sequence[OfflineBatch]) -> OfflineBatch:
        """All regions in one batch."""
        return OfflineBatch(
            features=torch.cat([one.features for one in parts]), target=torch.cat([one.target for one in parts])
        )


@dataclass(frozen=True, kw_only=True)
class BoxBatch:
    """The boxes of a batch's regions, and how well they fit.

    Attributes:
        boxes: (N, 4) x1, y1, x2, y2 in pixels of their photos.
        sizes: (N, 2) heights and widths of these.
        quality: (N,) best IoU with a label.
    """

    boxes: Tensor
    sizes: Tensor
    quality: Tensor

    def to(self, device: torch.device) -> BoxBatch:
        """The same on a device."""
        return BoxBatch(boxes=self.boxes.to(device), sizes=self.sizes.to(device), quality=self.quality.to(device))

    @staticmethod
    def joined(parts: Sequence[BoxBatch]) -> BoxBatch:
        """All boxes in one batch."""
        return BoxBatch(
            boxes=torch.cat([one.boxes for one in parts]),
            sizes=torch.cat([one.sizes for one in parts]),
            quality=torch.cat([one.quality for one in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class RegionBatch:
    """Regions of one or several photos.

    Attributes:
        features: (N, F).
        word_scores: (N, K) 0…1.
        target, mask: (N, V), see `ovd.data.photo_words.RegionTargets`.
        offline: what is distilled; None: nothing is.
        boxes: where localisation quality is learned; else None.
    """

    features: Tensor
    word_scores: Tensor
    target: Tensor
    mask: Tensor
    offline: OfflineBatch | None = None
    boxes: BoxBatch | None = None

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        return RegionBatch(
            features=self.features.to(device),
            word_scores=self.word_scores.to(device),
            target=self.target.to(device),
            mask=self.mask.to(device),
            offline=None if self.offline is None else self.offline.to(device),
            boxes=None if self.boxes is None else self.boxes.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class OfflineRegions:
    """What is distilled.

    Attributes:
        store: the photos' offline regions, by image id.
        row: of a photo, by its index: `features` (M, F) of these regions.
    """

    store: RegionStore
    row: Callable[[int], Mapping[str, NDArray[Any]]]

    def sample(self, image_id: ImageId, index: int) -> OfflineBatch:
        """Those of one photo."""
        _, embeddings_MD, _ = self.store[image_id]
        return OfflineBatch(
            features=torch.from_numpy(self.row(index)["features"][: len(embeddings_MD)]), target=embeddings_MD
        )


class PooledSource:
    """The training loop's samples, one photo each.

    Args:
        photos: with labels.
        row: of a photo, by its index: `features` (P, F), `known` (P, K), `boxes` (P, 4), `size` (2,): its height and
            width, how many `regions` it has, and which `photo` it is of: another one, where this cannot be read.
        offline: what is distilled; None: nothing is.
        with_boxes: give boxes too, for localisation quality.
    """

    def __init__(
        self,
        *,
        photos: PhotoLabels,
        row: Callable[[int], Mapping[str, NDArray[Any]]],
        offline: OfflineRegions | None = None,
        with_boxes: bool = False,
    ) -> None:
        self.photos, self.row, self.offline, self.with_boxes = photos, row, offline, with_boxes

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, str]:
        """That of the photos, their labels and offline regions; the cache has a key of its own."""
        store = {} if self.offline is None else {"offline regions": self.offline.store.identity()}
        return {**self.photos.identity(), **store}

    def sample(self, index: int, draw: int) -> RegionBatch:
        """Regions of photo ``index``; every draw gives the same."""
        row = self.row(index)
        count, number = int(row["regions"]), int(row["photo"])
        boxes = row["boxes"][:count]
        photo = self.photos.photos[number]
        targets = region_targets(photo, boxes, self.photos.table)
        return RegionBatch(
            features=torch.from_numpy(row["features"][:count]),
            word_scores=torch.from_numpy(row["known"][:count]),
            target=torch.from_numpy(targets.target),
            mask=torch.from_numpy(targets.mask),
            offline=None if self.offline is None else self.offline.sample(photo.image_id, number),
            boxes=None if not self.with_boxes else self._boxes(photo, boxes, row["size"]),
        )

    def _boxes(self, photo: Photo, boxes_P4: NDArray[np.float32], size: NDArray[np.float32]) -> BoxBatch:
        return BoxBatch(
            boxes=torch.from_numpy(boxes_P4),
            sizes=torch.from_numpy(size).expand(len(boxes_P4), 2),
            quality=torch.from_numpy(localization_quality(photo, boxes_P4, self.photos.table)),
        )

    @staticmethod
    def collate(samples: list[RegionBatch]) -> RegionBatch:
        """All regions in one batch."""
        offline = [one.offline for one in samples if one.offline is not None]
        boxes = [one.boxes for one in samples if one.boxes is not None]
        return RegionBatch(
            features=torch.cat([one.features for one in samples]),
            word_scores=torch.cat([one.word_scores for one in samples]),
            target=torch.cat([one.target for one in samples]),
            mask=torch.cat([one.mask for one in samples]),
            offline=OfflineBatch.joined(offline) if offline else None,
            boxes=BoxBatch.joined(boxes) if boxes else None,
        )
