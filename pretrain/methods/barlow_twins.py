# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins (Zbontar et al., arXiv:2103.03230): the correlation of two views' features becomes the identity.

Particular to it: the loss compares features, not pictures: each should correlate with itself across the views and with
no other (eq. 1); the correlation is taken over the global batch; the projector is wide; biases and norms have a
learning rate of their own and neither decay nor LARS (the authors' code). Each view has a forward pass of its own.

The authors' all-reduce of the correlation has no gradient, so on W GPUs theirs is 1/W of the true one. LARS hides this
for the weights, but not for biases and norms, whose learning rate was tuned with it. ``gradient_scale`` restores it.
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Self

from pretrain.config_ssl import BarlowTwinsMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.losses import barlow_twins
from pretrain.methods.base import Augment, HeadMemory, SelfSupervised, parameter_bytes, width_of
from pretrain.nets.heads import mlp


class BarlowTwins(SelfSupervised[BarlowTwinsMethod]):
    """One step: two views in, redundancy reduction out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        augment: one function per view.
        lambd: weight of the off-diagonal terms.
        bias_lr_ratio: learning rate of biases and norms, in units of that of the weights.
        gradient_scale: see `pretrain.losses.barlow_twins`.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        augment: Augment,
        lambd: float = 0.0051,
        bias_lr_ratio: float = 0.024,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        self.lambd, self.bias_lr_ratio, self.gradient_scale = lambd, bias_lr_ratio, gradient_scale

    @classmethod
    def build_projector(cls, config: BarlowTwinsMethod, width: int) -> nn.Module:
        """Wide layers; the norm at the end is in the loss."""
        return mlp([width, *config.dims])

    @classmethod
    def from_config(cls, config: BarlowTwinsMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """See `SelfSupervised.from_config`."""
        return cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            augment=augment,
            lambd=config.lambd,
            bias_lr_ratio=config.bias_lr_ratio,
            gradient_scale=config.gradient_scale,
        )

    @classmethod
    def head_memory(cls, config: BarlowTwinsMethod, width: int) -> HeadMemory:
        """The projector, and the correlation matrix with its gradient and its square."""
        trained = parameter_bytes(cls.build_projector(config, width))
        return HeadMemory(trained, extra=3 * 4 * config.dims[-1] ** 2, extra_for="the correlation matrix")

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        z_a, z_b = self.project(*self.augmented(batch))
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
