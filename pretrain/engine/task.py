# SPDX-License-Identifier: Apache-2.0
"""A task of the training loop: a module that returns its loss, with hooks that do nothing unless overridden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup, default_groups


class Task(nn.Module):
    """Base class of everything that `pretrain.engine.loop.fit` trains.

    What a task carries from step to step (queues, momentum copies, pointers) are its buffers and submodules; buffers
    are changed in place.

    Attributes:
        untracked: prefixes of state that checkpoints leave out, because the caller rebuilds it (a frozen teacher).
        find_unused_parameters: for DistributedDataParallel: some parameters get no gradient in some steps.
        check_samples: samples that suffice for the step of ``--check``; where there is no GPU it takes no more.
    """

    untracked: tuple[str, ...] = ()
    find_unused_parameters: bool = False
    check_samples: int = 16

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Scalar loss, and metrics by name."""
        raise NotImplementedError

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """Parameter groups of the optimiser; by default matrices with weight decay, vectors without."""
        return default_groups(self.named_parameters(), weight_decay=optim.weight_decay)

    def after_backward(self, step: int) -> None:
        """Once per step when the gradients are complete; it may drop some (``grad = None``), which skips the update."""

    def after_step(self, step: int, total: int) -> None:
        """After each optimiser step that changed weights (EMA, clamps); ``step`` counts from 0."""

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Values for the next log line, the same in every process, and warnings; called in every process."""
        return {}, []

    def health(self) -> Mapping[str, Tensor]:
        """Detached tensors of the last forward pass, for `pretrain.health.panel`; empty: nothing to measure."""
        return {}

    def upgrade(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Bring the state dictionary of an older version up to date before it is loaded."""
        return dict(state)
