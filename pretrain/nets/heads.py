# SPDX-License-Identifier: Apache-2.0
"""Projectors and predictors: small networks between the backbone and the loss, dropped after pretraining."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from pretrain.engine.errors import UserError
from pretrain.nets.norms import StandardisedLinear, group_norm

Norm = Literal["bn", "gn_ws", "none"]
Affine = Literal["full", "scale", "none"]


def mlp(
    dims: Sequence[int],
    *,
    norm: Norm = "bn",
    bias: bool = False,
    last_bias: bool | None = None,
    last_norm: bool = False,
    last_affine: Affine = "full",
    init_std: float | None = None,
) -> nn.Sequential:
    """Linear layers with norm and ReLU between them, (N, dims[0]) → (N, dims[-1]).

    Args:
        dims: Lengths: input, hidden layers, output.
        norm: After each linear layer but the last. "gn_ws": group norm, and the layers before it weight-standardised.
        bias: Whether the linear layers but the last have one.
        last_bias: Whether the last one has; None: as the others.
        last_norm: Whether a norm of the same kind, without ReLU, ends the network.
        last_affine: That norm's gain and shift: both, the gain alone, or neither.
        init_std: Standard deviation of the normal distribution that weights begin with; None: torch's default.
    """
    layers: list[nn.Module] = []
    last = len(dims) - 2
    for number, (inside, outside) in enumerate(pairwise(dims)):
        normed = norm != "none" and (number < last or last_norm)
        has_bias = bias if number < last or last_bias is None else last_bias
        kind = StandardisedLinear if normed and norm == "gn_ws" else nn.Linear
        linear = kind(inside, outside, bias=has_bias)
        if init_std is not None:
            nn.init.normal_(linear.weight, std=init_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        layers.append(linear)
        if normed:
            layers.append(_norm(norm, outside, "full" if number < last else last_affine))
        if number < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _norm(norm: Norm, width: int, affine: Affine) -> nn.Module:
    if norm == "bn":
        made: nn.BatchNorm1d | nn.GroupNorm = nn.BatchNorm1d(width, affine=affine != "none")
    else:
        made = group_norm(width)
        if affine == "none":
            made = nn.GroupNorm(made.num_groups, width, affine=False)
    if affine == "scale":
        made.bias.requires_grad_(False)  # it begins at 0 and stays there
    return made


def simclr_projector(width: int, *, hidden: int, dim: int, layers: int = 2) -> nn.Sequential:
    """SimCLR's, as in the authors' code: no biases, batch norm everywhere, the last one without shift; N(0, .01)."""
    dims = [width, *[hidden] * (layers - 1), dim]
    return mlp(dims, bias=False, last_norm=True, last_affine="scale", init_std=0.01)


def moco_head(width: int, *, dim: int, kind: Literal["linear", "mlp"]) -> nn.Sequential:
    """v1: one linear layer; v2: two with ReLU between (arXiv:2003.04297); biases, no norm."""
    return mlp([width, dim] if kind == "linear" else [width, width, dim], norm="none", bias=True)


def byol_head(inside: int, *, hidden: int, dim: int, norm: Norm = "bn") -> nn.Sequential:
    """BYOL's projector and predictor: bias, norm, ReLU, then a layer without bias (authors' code)."""
    return mlp([inside, hidden, dim], norm=norm, bias=True, last_bias=False)


def swav_projector(width: int, *, hidden: int, dim: int) -> nn.Sequential:
    """SwAV's: two layers with biases, batch norm between (authors' code)."""
    return mlp([width, hidden, dim], bias=True)


def simsiam_projector(width: int, *, dim: int, layers: int = 3) -> nn.Sequential:
    """SimSiam's: no biases, the last batch norm without gain and shift (arXiv:2011.10566, §3 and the authors' code)."""
    return mlp([width, *[dim] * layers], bias=False, last_norm=True, last_affine="none")


def simsiam_predictor(dim: int, *, bottleneck: int) -> nn.Sequential:
    """SimSiam's: a bottleneck; the last layer has a bias and no norm (arXiv:2011.10566, §4.4 and appendix B)."""
    return mlp([dim, bottleneck, dim], bias=False, last_bias=True)


def barlow_projector(width: int, *, widths: Sequence[int]) -> nn.Sequential:
    """Barlow Twins': no biases; the norm behind the last layer is part of the loss (authors' code)."""
    return mlp([width, *widths], bias=False)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_projector_fits(
    dims: Sequence[int], *, device: torch.device, copies: int = 3, correlation: bool = False
) -> None:
    """Refuse a projector that memory cannot hold, before it is made.

    Args:
        dims: As `mlp`'s.
        device: Where it is trained.
        copies: Of each weight: itself, its gradient, the optimiser's state.
        correlation: Whether the loss makes a D x D matrix; it needs three of them (itself, its square, its gradient).

    Raises:
        UserError: With the sizes.
    """
    weights = sum(a * b for a, b in pairwise(dims))
    matrix = 3 * dims[-1] ** 2 if correlation else 0
    needed, there = 4 * (copies * weights + matrix), free_memory(device)
    if needed <= there:
        return
    text = f"the projector {' x '.join(map(str, dims))} has {weights:,} weights, which need {4 * copies * weights / 1e9:.1f} GB"
    if correlation:
        text += f"; its {dims[-1]} x {dims[-1]} correlation needs {4 * matrix / 1e9:.1f} GB"
    raise UserError(
        f"method: {text}: {needed / 1e9:.1f} GB in all, but {device} has {there / 1e9:.1f} GB; make its layers narrower "
        "(method.projector, method.hidden or method.dim)"
    )
