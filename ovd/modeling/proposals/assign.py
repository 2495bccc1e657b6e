# SPDX-License-Identifier: Apache-2.0
"""Task-aligned assignment of objects to grid cells, and the losses of boxes with and without classes.

Shapes: ``A`` cells of one picture, ``T`` labelled objects, ``I`` ignored boxes, ``C`` classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss


class Assignment(NamedTuple):
    """Targets of the cells of one picture.

    Attributes:
        gt_index: (A,) index of the object that the cell is assigned to, -1 for none.
        target: (A,) of its objectness, 0 without an object.
        valid: (A,) bool, False for cells that are neither object nor background.
    """

    gt_index: Tensor
    target: Tensor
    valid: Tensor


@torch.no_grad()
def assign(
    boxes: Tensor, scores: Tensor, centres: Tensor, objects: Tensor, ignored: Tensor, *, cells_per_object: int = 13
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al., arXiv:2108.07755, section 3.3).

    Of the cells whose centre lies in the object, those with the best alignment ``score · IoU⁶`` are assigned to it. The
    best cell's target is its IoU; the others' are in proportion to their alignment.

    Args:
        boxes: (A, 4) predicted.
        scores: 0…1 predicted: (A,) of any object, or (A, T) of each object's class.
        centres: (A, 2) in pixels.
        objects: (T, 4).
        ignored: (I, 4) neither objects nor background: cells without an object whose box has an IoU above .5 with one
            are not valid.
        cells_per_object: at most so many are assigned to each object.
    """
    count = len(boxes)
    gt_index = torch.full((count,), -1, dtype=torch.long, device=boxes.device)
    target = boxes.new_zeros(count)
    if len(objects):
        iou_AT = box_iou(boxes, objects)
        reach = torch.cat([centres[:, None] - objects[:, :2], objects[:, 2:] - centres[:, None]], dim=2)
        score_AT = scores[:, None] if scores.ndim == 1 else scores
        alignment_AT = score_AT * iou_AT**6 * (reach.amin(dim=2) > 0)
        best = alignment_AT.topk(min(cells_per_object, count), dim=0).indices
        chosen_AT = torch.zeros_like(alignment_AT, dtype=torch.bool).scatter_(0, best, True) & (alignment_AT > 0)
        # A cell that two objects want goes to the one that it overlaps more.
        overlap, index = torch.where(chosen_AT, iou_AT, -1.0).max(dim=1)
        assigned = overlap >= 0
        gt_index[assigned] = index[assigned]
        owned_AT = F.one_hot(index, len(objects)).bool() & assigned[:, None]
        alignment_AT = alignment_AT * owned_AT
        best_alignment, best_iou = alignment_AT.amax(dim=0), (iou_AT * owned_AT).amax(dim=0)
        target = (alignment_AT / best_alignment.clamp_min(1e-12) * best_iou).amax(dim=1)
    valid = torch.ones(count, dtype=torch.bool, device=boxes.device)
    if len(ignored):
        valid = (box_iou(boxes, ignored).amax(dim=1) <= 0.5) | (gt_index >= 0)
    return Assignment(gt_index, target, valid)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, weighted by the squared error (arXiv:2006.04388, equation 4, β = 2)."""
    error = (targets - logits.sigmoid()).abs()
    return error**2 * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distribution_focal_loss(sides: Tensor, target: Tensor) -> Tensor:
    """(M,) mean cross-entropy of four (M, 4, bins) side distributions with the two bins beside (M, 4) distances.

    Distances are in strides; what is beyond the last bin is taken for it (arXiv:2006.04388, equation 6).
    """
    bins = sides.shape[-1]
    target = target.clamp(0, bins - 1 - 1e-3)
    low = target.floor().long()
    share = target - low
    logs = sides.log_softmax(dim=-1)
    below, above = (logs.gather(-1, at[..., None])[..., 0] for at in (low, low + 1))
    return -((1 - share) * below + share * above).mean(dim=-1)


class PredictedBoxes(NamedTuple):
    """Boxes that the cells of one picture predict.

    Attributes:
        boxes: (A, 4) x1, y1, x2, y2 in pixels, decoded from ``sides``.
        sides: (A, 4, bins) logits of the distances to the box's sides.
        centres: (A, 2) x and y of the cells' centres, in pixels.
        strides: (A,) of the cells, in pixels.
    """

    boxes: Tensor
    sides: Tensor
    centres: Tensor
    strides: Tensor


class BoxLosses(NamedTuple):
    """Sums over the cells of one picture, and what they are divided by."""

    objectness: Tensor
    box: Tensor
    sides: Tensor
    quality: Tensor
    weight: Tensor
    positives: Tensor


def class_agnostic_losses(
    *,
    objectness: Tensor,
    quality: Tensor,
    predicted: PredictedBoxes,
    objects: Tensor,
    assignment: Assignment,
) -> BoxLosses:
    """Class-agnostic losses of one picture.

    Only objectness learns from background; sides and quality learn from positive cells alone, so that unlabelled
    objects are no negatives for them (OLN, Kim et al., arXiv:2108.06753).

    Args:
        objectness, quality: (A,) logits.
        predicted: the cells' boxes.
        objects: (T, 4).
        assignment: of :func:`assign`.
    """
    valid = assignment.valid
    positive = assignment.gt_index >= 0
    loss = quality_focal_loss(objectness[valid], assignment.target[valid]).sum()
    zero = predicted.sides.sum() * 0.0 + quality.sum() * 0.0
    if not bool(positive.any()):
        return BoxLosses(loss, zero, zero, zero, zero.detach(), zero.detach())
    box, dfl, weight = _box_losses(predicted, objects, assignment)
    with torch.no_grad():
        overlap = box_iou(predicted.boxes[positive], objects[assignment.gt_index[positive]]).diagonal()
    localised = F.binary_cross_entropy_with_logits(quality[positive], overlap, reduction="sum")
    return BoxLosses(loss, box, dfl, localised, weight, positive.sum().to(weight))


class ClassLosses(NamedTuple):
    """Sums over the cells of one picture, and the weight that they are divided by."""

    scores: Tensor
    box: Tensor
    sides: Tensor
    weight: Tensor


def class_losses(
    *,
    words: Tensor,
    predicted: PredictedBoxes,
    objects: Tensor,
    classes: Tensor,
    assignment: Assignment,
) -> ClassLosses:
    """Losses of one picture whose objects have classes: a cell's score of its object's class learns the box's IoU.

    Args:
        words: (A, C) logits.
        predicted: the cells' boxes.
        objects: (T, 4).
        classes: (T,) int64.
        assignment: of :func:`assign`.
    """
    positive = assignment.gt_index >= 0
    target = torch.zeros_like(words)
    target[positive, classes[assignment.gt_index[positive]]] = assignment.target[positive].to(words)
    scores = quality_focal_loss(words[assignment.valid], target[assignment.valid]).sum()
    if not bool(positive.any()):
        zero = predicted.sides.sum() * 0.0
        return ClassLosses(scores, zero, zero, zero.detach())
    return ClassLosses(scores, *_box_losses(predicted, objects, assignment))


def _box_losses(predicted: PredictedBoxes, objects: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """(GIoU loss, loss of the sides' distributions, weight), summed over the positive cells by their targets."""
    positive = assignment.gt_index >= 0
    target, weight = objects[assignment.gt_index[positive]], assignment.target[positive]
    box = (weight * generalized_box_iou_loss(predicted.boxes[positive], target, reduction="none")).sum()
    at, step = predicted.centres[positive], predicted.strides[positive]
    reach = torch.cat([at - target[:, :2], target[:, 2:] - at], dim=1) / step[:, None]
    dfl = (weight * distribution_focal_loss(predicted.sides[positive], reach)).sum()
    return box, dfl, weight.sum()
