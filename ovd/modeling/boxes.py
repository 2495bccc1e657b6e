# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes as tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def box_iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, generalised IoU) of xyxy boxes, element by element (arXiv 1902.09630, algorithm 1).

    Args:
        a, b: (…, 4), broadcast over all but the last dimension; insert a dimension in each for all pairs.

    Returns:
        two (…) tensors, finite for empty boxes too, as are their gradients.
    """
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    size_a, size_b = (a[..., 2:] - a[..., :2]).clamp(min=0), (b[..., 2:] - b[..., :2]).clamp(min=0)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - inner
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = inner / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)
