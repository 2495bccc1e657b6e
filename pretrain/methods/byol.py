# SPDX-License-Identifier: Apache-2.0
"""BYOL (Grill et al., arXiv:2006.07733): predict what a slow copy of the network says of another view.

Particular to it: no negatives; a predictor on the online side only; the target is an exponential moving average of
encoder and projector, updated *after* the optimiser's step with a momentum that rises to 1 (§3.3); the loss is the sum
of both directions, 2 − 2cos each (eq. 2); the two views are drawn differently (table 6). Views pass one by one, so that
batch norm sees one view at a time, as in the reference.

The second paper (Richemond et al., arXiv:2010.10241) shows that it is not batch norm that prevents collapse: the same
step with group norm and weight standardisation in encoder and heads. Here that is a matter of the parts given:
``byol_gn`` builds them with ``norm="gn_ws"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.engine.task import Task
from pretrain.losses import byol_regression
from pretrain.methods.common import augmented
from pretrain.nets.ema import cosine_momentum, ema_update, flat_parameters, slow_copy


class BYOL(Task):
    """One step: two views in, regression loss out.

    Args:
        backbone: (N, 3, H, W) → (N, width), the online network.
        projector: (N, width) → (N, D).
        predictor: (N, D) → (N, D), online side only.
        augment: One function per view.
        momentum: Of the moving average at the first step; it rises to 1 at the last.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        augment: Sequence[Callable[[Tensor], Tensor]],
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        if len(augment) != 2:
            raise ValueError(f"BYOL compares two views, not {len(augment)}")
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.target_backbone, self.target_projector = slow_copy(backbone), slow_copy(projector)
        self.augment, self.momentum = augment, momentum
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, in [0, 8], and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = augmented(batch, self.augment)
        z_a, z_b = self.projector(self.backbone(a)), self.projector(self.backbone(b))
        with torch.no_grad():
            target_a = self.target_projector(self.target_backbone(a))
            target_b = self.target_projector(self.target_backbone(b))
        loss = byol_regression(self.predictor(z_a), target_b) + byol_regression(self.predictor(z_b), target_a)
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return loss, {}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Move the target, once per optimiser step (not per accumulation pass)."""
        momentum = cosine_momentum(step, total, base=self.momentum)
        ema_update(self.target_backbone, self.backbone, momentum=momentum)
        ema_update(self.target_projector, self.projector, momentum=momentum)

    def health(self) -> dict[str, Tensor]:
        """What the panel needs of the last forward."""
        online = torch.cat([flat_parameters(self.backbone), flat_parameters(self.projector)])
        target = torch.cat([flat_parameters(self.target_backbone), flat_parameters(self.target_projector)])
        return {**self._last, "online_parameters": online, "target_parameters": target}
