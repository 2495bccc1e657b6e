# SPDX-License-Identifier: Apache-2.0
"""DETR's set criterion (arXiv 2005.12872, eq. 2): match predictions with targets, then classification and box losses.

All decoder layers are matched and scored at once; each loss is summed over the layers (auxiliary losses). Classes are
logits of a closed list, or objectness and an embedding that is compared with texts; text logits are computed for
matched queries only. Where targets have embeddings, the pretext's reconstruction and contrast losses are added.

Shapes: ``L`` decoder layers, ``N`` images, ``Q`` queries, ``T`` targets (padded), ``K`` matched pairs, ``d`` width,
``C`` classes, ``D`` embedding.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from ovd.config_detr import DetrLossConfig
from ovd.modeling.boxes import box_iou_and_giou
from ovd.modeling.classifier import EmbeddingClassifier, cosine_logits
from ovd.modeling.detr.matcher import QueryAssignment, box_cost, class_cost, hungarian_match, object_cost
from ovd.modeling.detr.structures import DecoderOutput, Targets
from ovd.modeling.distillation import squared_distillation
from pretrain.engine import distributed

FOCAL_ALPHA = 0.25  # arXiv 1708.02002, eq. 5; its gamma is 2


class PredictionHeads(Protocol):
    """Heads that read decoder states; `ovd.modeling.detr.network.Detr` has them.

    Attributes:
        class_embed: states → C+1 logits of a closed list, "no object" last, or None.
        object_embed: states → one logit of an object, where there is no closed list.
        feature_align: states → D, the space of texts and patches.
        classifier: compares embeddings with texts, or None.
        region_tower: embeds boxes in place of states; its text loss is computed elsewhere.
    """

    @property
    def class_embed(self) -> nn.Module | None: ...
    @property
    def object_embed(self) -> nn.Module | None: ...
    @property
    def feature_align(self) -> nn.Module: ...
    @property
    def classifier(self) -> EmbeddingClassifier | None: ...
    @property
    def region_tower(self) -> nn.Module | None: ...


class _Predictions(NamedTuple):
    """Decoder outputs with their logits.

    Attributes:
        states: (L, N, Q, d).
        boxes: (L, N, Q, 4).
        objects: (L, N, Q) objectness logits; None with a closed list of classes.
        classes: (L, N, Q, C+1) logits of a closed list, or None.
        classifier: of the states' embeddings; None where no text is predicted.
        feature_align: states → D.
    """

    states: Tensor
    boxes: Tensor
    objects: Tensor | None
    classes: Tensor | None
    classifier: EmbeddingClassifier | None
    feature_align: nn.Module

    @classmethod
    def of(
        cls, outputs: DecoderOutput, heads: PredictionHeads, *, classifier: EmbeddingClassifier | None
    ) -> _Predictions:
        states = outputs.states
        classes = heads.class_embed(states).float() if heads.class_embed is not None else None
        objects = heads.object_embed(states)[..., 0].float() if heads.object_embed is not None else None
        return cls(states, outputs.boxes, objects, classes, classifier, heads.feature_align)


class SetCriterion:
    """Losses of decoder outputs.

    Args:
        weights: of the losses; the matching cost uses those of object, classes, l1 and giou.
        patch_scale: inverse temperature of the softmax over a picture's patches.
    """

    def __init__(self, weights: DetrLossConfig, *, patch_scale: float) -> None:
        self.weights, self.patch_scale = weights, patch_scale

    def __call__(
        self,
        outputs: DecoderOutput,
        targets: Targets,
        heads: PredictionHeads,
        *,
        num_targets: float,
        query_group_Q: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Match outputs with targets and return the weighted losses.

        Args:
            outputs: of the decoder.
            targets: what should be found.
            heads: of the network that made the outputs.
            num_targets: what sums are divided by, see `targets_per_process`.
            query_group_Q: group of each query, where targets have groups. Grouped queries are conditioned on what they
                search for, so their class is not predicted.
        """
        classifier = None if query_group_Q is not None else _text_classifier(targets, heads)
        predictions = _Predictions.of(outputs, heads, classifier=classifier)
        assignment = self._match(predictions, targets, query_group_Q)
        return self._losses(predictions, targets, assignment, num_targets=num_targets, valid_NQ=None)

    def assigned(
        self,
        outputs: DecoderOutput,
        targets: Targets,
        heads: PredictionHeads,
        assignment: QueryAssignment,
        *,
        num_targets: float,
        valid_NQ: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a known assignment; classification skips queries that are not ``valid_NQ`` (padding)."""
        predictions = _Predictions.of(outputs, heads, classifier=_text_classifier(targets, heads))
        return self._losses(predictions, targets, assignment, num_targets=num_targets, valid_NQ=valid_NQ)

    def _match(self, predictions: _Predictions, targets: Targets, query_group_Q: Tensor | None) -> QueryAssignment:
        w = self.weights
        cost = box_cost(predictions.boxes, targets.boxes, l1=w.l1, giou=w.giou)
        if predictions.objects is not None:
            cost = cost + w.object * object_cost(predictions.objects, kind=w.object_kind)
        if predictions.classes is not None:
            cost = cost + w.object * class_cost(predictions.classes, targets.labels)
        elif predictions.classifier is not None and w.classes:
            with torch.no_grad():
                embeddings = predictions.feature_align(predictions.states)
                text = predictions.classifier(embeddings.flatten(0, 2)).unflatten(0, embeddings.shape[:3])
            cost = cost + w.classes * class_cost(text, targets.labels)
        return hungarian_match(cost, targets.counts, query_group_Q=query_group_Q, target_group_NT=targets.groups)

    def _losses(
        self,
        predictions: _Predictions,
        targets: Targets,
        assignment: QueryAssignment,
        *,
        num_targets: float,
        valid_NQ: Tensor | None,
    ) -> dict[str, Tensor]:
        w, classifier = self.weights, predictions.classifier
        query = (assignment.layer, assignment.image, assignment.query)
        target = (assignment.image, assignment.target)
        losses = {}
        if (objects := predictions.objects) is not None:
            matched = torch.zeros_like(objects)
            matched[query] = 1.0
            losses["loss_object"] = w.object * _object_loss(
                objects, matched, valid_NQ, num_targets, kind=w.object_kind, no_object_weight=w.no_object_weight
            )
        if (classes := predictions.classes) is not None:
            labels = torch.full(classes.shape[:-1], classes.shape[-1] - 1, device=classes.device)  # no object
            labels[query] = targets.labels[target]
            losses["loss_class"] = w.object * _class_loss(
                classes, labels, valid_NQ, no_object_weight=w.no_object_weight
            )
        boxes, true_boxes = predictions.boxes[query].float(), targets.boxes[target]
        losses["loss_l1"] = w.l1 * (boxes - true_boxes).abs().sum() / num_targets
        _, giou = box_iou_and_giou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(true_boxes, "cxcywh", "xyxy"))
        losses["loss_giou"] = w.giou * (1 - giou).sum() / num_targets
        if classifier is not None:
            text = classifier(predictions.feature_align(predictions.states[query]))
            mean = classifier.loss(text, targets.labels[target])
            losses["loss_text"] = w.classes * mean * len(assignment.image) / num_targets
        if targets.embeddings is not None and (w.reconstruction or w.contrast):
            z_KD = predictions.feature_align(predictions.states[query]).float()
            losses |= self._patch_losses(z_KD, targets, targets.embeddings, assignment, num_targets)
        return losses

    def _patch_losses(
        self, z_KD: Tensor, targets: Targets, embeddings_NTD: Tensor, assignment: QueryAssignment, num_targets: float
    ) -> dict[str, Tensor]:
        """UP-DETR's reconstruction of the patch's embedding, and a softmax over the patches of its picture."""
        w, losses = self.weights, {}
        patches = F.normalize(embeddings_NTD.float(), dim=-1)
        if w.reconstruction:
            matched_patch = patches[assignment.image, assignment.target]
            losses["loss_reconstruction"] = w.reconstruction * squared_distillation(z_KD, matched_patch) / num_targets
        if w.contrast:
            logits = cosine_logits(z_KD, patches[assignment.image], scale=self.patch_scale)
            logits = logits.masked_fill(~targets.valid[assignment.image], float("-inf"))
            nll = F.cross_entropy(logits, assignment.target, reduction="sum")
            losses["loss_contrast"] = w.contrast * nll / num_targets
        return losses


def targets_per_process(targets: Targets) -> float:
    """Mean number of targets per process, at least 1; every process must call it equally often."""
    return max(distributed.all_sum([float(sum(targets.counts))])[0] / distributed.world_size(), 1.0)


def _text_classifier(targets: Targets, heads: PredictionHeads) -> EmbeddingClassifier | None:
    """The classifier of query states: None for patches, and where a region tower embeds boxes instead."""
    return heads.classifier if heads.region_tower is None and targets.embeddings is None else None


def _object_loss(
    logits: Tensor,
    matched: Tensor,
    valid_NQ: Tensor | None,
    num_targets: float,
    *,
    kind: str,
    no_object_weight: float,
) -> Tensor:
    """Focal loss over targets, or cross-entropy over the sum of weights as DETR's; (L, N, Q) → summed over layers."""
    each = F.binary_cross_entropy_with_logits(logits, matched, reduction="none")
    valid = torch.ones_like(matched) if valid_NQ is None else valid_NQ.to(matched).expand_as(matched)
    if kind == "weighted":
        weight = torch.where(matched > 0, 1.0, no_object_weight) * valid
        return ((each * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)).sum()
    p = logits.sigmoid()
    error = torch.where(matched > 0, 1 - p, p)
    alpha = torch.where(matched > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return (alpha * error**2 * each * valid).sum() / num_targets


def _class_loss(logits: Tensor, labels: Tensor, valid_NQ: Tensor | None, *, no_object_weight: float) -> Tensor:
    """DETR's cross-entropy over C+1 classes, a mean by weight in each layer, summed over layers."""
    weight = torch.where(labels == logits.shape[-1] - 1, no_object_weight, 1.0)
    if valid_NQ is not None:
        weight = weight * valid_NQ
    nll = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(weight)
    return ((nll * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)).sum()
