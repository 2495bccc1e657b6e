# SPDX-License-Identifier: Apache-2.0
"""Predictions of a dense detector, one per cell of each level's grid, and the boxes that they mean.

Shapes: ``N`` pictures, ``A`` cells of all levels together, finest level first, rows before columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Cells(NamedTuple):
    """Predictions for every cell, finest level first, rows before columns.

    Attributes:
        words: (N, A, words) logits.
        sides: (N, A, 4, bins) logits of left, top, right, bottom.
    """

    words: Tensor
    sides: Tensor


def gather(heads: Iterable[nn.Module], maps: Sequence[Tensor]) -> Cells:
    """Predictions of one head per level, joined along the cells."""
    both = [head(x) for head, x in zip(heads, maps, strict=True)]
    words = torch.cat([flat(w) for w, _ in both], dim=1)
    sides = torch.cat([flat(s) for _, s in both], dim=1)
    return Cells(words, sides.unflatten(2, (4, -1)))


def flat(x: Tensor) -> Tensor:
    """(N, C, h, w) to (N, h·w, C)."""
    return x.flatten(2).transpose(1, 2)


def cell_centres(
    height: int, width: int, strides: Sequence[int], *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """((A, 2) x and y of the centres, (A,) strides) in pixels, of a picture of ``height`` × ``width``.

    A cell that lies only partly in the picture counts: convolutions with padding round sizes up.
    """
    points, steps = [], []
    for stride in strides:
        y, x = torch.meshgrid(
            torch.arange(-(-height // stride), device=device) + 0.5,
            torch.arange(-(-width // stride), device=device) + 0.5,
            indexing="ij",
        )
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2) * stride)
        steps.append(torch.full((x.numel(),), float(stride), device=device))
    return torch.cat(points), torch.cat(steps)


def distances(sides: Tensor) -> Tensor:
    """(…, 4, bins) logits to (…, 4) expected distances in strides."""
    bins = torch.arange(sides.shape[-1], device=sides.device, dtype=torch.float32)
    return sides.float().softmax(-1) @ bins


def decode(sides: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """(…, A, 4, bins) logits to (…, A, 4) boxes x1, y1, x2, y2 in pixels."""
    reach = distances(sides) * strides[:, None]
    return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
