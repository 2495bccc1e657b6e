# SPDX-License-Identifier: Apache-2.0
"""SimCLR (Chen et al., arXiv:2002.05709): two views of a picture find each other among all views of the batch.

Particular to it: every other view of the global batch is a negative (algorithm 1), with the gradient flowing through
the gather; both views pass the network together, so that batch norm sees 2N pictures; the projector ends with a batch
norm that has a gain and no shift, as in the authors' code; large batches are trained with LARS, and the learning rate
follows the batch linearly or by its root (appendix B.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.engine.task import Task
from pretrain.losses import nt_xent
from pretrain.methods.common import augmented


class SimCLR(Task):
    """One step: two views in, NT-Xent out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        augment: One function per view.
        temperature: Of the softmax.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        augment: Sequence[Callable[[Tensor], Tensor]],
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if len(augment) != 2:
            raise ValueError(f"SimCLR compares two views, not {len(augment)}")
        self.backbone, self.projector = backbone, projector
        self.augment, self.temperature = augment, temperature
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8.
        """
        a, b = augmented(batch, self.augment)
        z_a, z_b = self.projector(self.backbone(torch.cat([a, b]))).chunk(2)
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return nt_xent(z_a, z_b, temperature=self.temperature), {}

    def health(self) -> dict[str, Tensor]:
        """What the panel needs of the last forward."""
        return self._last


def scaled_lr(lr: float, batch_size: int, *, rule: Literal["none", "linear", "sqrt"]) -> float:
    """The learning rate of a batch size (appendix B.1): ``lr · B / 256`` or ``lr · √B``."""
    return lr * {"none": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}[rule]
