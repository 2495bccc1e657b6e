# SPDX-License-Identifier: Apache-2.0
"""What a query is told: an embedding of a word, a patch or a crop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConditionEncoder(nn.Linear):
    """(…, D) embeddings → (…, d), which is added to a query (UP-DETR's ``patch2query``, arXiv 2011.09094).

    Args:
        embed_dim: D.
        width: d.
        unit: embeddings live in the joint space of words and pictures, where only their direction means something: they
            become unit vectors times √D, so that their elements are of order one. Otherwise they are features of the
            backbone and come as they are.
    """

    def __init__(self, embed_dim: int, width: int, *, unit: bool) -> None:
        super().__init__(embed_dim, width)
        self.unit = unit

    def forward(self, embeddings: Tensor) -> Tensor:
        """See the class."""
        if self.unit:
            embeddings = F.normalize(embeddings.float(), dim=-1) * self.in_features**0.5
        return super().forward(embeddings)


class ClassCrops(nn.Module):
    """Embeddings of labelled things by class: what a query may be told in a word's place (OV-DETR, arXiv:2203.11876).

    They are computed anew for each training from its labelled pictures, and are no part of a checkpoint.

    Args:
        rows_RD: unit embeddings of crops.
        labels_R: class number of each.
        classes: C.
        share: of the words that are exchanged for a crop, where their class has one.
    """

    rows_RD: Tensor
    first_C: Tensor
    count_C: Tensor

    def __init__(self, *, rows_RD: Tensor, labels_R: Tensor, classes: int, share: float) -> None:
        super().__init__()
        self.share = share
        count = torch.bincount(labels_R, minlength=classes)
        self.register_buffer("rows_RD", rows_RD[labels_R.argsort(stable=True)], persistent=False)
        self.register_buffer("first_C", count.cumsum(0) - count, persistent=False)
        self.register_buffer("count_C", count, persistent=False)

    def mixed(self, words_MD: Tensor, classes_M: Tensor) -> Tensor:
        """The words' embeddings, some of them exchanged for a crop of their class; drawn from torch's generator."""
        count = self.count_C[classes_M]
        chosen = (torch.rand(len(count), device=count.device) * count).long().clamp(max=(count - 1).clamp(min=0))
        shown = (torch.rand(len(count), device=count.device) < self.share) & (count > 0)
        index = (self.first_C[classes_M] + chosen)[shown]
        told = words_MD.clone()
        told[shown] = self.rows_RD[index].to(told)
        return told
