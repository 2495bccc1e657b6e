# SPDX-License-Identifier: Apache-2.0
"""Classification of regions by embeddings: the rows are texts, image patches or crops.

Shapes: ``R`` regions, ``C`` classes, ``D`` joint embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NovelLabelError(RuntimeError):
    """A label reached the loss whose class must never be seen in training: the data set's split leaks."""


def cosine_logits(regions_RD: Tensor, rows: Tensor, *, scale: float) -> Tensor:
    """(R, C) of ``scale · cos``; rows are unit vectors, (C, D) for all regions or (R, C, D) for each its own.

    float32 whatever the autocast state: at a scale of 100 a logit of bfloat16 moves in steps of a half.
    """
    with torch.autocast(regions_RD.device.type, enabled=False):
        region, rows = F.normalize(regions_RD.float(), dim=1), rows.float()
        if rows.ndim == 3:
            return scale * torch.einsum("rd,rcd->rc", region, rows)
        return scale * region @ rows.T


class EmbeddingClassifier(nn.Module):
    """``logit = scale · cos(region, row)`` over frozen class rows, with a learned background row in the last column.

    ViLD (arXiv 2104.13921, eq. 2): region embedding, frozen text embeddings and learned background embedding are all
    L2-normalised; the temperature is .01, so ``scale`` is 100. The rows are a buffer, not a parameter: neither weight
    decay nor the optimiser may touch them. Excluded (novel) columns get −inf while training, instead of the ×0 of the
    released code, which only works because the competing logits happen to be large.

    Args:
        rows: (C, D) class embeddings, any norm > 0.
        trainable: (C,) bool, False for classes that training must not use; None means all.
        scale: inverse temperature.
    """

    rows: Tensor
    trainable: Tensor

    def __init__(self, *, rows: Tensor, trainable: Tensor | None = None, scale: float = 100.0) -> None:
        super().__init__()
        if rows.ndim != 2:
            raise ValueError(f"rows must be (C, D), got {tuple(rows.shape)}")
        keep = torch.ones(len(rows), dtype=torch.bool) if trainable is None else trainable.bool()
        if keep.shape != rows.shape[:1]:
            raise ValueError(f"trainable must be ({len(rows)},), got {tuple(keep.shape)}")
        self.register_buffer("rows", F.normalize(rows.float(), dim=1))
        self.register_buffer("trainable", keep)
        self.background = nn.Parameter(torch.empty(rows.shape[1]))
        nn.init.normal_(self.background, std=0.01)  # released code: N(0, .01)
        self.scale = float(scale)

    @property
    def num_classes(self) -> int:
        """Number of class rows; the background's index equals it."""
        return len(self.rows)

    def forward(self, regions_RD: Tensor) -> Tensor:
        """Logits (R, C+1), background last; float32 whatever the autocast state."""
        background = F.normalize(self.background.float(), dim=0)
        logits = cosine_logits(regions_RD, torch.cat([self.rows, background[None]]), scale=self.scale)
        if self.training and not bool(self.trainable.all()):
            logits = logits.masked_fill(~F.pad(self.trainable, (0, 1), value=True), float("-inf"))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean softmax cross-entropy over regions (0 for none).

        Args:
            logits: (R, C+1) of :meth:`forward`.
            labels: (R,) int64, ``num_classes`` for background.

        Raises:
            NovelLabelError: a label names an excluded class; its loss would be infinite.
        """
        if len(labels) == 0:
            return logits.sum() * 0.0
        leaked = labels[labels < self.num_classes]
        leaked = leaked[~self.trainable[leaked]]
        if len(leaked):
            names = sorted(set(leaked.tolist()))[:5]
            raise NovelLabelError(
                f"labels of classes {names} reached the training loss, but the split keeps them out of training; "
                "remove their annotations from the training set or change the split"
            )
        return F.cross_entropy(logits, labels)
