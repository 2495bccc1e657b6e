# SPDX-License-Identifier: Apache-2.0
"""Training samples of a region head: a photo's regions with their cached features, and what they are told.

Shapes: ``P`` regions kept of each photo, ``N`` regions of a batch, ``M`` offline regions of it, ``V`` words, ``F``
pooled features, ``K`` known words, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.data.photo_words import PhotoWords, region_targets
from ovd.regions.store import RegionStore


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
        return OfflineBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def joined(parts: Sequence[OfflineBatch]) -> OfflineBatch:
        """All regions in one batch."""
        return OfflineBatch(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(OfflineBatch)})


@dataclass(frozen=True, kw_only=True)
class RegionBatch:
    """Regions of one or several photos.

    Attributes:
        features: (N, F).
        known: (N, K) 0…1.
        value, told: (N, V), see `ovd.data.photo_words.RegionTargets`.
        offline: what is distilled; None: nothing is.
    """

    features: Tensor
    known: Tensor
    value: Tensor
    told: Tensor
    offline: OfflineBatch | None = None

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return RegionBatch(**moved, offline=None if self.offline is None else self.offline.to(device))


TENSORS = ("features", "known", "value", "told")


class PooledSource:
    """The training loop's samples, one photo each.

    Args:
        photos: with labels.
        row: of a photo, by its index: `features` (P, F), `known` (P, K), `boxes` (P, 4), and how many `regions` it has;
            where something is distilled, `offline_features` (M, F), too.
        store: the photos' offline regions, by image id; None: nothing is distilled.
    """

    def __init__(
        self,
        *,
        photos: PhotoWords,
        row: Callable[[int], Mapping[str, NDArray[Any]]],
        store: RegionStore | None = None,
    ) -> None:
        self.photos, self.row, self.store = photos, row, store

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, str]:
        """That of the photos, their labels and offline regions; the cache has a key of its own."""
        store = {} if self.store is None else {"offline regions": self.store.identity()}
        return {**self.photos.identity(), **store}

    def sample(self, index: int, draw: int) -> RegionBatch:
        """Regions of photo ``index``; every draw gives the same."""
        row = self.row(index)
        count = int(row["regions"])
        boxes = row["boxes"][:count]
        targets = region_targets(self.photos.photos[index], boxes, self.photos.table)
        return RegionBatch(
            features=torch.from_numpy(row["features"][:count]),
            known=torch.from_numpy(row["known"][:count]),
            value=torch.from_numpy(targets.value),
            told=torch.from_numpy(targets.told),
            offline=None if self.store is None else self._offline(self.store, index, row),
        )

    def _offline(self, store: RegionStore, index: int, row: Mapping[str, NDArray[Any]]) -> OfflineBatch:
        _, embeddings_MD, _ = store[self.photos.photos[index].image_id]
        return OfflineBatch(
            features=torch.from_numpy(row["offline_features"][: len(embeddings_MD)]), target=embeddings_MD
        )

    @staticmethod
    def collate(samples: list[RegionBatch]) -> RegionBatch:
        """All regions in one batch."""
        offline = [sample.offline for sample in samples if sample.offline is not None]
        return RegionBatch(
            **{name: torch.cat([getattr(sample, name) for sample in samples]) for name in TENSORS},
            offline=OfflineBatch.joined(offline) if offline else None,
        )
