# SPDX-License-Identifier: Apache-2.0
"""BYOL (Grill et al., arXiv:2006.07733): predict the momentum network's projection of another view.

Particular to it: no negatives; a predictor on the online side only; the target is an exponential moving average of
encoder and projector, updated *after* the optimiser's step with a momentum that rises to 1 (§3.3); the loss is the sum
of both directions, 2 − 2cos each (eq. 2); the two views are drawn differently (table 6). Each view has a forward pass
of its own, so that batch norm sees one view at a time, as in the reference.

The second paper (Richemond et al., arXiv:2010.10241) shows that it is not batch norm that prevents collapse: the same
step with group norm and weight standardisation in encoder and heads. Here ``byol_gn`` builds both with
``norm="gn_ws"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.config_ssl import ByolMethod
from pretrain.data.crops import ViewBatch
from pretrain.losses import byol_regression
from pretrain.methods.base import Augment, HeadMemory, SelfSupervised, parameter_bytes, width_of
from pretrain.nets.ema import cosine_momentum, ema_update, flat_parameters, momentum_copy
from pretrain.nets.heads import mlp


class BYOL(SelfSupervised[ByolMethod]):
    """One step: two views in, regression loss out.

    Args:
        backbone: (N, 3, H, W) → (N, width), the online network.
        projector: (N, width) → (N, D).
        predictor: (N, D) → (N, D), online side only.
        augment: one function per view.
        momentum: of the moving average at the first step; it rises to 1 at the last.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        augment: Augment,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        self.predictor = predictor
        self.target_backbone, self.target_projector = momentum_copy(backbone), momentum_copy(projector)
        self.momentum = momentum

    @classmethod
    def build_projector(cls, config: ByolMethod, width: int) -> nn.Module:
        """Two layers; the second without norm (§3.3)."""
        return mlp([width, config.hidden, config.dim], norm=config.backbone.norm, bias=True)

    @classmethod
    def build_predictor(cls, config: ByolMethod) -> nn.Module:
        """Like the projector."""
        return mlp([config.dim, config.hidden, config.dim], norm=config.backbone.norm, bias=True)

    @classmethod
    def from_config(cls, config: ByolMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """See `SelfSupervised.from_config`."""
        return cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            predictor=cls.build_predictor(config),
            augment=augment,
            momentum=config.momentum,
        )

    @classmethod
    def head_memory(cls, config: ByolMethod, width: int) -> HeadMemory:
        """Both heads, and the momentum copy of the projector."""
        projector = parameter_bytes(cls.build_projector(config, width))
        trained = projector + parameter_bytes(cls.build_predictor(config))
        return HeadMemory(trained, extra=projector, extra_for="the momentum projector")

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, in [0, 8], and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = self.augmented(batch)
        z_a, z_b = self.project(a, b)
        with torch.no_grad():
            target_a = self.target_projector(self.target_backbone(a))
            target_b = self.target_projector(self.target_backbone(b))
        loss = byol_regression(self.predictor(z_a), target_b) + byol_regression(self.predictor(z_b), target_a)
        return loss, {}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Move the target, once per optimiser step (not per accumulation pass)."""
        momentum = cosine_momentum(step, total, base=self.momentum)
        ema_update(self.target_backbone, self.backbone, momentum=momentum)
        ema_update(self.target_projector, self.projector, momentum=momentum)

    def health(self) -> dict[str, Tensor]:
        """Projections of the last forward pass, and both networks' parameters."""
        return {
            **self._last,
            "online_parameters": flat_parameters(self.backbone, self.projector),
            "target_parameters": flat_parameters(self.target_backbone, self.target_projector),
        }
