# SPDX-License-Identifier: Apache-2.0
"""Small networks and views for tests of BYOL and SwAV: seconds, not minutes, and every kind of state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, DIM = 12, 6


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


def head(inside: int, outside: int = DIM, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inside, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, outside, bias=False))


def as_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 - 0.5


class Views:
    """Random pictures, one list of sizes; a pure function of (index, draw)."""

    def __init__(self, sizes: tuple[int, ...], length: int = 40) -> None:
        self.sizes, self.length = sizes, length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, draw: int) -> list[np.ndarray]:
        rng = np.random.default_rng([index, draw])
        colour = np.random.default_rng(index).integers(0, 200, (3, 1, 1))
        return [(colour + rng.integers(0, 56, (3, size, size))).astype(np.uint8) for size in self.sizes]

    def collate(self, samples: list[list[np.ndarray]]) -> dict[str, Any]:
        return {"views": [torch.from_numpy(np.stack(view)) for view in zip(*samples, strict=True)]}

    def batch(self, count: int = 8, first: int = 0) -> dict[str, Any]:
        return self.collate([self.sample(i % self.length, i) for i in range(first, first + count)])
