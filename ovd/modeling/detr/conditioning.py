# SPDX-License-Identifier: Apache-2.0
"""Queries conditioned on what they search for: words (OV-DETR, arXiv 2203.11876) or patches (UP-DETR, 2011.09094).

Shapes: ``N`` images, ``M`` conditions of an image, ``Q`` queries, ``d`` width, ``D`` embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.structures import Targets


class ConditionEncoder(nn.Linear):
    """(…, D) embeddings → (…, d), which is added to a query (UP-DETR's ``patch2query``).

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


def sample_conditions(targets: Targets, classifier: EmbeddingClassifier, *, count: int) -> tuple[Tensor, Targets]:
    """Draw the words that condition each image's queries: classes that are present, filled up with absent ones.

    Args:
        targets: labels of a batch.
        classifier: its rows are the words; absent ones are drawn from the classes of training.
        count: M.

    Returns:
        (N, M, D) text embeddings, and the targets of those classes; a target's group is the number of its condition.
    """
    device = targets.boxes.device
    trained = classifier.trainable.nonzero()[:, 0]
    rows, groups, keep = [], torch.full_like(targets.labels, -1), []
    for n, objects in enumerate(targets.counts):
        present = targets.labels[n, :objects].unique()
        present = present[torch.randperm(len(present), device=device)][:count]
        absent = trained[torch.randperm(len(trained), device=device)]
        absent = absent[~torch.isin(absent, present)][: count - len(present)]
        classes = torch.cat([present, absent])
        rows.append(classifier.rows[classes])
        is_condition = targets.labels[n, :objects, None] == classes[None]
        keep.append(is_condition.any(1))
        groups[n, :objects] = torch.where(is_condition.any(1), is_condition.float().argmax(1), -1)
    return torch.stack(rows), targets.subset(keep, groups)
