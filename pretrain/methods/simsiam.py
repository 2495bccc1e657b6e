# SPDX-License-Identifier: Apache-2.0
"""SimSiam (Chen & He, arXiv:2011.10566): predict the other view's projection, whose gradient is stopped.

Particular to it: no negatives, no momentum network and no large batch: the stop-gradient alone (algorithm 1, §4.1). The
projector's last batch norm has no affine part, the predictor is a bottleneck whose learning rate does not decay
(appendix B). Each view has a forward pass of its own: batch norm sees one view at a time.
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Self

from pretrain.config_ssl import SimSiamMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.losses import negative_cosine
from pretrain.methods.base import Augment, HeadMemory, SelfSupervised, parameter_bytes, width_of
from pretrain.nets.heads import mlp


class SimSiam(SelfSupervised[SimSiamMethod]):
    """One step: two views in, symmetrised negative cosine out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        predictor: (N, D) → (N, D).
        augment: one function per view.
        constant_predictor_lr: the predictor keeps the first learning rate.
        stop_gradient: False reproduces the collapse of table 1.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        augment: Augment,
        constant_predictor_lr: bool = True,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        self.predictor = predictor
        self.constant_predictor_lr, self.stop_gradient = constant_predictor_lr, stop_gradient

    @classmethod
    def build_projector(cls, config: SimSiamMethod, width: int) -> nn.Module:
        """Layers of one width, batch norm after each, the last without affine part (§3)."""
        return mlp([width, *[config.dim] * config.layers], last_norm="plain")

    @classmethod
    def build_predictor(cls, config: SimSiamMethod) -> nn.Module:
        """A bottleneck (§3)."""
        return mlp([config.dim, config.hidden, config.dim], last_bias=True)

    @classmethod
    def from_config(cls, config: SimSiamMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """See `SelfSupervised.from_config`."""
        return cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            predictor=cls.build_predictor(config),
            augment=augment,
            constant_predictor_lr=config.constant_predictor_lr,
        )

    @classmethod
    def head_memory(cls, config: SimSiamMethod, width: int) -> HeadMemory:
        """Both heads."""
        heads = (cls.build_projector(config, width), cls.build_predictor(config))
        return HeadMemory(sum(parameter_bytes(head) for head in heads))

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, in [-1, 1], and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        z_a, z_b = self.project(*self.augmented(batch))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
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
