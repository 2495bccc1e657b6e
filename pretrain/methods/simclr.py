# SPDX-License-Identifier: Apache-2.0
"""SimCLR (Chen et al., arXiv:2002.05709): contrast two views of a picture with all other views of the batch.

Particular to it: every other view of the global batch is a negative (algorithm 1), with the gradient flowing through
the gather; both views pass the network together, so that batch norm sees 2N pictures; the projector ends with a batch
norm that has a gain and no shift, as in the authors' code; large batches are trained with LARS, and the learning rate
follows the batch linearly or by its root (appendix B.1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.config_ssl import SimCLRMethod
from pretrain.data.crops import ViewBatch
from pretrain.losses import nt_xent
from pretrain.methods.base import Augment, SelfSupervised, width_of
from pretrain.nets.heads import mlp


class SimCLR(SelfSupervised[SimCLRMethod]):
    """One step: two views in, NT-Xent out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        augment: one function per view.
        temperature: of the softmax.
    """

    def __init__(
        self, *, backbone: nn.Module, projector: nn.Module, augment: Augment, temperature: float = 0.1
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        self.temperature = temperature

    @classmethod
    def build_projector(cls, config: SimCLRMethod, width: int) -> nn.Module:
        """Two layers with batch norm after both."""
        return mlp([width, config.hidden, config.dim], last_norm="scale", init_std=0.01)

    @classmethod
    def from_config(cls, config: SimCLRMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """See `SelfSupervised.from_config`."""
        return cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            augment=augment,
            temperature=config.temperature,
        )

    @classmethod
    def learning_rate(cls, config: SimCLRMethod, lr: float, *, batch_size: int) -> float:
        """Scaled by the config's rule."""
        return scaled_lr(lr, batch_size, rule=config.lr_rule)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = self.augmented(batch)
        z_a, z_b = self.projector(self.backbone(torch.cat([a, b]))).chunk(2)
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return nt_xent(z_a, z_b, temperature=self.temperature), {}


def scaled_lr(lr: float, batch_size: int, *, rule: Literal["none", "linear", "sqrt"]) -> float:
    """The learning rate of a batch size (appendix B.1): ``lr · B / 256`` or ``lr · √B``."""
    return lr * {"none": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}[rule]
