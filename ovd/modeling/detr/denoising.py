# SPDX-License-Identifier: Apache-2.0
"""Denoising queries (DN-DETR, arXiv 2203.01305): noised copies of the targets that the decoder has to restore.

In training they stand before the free queries, which may not attend to them
(`attention_mask.denoising_attention_mask`). Each copy has a known target, so nothing is matched.

Shapes: ``N`` images, ``T`` targets of the image with the most, ``P`` = groups · T denoising queries, ``d`` width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.conditioning import ConditionEncoder
from ovd.modeling.detr.criterion import PredictionHeads, SetCriterion
from ovd.modeling.detr.matcher import QueryAssignment
from ovd.modeling.detr.structures import DecoderOutput, Targets


class DenoisingQueries(NamedTuple):
    """Queries beside the free ones: content (N, P, d), anchor logits (N, P, 4), group (P,)."""

    content: Tensor
    anchors: Tensor
    group: Tensor


class Denoising:
    """Makes denoising queries and computes their losses.

    Args:
        groups: copies of each target; 0: no denoising.
        box_noise: see `apply_box_noise`.
        label_noise: share of copies whose class is redrawn; of patches, share of copies without the patch's embedding.
    """

    def __init__(self, *, groups: int, box_noise: float, label_noise: float) -> None:
        self.groups, self.box_noise, self.label_noise = groups, box_noise, label_noise

    def queries(
        self, targets: Targets, *, condition: ConditionEncoder, classifier: EmbeddingClassifier | None
    ) -> DenoisingQueries | None:
        """Noised copies of the targets; None without targets or groups.

        Their content is the target's patch or word, encoded as a condition; for a closed list of classes it is zero,
        and only the anchor identifies the target.
        """
        most_targets = max(targets.counts)
        if not self.groups or not most_targets:
            return None
        boxes = targets.boxes[:, :most_targets].repeat(1, self.groups, 1)
        noised = apply_box_noise(boxes, self.box_noise)
        content = torch.zeros(*boxes.shape[:2], condition.out_features, device=boxes.device)
        if targets.embeddings is not None:
            content = condition(targets.embeddings.repeat(1, self.groups, 1))
            has_patch = torch.rand(content.shape[:2], device=boxes.device) >= self.label_noise
            content = content * has_patch[..., None]
        elif classifier is not None and classifier.rows.shape[1] == condition.in_features:
            labels = targets.labels[:, :most_targets].repeat(1, self.groups)
            content = condition(classifier.rows[self._noised_labels(labels, classifier)])
        group = torch.arange(self.groups, device=boxes.device).repeat_interleave(most_targets)
        return DenoisingQueries(content, torch.logit(noised), group)

    def _noised_labels(self, labels: Tensor, classifier: EmbeddingClassifier) -> Tensor:
        """Labels, a share of them redrawn from the training classes."""
        trained = classifier.trainable.nonzero()[:, 0]
        other = trained[torch.randint(len(trained), labels.shape, device=labels.device)]
        return torch.where(torch.rand(labels.shape, device=labels.device) < self.label_noise, other, labels)

    def losses(
        self,
        outputs: DecoderOutput | None,
        targets: Targets,
        *,
        criterion: SetCriterion,
        heads: PredictionHeads,
        num_targets: float,
        like: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Losses of the denoising queries, named ``…_dn``, each a mean over the groups.

        Args:
            outputs: theirs; None for a process without targets, whose losses are zeros named as in ``like``.
            targets: what they were made of.
            criterion, heads, num_targets: as for the free queries.
            like: losses of the free queries.
        """
        if outputs is None:
            return {f"{name}_dn": value * 0 for name, value in like.items()} if self.groups else {}
        layers, size = len(outputs.boxes), outputs.boxes.shape[2]
        most_targets = max(targets.counts)
        assignment, valid_NP = denoising_assignment(targets, size=size, layers=layers)
        losses = criterion.assigned(
            outputs, targets, heads, assignment, num_targets=num_targets * (size // most_targets), valid_NQ=valid_NP
        )
        return {f"{name}_dn": value for name, value in losses.items()}


def denoising_assignment(targets: Targets, *, size: int, layers: int) -> tuple[QueryAssignment, Tensor]:
    """Each denoising query with the target it was copied from, in every layer; and (N, P) bool, False for padding."""
    target = torch.arange(size, device=targets.boxes.device) % max(targets.counts)
    valid_NP = targets.valid[:, target]
    image, query = valid_NP.nonzero().unbind(1)
    layer = torch.arange(layers, device=target.device).repeat_interleave(len(image))
    image, query = image.repeat(layers), query.repeat(layers)
    return QueryAssignment(layer, image, query, target[query]), valid_NP


def apply_box_noise(boxes: Tensor, scale: float) -> Tensor:
    """(…, 4) cxcywh boxes in [0, 1]: centres moved by up to ``scale`` half sides, sides changed by up to that share."""
    half = boxes[..., 2:] / 2
    noise = (torch.rand_like(boxes) * 2 - 1) * scale
    centre = boxes[..., :2] + noise[..., :2] * half
    sides = boxes[..., 2:] * (1 + noise[..., 2:])
    return torch.cat([centre, sides], dim=-1).clamp(1e-3, 1 - 1e-3)
