# SPDX-License-Identifier: Apache-2.0
"""Group norm (arXiv:1803.08494) with weight standardisation (arXiv:1903.10520) in place of batch norm.

BYOL's second paper (Richemond et al., arXiv:2010.10241) shows with it that batch statistics are not what keeps BYOL
from collapsing. `without_batch_norm` turns any network into such a one; `folded` turns the standardised weights of a
trained one into plain convolutions, which every other library can read.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5  # added to the variance of a weight, as batch norm adds it to that of a feature
# Wanted groups of a norm: Richemond et al.'s from memory, not compared with the paper (docs/reports/deviations.md).
GROUPS = 16


def standardised(weight: Tensor) -> Tensor:
    """Each output unit's weights with mean 0 and variance 1 over its inputs."""
    flat = weight.flatten(1)
    variance, mean = torch.var_mean(flat, dim=1, unbiased=False, keepdim=True)
    return ((flat - mean) * torch.rsqrt(variance + EPSILON)).view_as(weight)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weights are standardised before each use."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    """A linear layer whose weights are standardised before each use."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardised(self.weight), self.bias)


def group_norm(channels: int, *, least: int = 1) -> nn.GroupNorm:
    """16 groups, or as many as divide the channels and leave ``least`` of them to each."""
    return nn.GroupNorm(math.gcd(GROUPS, channels, max(1, channels // least)), channels)


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Replace, in place, batch norms by group norms and convolutions by standardised ones; returns the module."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm = group_norm(child.num_features)
            if child.affine:  # keeps a zero-initialised gain
                norm.load_state_dict({"weight": child.weight, "bias": child.bias})
            inside = [part for key, part in child.named_children() if key in ("drop", "act")]  # of timm's batch norms
            module.register_module(name, nn.Sequential(norm, *inside) if inside else norm)
        elif type(child) is nn.Conv2d:
            child.__class__ = StandardisedConv2d  # same parameters, same names
        else:
            without_batch_norm(child)
    return module


@torch.no_grad()
def folded(module: nn.Module) -> nn.Module:
    """A copy in which standardised layers are plain ones with the standardised weights: the same function."""
    plain = copy.deepcopy(module)
    for layer in plain.modules():
        if isinstance(layer, StandardisedConv2d | StandardisedLinear):
            layer.weight.copy_(standardised(layer.weight))
            ordinary: type[nn.Module] = nn.Conv2d if isinstance(layer, StandardisedConv2d) else nn.Linear
            layer.__class__ = ordinary  # type: ignore[assignment]
    return plain
