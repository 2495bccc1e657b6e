# SPDX-License-Identifier: Apache-2.0
"""Momentum copy of a network: exponential moving average of the parameters, never of the buffers.

The copy runs in training mode with batch statistics of its own, as in the references of MoCo and BYOL; so its running
statistics are its own, too.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def momentum_copy(module: ModuleT) -> ModuleT:
    """A copy that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """``target = momentum · target + (1 − momentum) · online``, parameter by parameter; buffers stay."""
    averaged: list[Tensor] = list(target.parameters())
    current: list[Tensor] = list(online.parameters())
    if len(averaged) != len(current):
        raise ValueError(f"{len(averaged)} parameters of the target, {len(current)} of the online network")
    torch._foreach_lerp_(averaged, current, 1 - momentum)


def cosine_momentum(step: int, total: int, *, base: float) -> float:
    """BYOL's schedule (arXiv:2006.07733, §3.3): ``base`` at step 0, rising to 1 at ``total`` along a cosine."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2


def flat_parameters(*modules: nn.Module) -> Tensor:
    """All parameters of the modules as one detached vector."""
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])
