# SPDX-License-Identifier: Apache-2.0
"""What a query is told: an embedding of a word, a patch or a crop."""

from __future__ import annotations

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
