# SPDX-License-Identifier: Apache-2.0
"""Norms beside plain batch norm: batch norm in parts, group norm with weight standardisation, and its folding.

Shapes: `N` samples, `C` channels, `O` outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 16  # channels are divided into so many groups (BYOL works without batch statistics, arXiv:2010.10241, §3.3)
EPSILON = 1e-5


def standardised(weight: Tensor) -> Tensor:
    """Weights (O, …) with mean 0 and variance 1 / fan-in per output (arXiv:1903.10520), in float32 at least.

    The division by the root of the fan-in keeps the outputs' size (arXiv:2101.08692, eq. 2); the group norm behind makes
    any such factor disappear but for its epsilon.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    flat = wide.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPSILON / flat.shape[1]).rsqrt() * flat.shape[1] ** -0.5
    return (centred * scale).view_as(weight).to(weight.dtype)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weights are standardised in each forward."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    """A linear layer whose weights are standardised in each forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, standardised(self.weight), self.bias)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 16 groups, or as many as divide the channels."""
    return nn.GroupNorm(next(g for g in range(min(GROUPS, channels), 0, -1) if channels % g == 0), channels)


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """Exchange batch norm for group norm and convolutions for standardised ones, in place; weights are kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new: nn.Module = group_norm(child.num_features)
            if child.affine:
                new.load_state_dict({"weight": child.weight.data, "bias": child.bias.data})
            setattr(module, name, new)
        elif isinstance(child, nn.Conv2d) and not isinstance(child, StandardisedConv2d):
            setattr(module, name, _conv_like(child, StandardisedConv2d))
        else:
            without_batch_statistics(child)
    return module


def fold_standardised(module: nn.Module) -> nn.Module:
    """Exchange standardised layers for plain ones with the weights they compute with, in place."""
    for name, child in module.named_children():
        if isinstance(child, StandardisedConv2d):
            plain: nn.Module = _conv_like(child, nn.Conv2d)
            plain.weight.data.copy_(standardised(child.weight.data))  # type: ignore[union-attr, operator]
            setattr(module, name, plain)
        elif isinstance(child, StandardisedLinear):
            plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            plain.load_state_dict({**child.state_dict(), "weight": standardised(child.weight.data)})
            setattr(module, name, plain)
        else:
            fold_standardised(child)
    return module


def _conv_like(conv: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    made = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    made.load_state_dict(conv.state_dict())
    return made


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics of each of several equal, consecutive parts of the batch, as on as many GPUs.

    Running statistics move once per forward, by the mean over the parts. In eval mode it is batch norm.
    """

    splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(input)
        if len(input) % self.splits:
            raise ValueError(f"{len(input)} samples cannot be split into {self.splits} equal parts")
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or self.momentum is None or self.num_batches_tracked is None:
            raise ValueError("split batch norm needs running statistics with a momentum")
        means, variances, out = [], [], []
        for part in input.chunk(self.splits):
            own_mean, own_var = mean.clone(), var.clone()
            out.append(F.batch_norm(part, own_mean, own_var, self.weight, self.bias, True, self.momentum, self.eps))
            means.append(own_mean)
            variances.append(own_var)
        with torch.no_grad():
            mean.copy_(torch.stack(means).mean(0))
            var.copy_(torch.stack(variances).mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(out)


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Exchange batch norm for the split form, in place; names, weights and buffers are kept."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            options: dict[str, Any] = {"eps": child.eps, "momentum": child.momentum, "affine": child.affine}
            new = SplitBatchNorm2d(child.num_features, **options)
            new.splits = splits
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            split_batch_norm(child, splits)
    return module
