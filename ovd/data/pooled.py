# SPDX-License-Identifier: Apache-2.0
"""Training samples of a region head: a photo's regions with their cached features and their targets.

Shapes: ``P`` regions kept of each photo, ``N`` regions of a batch, ``V`` words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.data.photo_words import PhotoWords, region_targets


@dataclass(frozen=True, kw_only=True)
class RegionBatch:
    """Regions of one or several photos.

    Attributes:
        features: (N, F).
        known: (N, K) 0…1.
        target, mask: (N, V), see `ovd.data.photo_words.RegionTargets`.
    """

    features: Tensor
    known: Tensor
    target: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        return RegionBatch(
            features=self.features.to(device),
            known=self.known.to(device),
            target=self.target.to(device),
            mask=self.mask.to(device),
        )


class PooledSource:
    """The training loop's samples, one photo each.

    Args:
        photos: with labels.
        row: of a photo, by its index: `features` (P, F), `known` (P, K), `boxes` (P, 4), and how many `regions` it has.
    """

    def __init__(self, *, photos: PhotoWords, row: Callable[[int], Mapping[str, NDArray[Any]]]) -> None:
        self.photos, self.row = photos, row

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, str]:
        """That of the photos and their labels; the cache has a key of its own."""
        return self.photos.identity()

    def sample(self, index: int, draw: int) -> RegionBatch:
        """Regions of photo ``index``; every draw gives the same."""
        row = self.row(index)
        count = int(row["regions"])
        boxes = row["boxes"][:count]
        targets = region_targets(self.photos.photos[index], boxes, self.photos.table)
        return RegionBatch(
            features=torch.from_numpy(row["features"][:count]),
            known=torch.from_numpy(row["known"][:count]),
            target=torch.from_numpy(targets.target),
            mask=torch.from_numpy(targets.mask),
        )

    @staticmethod
    def collate(samples: list[RegionBatch]) -> RegionBatch:
        """All regions in one batch."""
        return RegionBatch(
            features=torch.cat([one.features for one in samples]),
            known=torch.cat([one.known for one in samples]),
            target=torch.cat([one.target for one in samples]),
            mask=torch.cat([one.mask for one in samples]),
        )
