# SPDX-License-Identifier: Apache-2.0
"""The loss of a region head on cached features: binary cross-entropy over the words.

Shapes: ``N`` regions of a batch, ``V`` words, ``D`` joint embedding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.data.pooled import RegionBatch
from ovd.modeling.fvlm.head import FrozenFeatureHead


class WordCriterion(nn.Module):
    """A head and its loss.

    Args:
        head: is trained.
        rows: (V, D) unit text embeddings.
        everywhere: so many of the first words weigh 1.
        noun_weight: weight of the other words.
    """

    def __init__(self, *, head: FrozenFeatureHead, rows: Tensor, everywhere: int, noun_weight: float) -> None:
        super().__init__()
        self.head = head
        weight_V = torch.full((len(rows),), noun_weight)
        weight_V[:everywhere] = 1.0
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("weight_V", weight_V, persistent=False)

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """The loss per region; a target of .4 means that four in ten such regions are right."""
        rows, weight_V = cast(Tensor, self.rows), cast(Tensor, self.weight_V)
        batch = batch.to(rows.device)
        out = self.head(batch.features, batch.known)
        logits_NV = self.head.scale * out.embedding @ rows.T + out.bias[:, None]
        each_NV = F.binary_cross_entropy_with_logits(logits_NV, batch.target, reduction="none")
        return {"loss_words": (each_NV * batch.mask * weight_V).sum(1).mean()}
