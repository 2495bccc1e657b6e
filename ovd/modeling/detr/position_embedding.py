# SPDX-License-Identifier: Apache-2.0
"""Sine position embedding of tokens and anchors (arXiv 2005.12872 §A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DETR_TEMPERATURE = 10_000.0  # arXiv 2005.12872 §A.4; its finest sine still needs a whole picture for one turn
# In the conditional form attention has to be local before training. With DETR's temperature and a gain of one a query's
# attention is nearly uniform over the picture (standard deviation .28 of a side; uniform: .29). With this one and
# `transformer.POSITION_GAINS` the first layer attends to the whole picture, in which it searches for a patch, and later
# layers around the anchor (.09, for a side of `transformer.INITIAL_SIDE`).
CONDITIONAL_TEMPERATURE = 5.0


def sine_position_embedding(positions: Tensor, width: int, *, temperature: float) -> Tensor:
    """(…, k) coordinates in [0, 1] → (…, k · width) sines and cosines, DETR's with scale 2π.

    Their periods go from one turn per picture to one per ``temperature`` pictures.
    """
    step = torch.arange(width, device=positions.device, dtype=torch.float32)
    frequency = temperature ** (2 * torch.div(step, 2, rounding_mode="floor") / width)
    angle = positions.float()[..., None] * (2 * math.pi) / frequency
    waves = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
    return waves.flatten(-2)


def token_positions(valid_NHW: Tensor, *, centred: bool) -> Tensor:
    """(N, H, W, 2) y and x of each cell within the valid part, in [0, 1].

    Args:
        valid_NHW: bool, False for padding.
        centred: cell centres, which anchors can be compared with; else DETR's count, whose last valid cell is 1.
    """
    rows = valid_NHW.cumsum(1, dtype=torch.float32)
    columns = valid_NHW.cumsum(2, dtype=torch.float32)
    shift = 0.5 if centred else 0.0
    y = (rows - shift) / (rows[:, -1:] + 1e-6)
    x = (columns - shift) / (columns[:, :, -1:] + 1e-6)
    return torch.stack([y, x], dim=-1)
