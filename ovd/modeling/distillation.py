# SPDX-License-Identifier: Apache-2.0
"""Distillation losses between a detector's region embeddings and a frozen encoder's embeddings of the crops.

ViLD-image does it with an L1 norm, UP-DETR's reconstruction with a squared distance; both between unit vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def l1_distillation(regions_RD: Tensor, targets_RD: Tensor, valid_R: Tensor | None = None) -> Tensor:
    """Mean over valid regions of ``‖normalise(target) − normalise(region)‖₁`` (ViLD eq. 4).

    It is the L1 *norm* per region, not the mean over elements, which would be D times smaller: two random unit vectors
    of 512 dimensions are about 25.4 apart. Multiply by ViLD's weight w (.5 for the ResNet-50 model) outside.

    Args:
        regions_RD: student embeddings, any norm.
        targets_RD: frozen teacher embeddings, any norm; no gradient flows into them.
        valid_R: (R,) bool; padded or cropped-away regions are False and count in neither sum nor denominator.

    Returns:
        scalar float32; 0 (with a graph) when no region is valid.
    """
    with torch.autocast(regions_RD.device.type, enabled=False):
        region = F.normalize(regions_RD.float(), dim=1)
        target = F.normalize(targets_RD.detach().float(), dim=1)
        distance_R = (region - target).abs().sum(dim=1)
        if valid_R is not None:
            distance_R = distance_R[valid_R]
        return distance_R.mean() if len(distance_R) else regions_RD.float().sum() * 0.0


def squared_distillation(regions_RD: Tensor, targets_RD: Tensor) -> Tensor:
    """Sum over regions of ``‖normalise(target) − normalise(region)‖²`` = 2 − 2cos (UP-DETR's reconstruction), float32.

    Summed over channels, as the paper has it: between 0 and 4 for each region. The caller divides by the boxes.
    """
    with torch.autocast(regions_RD.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(regions_RD.float(), targets_RD.detach().float(), dim=-1)).sum()
