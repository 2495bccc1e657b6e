# SPDX-License-Identifier: Apache-2.0
"""SimSiam (Chen & He, arXiv:2011.10566): predict the other view's projection, whose gradient is stopped.

Particular to it: no negatives, no slow network and no large batch: the stop-gradient alone (algorithm 1, §4.1). The
projector's last batch norm has no affine part, the predictor is a bottleneck whose learning rate does not decay
(appendix B). The views pass one by one: batch norm sees one view at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.engine.task import Task
from pretrain.losses import negative_cosine
from pretrain.methods.common import augmented


class SimSiam(Task):
    """One step: two views in, symmetrised negative cosine out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        predictor: (N, D) → (N, D).
        augment: One function per view.
        constant_predictor_lr: The predictor keeps the first learning rate.
        stop_gradient: False shows the collapse of table 1; nobody else wants it.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        augment: Sequence[Callable[[Tensor], Tensor]],
        constant_predictor_lr: bool = True,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        if len(augment) != 2:
            raise ValueError(f"SimSiam compares two views, not {len(augment)}")
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.augment = augment
        self.constant_predictor_lr, self.stop_gradient = constant_predictor_lr, stop_gradient
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, in [-1, 1], and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = augmented(batch, self.augment)
        z_a, z_b = self.projector(self.backbone(a)), self.projector(self.backbone(b))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        if self.stop_gradient:
            z_a, z_b = z_a.detach(), z_b.detach()
        return (negative_cosine(p_a, z_b) + negative_cosine(p_b, z_a)) / 2, {}

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """Weight decay on everything, biases and norms too (appendix A); the predictor in a group of its own."""
        main = [*self.backbone.parameters(), *self.projector.parameters()]
        return [
            {"params": [p for p in main if p.requires_grad], "weight_decay": optim.weight_decay},
            {
                "params": list(self.predictor.parameters()),
                "constant_lr": self.constant_predictor_lr,
                "weight_decay": optim.weight_decay,
            },
        ]

    def health(self) -> dict[str, Tensor]:
        """What the panel needs of the last forward."""
        return self._last
