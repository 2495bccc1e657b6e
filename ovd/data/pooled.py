# SPDX-License-Identifier: Apache-2.0
"""Training samples of a region head: a photo's regions with their cached features, and what they are told.

Shapes: ``P`` regions kept of each photo, ``N`` regions of a batch, ``V`` words.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ovd.data.features import FeatureCache
from ovd.data.photo_words import PhotoWords, region_targets


@dataclass(frozen=True, kw_only=True)
class RegionBatch:
    """Regions of one or several photos.

    Attributes:
        features: (N, F).
        known: (N, K) 0…1.
        value, told: (N, V), see `ovd.data.photo_words.RegionTargets`.
    """

    features: Tensor
    known: Tensor
    value: Tensor
    told: Tensor

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        return RegionBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class PooledSource:
    """The training loop's samples, one photo each.

    Args:
        photos: with labels.
        cache: rows of `features` (P, F), `known` (P, K), `boxes` (P, 4) and `regions`, the number that is there.
    """

    def __init__(self, *, photos: PhotoWords, cache: FeatureCache) -> None:
        self.photos, self.cache = photos, cache

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, str]:
        """That of the photos and their labels; the cache has a key of its own."""
        return self.photos.identity()

    def sample(self, index: int, draw: int) -> RegionBatch:
        """Regions of photo ``index``; every draw gives the same."""
        arrays = self.cache.arrays
        count = int(arrays["regions"][index])
        boxes = np.array(arrays["boxes"][index, :count])
        targets = region_targets(self.photos.photos[index], boxes, self.photos.table)
        return RegionBatch(
            features=torch.from_numpy(np.array(arrays["features"][index, :count])),
            known=torch.from_numpy(np.array(arrays["known"][index, :count])),
            value=torch.from_numpy(targets.value),
            told=torch.from_numpy(targets.told),
        )

    @staticmethod
    def collate(samples: list[RegionBatch]) -> RegionBatch:
        """All regions in one batch."""
        return RegionBatch(**{f.name: torch.cat([getattr(s, f.name) for s in samples]) for f in fields(RegionBatch)})
