# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins (Zbontar et al., arXiv:2103.03230): the correlation of two views' features becomes the identity.

Particular to it: the loss looks at features, not at pictures: each is to agree with itself across the views and with
no other (eq. 1), with the correlation taken over the global batch; the projector is wide; biases and norms have a
learning rate of their own and neither decay nor LARS (the authors' code). The views pass one by one.

The authors' all-reduce of the correlation has no gradient of its own, so that on W GPUs theirs is 1/W of the true one.
LARS hides that for the weights, not for biases and norms: their rate was tuned to it. ``gradient_scale`` gives it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.engine.task import Task
from pretrain.losses import barlow_twins
from pretrain.methods.common import augmented


class BarlowTwins(Task):
    """One step: two views in, redundancy reduction out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        augment: One function per view.
        lambd: Weight of the off-diagonal terms.
        bias_lr_ratio: Learning rate of biases and norms, in units of that of the weights.
        gradient_scale: See `pretrain.losses.barlow_twins`.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        augment: Sequence[Callable[[Tensor], Tensor]],
        lambd: float = 0.0051,
        bias_lr_ratio: float = 0.024,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if len(augment) != 2:
            raise ValueError(f"Barlow Twins compares two views, not {len(augment)}")
        self.backbone, self.projector, self.augment = backbone, projector, augment
        self.lambd, self.bias_lr_ratio, self.gradient_scale = lambd, bias_lr_ratio, gradient_scale
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = augmented(batch, self.augment)
        z_a, z_b = self.projector(self.backbone(a)), self.projector(self.backbone(b))
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return barlow_twins(z_a, z_b, lambd=self.lambd, gradient_scale=self.gradient_scale), {}

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """Weights; biases and norms with their own rate, no decay and no LARS."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
            {
                "params": [p for p in trained if p.ndim <= 1],
                "weight_decay": 0.0,
                "lr_scale": self.bias_lr_ratio,
                "lars_exclude": True,
            },
        ]

    def health(self) -> dict[str, Tensor]:
        """What the panel needs of the last forward."""
        return self._last
