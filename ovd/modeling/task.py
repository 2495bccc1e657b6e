# SPDX-License-Identifier: Apache-2.0
"""A detector as a task of the training loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.engine.task import Task


class DetectionTask(Task):
    """Sums a detector's losses and groups its parameters.

    Args:
        model: returns a dict of losses in training mode.
        pretrained_prefixes: parameter prefixes that started pretrained.
        pretrained_lr_scale: their learning-rate factor.
    """

    check_samples = 1  # one of a megapixel, as in the papers' recipes, takes half a minute on a CPU

    def __init__(self, *, model: nn.Module, pretrained_prefixes: tuple[str, ...], pretrained_lr_scale: float) -> None:
        super().__init__()
        self.model = model
        self.pretrained_prefixes = pretrained_prefixes
        self.pretrained_lr_scale = pretrained_lr_scale

    def forward(self, batch: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of the losses, each loss detached)."""
        losses: dict[str, Tensor] = self.model(batch)
        total = sum(losses.values())
        assert isinstance(total, Tensor)
        return total, {name: value.detach() for name, value in losses.items()}

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """Groups by (started pretrained, weight decay); one-dimensional parameters are not decayed."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                key = (name.startswith(self.pretrained_prefixes), parameter.ndim > 1)
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": optim.weight_decay if decayed else 0.0,
                "lr_scale": self.pretrained_lr_scale if pretrained else 1.0,
            }
            for (pretrained, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]
