# SPDX-License-Identifier: Apache-2.0
"""The region head of `model.arch: fvlm`: what is learned on top of the frozen tower.

A word's logit is ``scale · cos(region, word) + bias(region)``, and its sigmoid the probability that the region is that
word *and* a good box of it: no word competes with another, so that "dog", "animal" and "golden retriever" may all hold.
The bias depends on the region and acts as its objectness. Boxes stay the proposal network's: a regressor on these
features, trained on a teacher's boxes, made them worse.

Shapes: ``P`` regions, ``F`` pooled features, ``K`` words that the proposal network knows, ``D`` joint embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

START_BIAS = -6.0
"""At the start hardly any (region, word) pair is right (RetinaNet's prior, arXiv:1708.02002, section 4.1)."""
WORD_EPS = 3e-4
"""The proposal network's scores enter as logits between ±8."""


class HeadOutputs(NamedTuple):
    """Outputs for each region.

    Attributes:
        embedding: (P, D) unit rows.
        bias: (P,) logit of any word beside its cosine.
    """

    embedding: Tensor
    bias: Tensor


class HiddenLayers(nn.Sequential):
    """Two, each with its dropout: (P, inputs) to (P, hidden), float32. Its weights may be of another precision."""

    def __init__(self, inputs: int, hidden: int, *, dropout: float) -> None:
        super().__init__(
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = super().forward(x.to(next(self.parameters()).dtype))
        return hidden.float()


class FrozenFeatureHead(nn.Module):
    """Two hidden layers on pooled features and on the proposal network's scores of words.

    Args:
        features: F.
        words: K; 0: the proposal network's scores are not read.
        hidden: units of each hidden layer.
        embed_dim: D.
        dropout: after each hidden layer.
        scale: inverse temperature at the start.
    """

    def __init__(self, *, features: int, words: int, hidden: int, embed_dim: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.words = words
        self.norm = nn.BatchNorm1d(features + words, affine=False)
        self.layers = HiddenLayers(features + words, hidden, dropout=dropout)
        self.projection = nn.Linear(hidden, embed_dim)
        self.bias = nn.Linear(hidden, 1)
        nn.init.zeros_(self.bias.weight)
        nn.init.constant_(self.bias.bias, START_BIAS)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, ()."""
        return self.logit_scale.exp()

    def forward(self, features_PF: Tensor, words_PK: Tensor) -> HeadOutputs:
        inputs = [features_PF.float()]
        if self.words:
            inputs.append(words_PK.float().logit(eps=WORD_EPS))
        hidden = self.layers(self.norm(torch.cat(inputs, dim=1)))
        embedding = F.normalize(self.projection(hidden).float(), dim=1)
        return HeadOutputs(embedding, self.bias(hidden).float()[:, 0])


class ImageHead(nn.Module):
    """Predicts the encoder's embedding of a region's crop: its projection of the map in the box, plus a correction.

    A map pooled in a box is a worse embedding than that of a crop which the whole tower saw (F-VLM against CLIP on
    crops). The correction starts at zero and is distilled (ViLD-image, arXiv:2104.13921, section 3.3).

    Args:
        features: F.
        hidden: units of each hidden layer.
        embed_dim: D.
        dropout: after each hidden layer.
    """

    def __init__(self, *, features: int, hidden: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.layers = HiddenLayers(features, hidden, dropout=dropout)
        self.projection = nn.Linear(hidden, embed_dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, features_PF: Tensor, tower_PD: Tensor) -> Tensor:
        """(P, D) unit rows; ``tower_PD`` is the projection of the map in the box, unit rows."""
        correction_PD = self.projection(self.layers(self.norm(features_PF.float()))).float()
        return F.normalize(tower_PD + correction_PD, dim=1)
