# SPDX-License-Identifier: Apache-2.0
"""Projection and prediction heads of all self-supervised methods: one perceptron with the papers' variations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn

from pretrain.nets.standardised import StandardisedLinear, group_norm

Norm = Literal["bn", "gn_ws", "none"]
LastNorm = Literal["none", "scale", "plain"]
GROUP_OF_UNITS = 8  # at least so many units of a layer in a group: one alone would always be normalised to 0


def mlp(
    dims: Sequence[int],
    *,
    norm: Norm = "bn",
    bias: bool = False,
    last_bias: bool = False,
    last_norm: LastNorm = "none",
    init_std: float | None = None,
) -> nn.Sequential:
    """Linear layers with norm and ReLU between them: (N, dims[0]) to (N, dims[-1]).

    Args:
        dims: lengths of input, hidden layers, output.
        norm: between the layers. ``gn_ws``: group norm, and standardised weights in the layers before it.
        bias: of the layers before the last.
        last_bias: of the last layer.
        last_norm: batch norm at the end: ``scale`` has a gain and no shift (SimCLR's code), ``plain`` neither (SimSiam,
            §3 "baseline settings").
        init_std: normal initialisation of the weights; None: torch's.

    Raises:
        ValueError: fewer than two lengths.
    """
    if len(dims) < 2:
        raise ValueError(f"a head needs an input and an output length, got {list(dims)}")
    layers: list[nn.Module] = []
    for number, (inside, outside) in enumerate(itertools.pairwise(dims)):
        last = number == len(dims) - 2
        kind = StandardisedLinear if norm == "gn_ws" and not last else nn.Linear
        linear = kind(inside, outside, bias=last_bias if last else bias)
        if init_std is not None:
            nn.init.normal_(linear.weight, std=init_std)
        layers.append(linear)
        if last:
            continue
        if norm == "bn":
            layers.append(nn.BatchNorm1d(outside))
        elif norm == "gn_ws":
            layers.append(group_norm(outside, least=GROUP_OF_UNITS))
        layers.append(nn.ReLU(inplace=True))
    if last_norm != "none":
        end = nn.BatchNorm1d(dims[-1], affine=last_norm == "scale")
        if last_norm == "scale":
            end.bias.requires_grad_(False)
        layers.append(end)
    return nn.Sequential(*layers)
