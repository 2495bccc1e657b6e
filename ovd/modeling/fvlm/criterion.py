# SPDX-License-Identifier: Apache-2.0
"""The losses of a region head on cached features: binary cross-entropy over the words, and ViLD's distillation.

Shapes: ``N`` regions of a batch, ``M`` offline regions of it, ``V`` words, ``D`` joint embedding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.data.pooled import BoxBatch, OfflineBatch, RegionBatch
from ovd.modeling.distillation import l1_distillation
from ovd.modeling.fvlm.network import FvlmDetector
from ovd.modeling.fvlm.quality import LocalizationQuality, geometry
from pretrain.engine.distributed import shares

OVERLAPS = 0.2
"""IoU with a label from which on a box has a localisation quality; with .1 and .3 unseen objects are ranked worse."""


class WordCriterion(nn.Module):
    """A detector's heads and their losses.

    Args:
        model: whose heads are trained.
        rows: (V, D) unit text embeddings.
        always_labelled: number of the first words, those labelled in every photo they are in; they weigh 1.
        noun_weight: weight of the other words.
        image_weight: weight of the distillation; None: nothing is distilled.
    """

    def __init__(
        self,
        *,
        model: FvlmDetector,
        rows: Tensor,
        always_labelled: int,
        noun_weight: float,
        image_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.quality = model.quality  # not a part of the model's own tensors
        self.image_weight = image_weight
        weight_V = torch.full((len(rows),), noun_weight)
        weight_V[:always_labelled] = 1.0
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("weight_V", weight_V, persistent=False)

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Losses per region; a target is the probability that the region is the word."""
        rows, weight_V = cast(Tensor, self.rows), cast(Tensor, self.weight_V)
        batch = batch.to(rows.device)
        head = self.model.head
        out = head(batch.features, batch.word_scores)
        logits_NV = head.scale * out.embedding @ rows.T + out.bias[:, None]
        each_NV = F.binary_cross_entropy_with_logits(logits_NV, batch.target, reduction="none")
        losses = {"loss_words": (each_NV * batch.mask * weight_V).sum(1).mean()}
        if self.image_weight is not None:
            assert batch.offline is not None, "distillation needs offline regions"
            losses["loss_image"] = self.image_weight * self._distillation(batch.offline)
        if self.quality is not None:
            assert batch.boxes is not None, "localisation quality needs boxes"
            losses["loss_quality"] = self._quality_loss(self.quality, batch.features, batch.boxes)
        return losses

    @staticmethod
    def _quality_loss(quality: LocalizationQuality, features_NF: Tensor, of: BoxBatch) -> Tensor:
        """Of boxes that overlap a label; others are no background (OLN, section 3.1)."""
        overlaps = of.quality >= OVERLAPS
        count = overlaps.sum()
        (share,) = shares([float(count)])
        logits_N = quality(features_NF, geometry(of.boxes, of.sizes))
        each_N = F.binary_cross_entropy_with_logits(logits_N, of.quality, reduction="none")
        return share * (each_N * overlaps).sum() / count.clamp(min=1)

    def _distillation(self, offline: OfflineBatch) -> Tensor:
        """ViLD-image of the image head, or of the head that learns words (ViLD) where there is none."""
        if self.model.image_head is None:
            no_words_M0 = offline.features.new_zeros(len(offline.features), 0)
            embedding_MD = self.model.head(offline.features, no_words_M0).embedding
        else:
            embedding_MD = self.model.image_embedding(offline.features)
        return l1_distillation(embedding_MD, offline.target)
