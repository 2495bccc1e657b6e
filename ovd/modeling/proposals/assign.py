# SPDX-License-Identifier: Apache-2.0
"""Which cells answer for which object, and the losses of boxes, with names and without.

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
        object: (A,) index of the object that the cell answers for, -1 for none.
        target: (A,) what its objectness should be, 0 where it answers for none.
        counts: (A,) bool, False for cells that are neither object nor background.
    """

    object: Tensor
    target: Tensor
    counts: Tensor


@torch.no_grad()
def assign(
    boxes: Tensor, scores: Tensor, centres: Tensor, objects: Tensor, ignored: Tensor, *, cells_per_object: int = 13
) -> Assignment:
    """Task-aligned assignment (TOOD, Feng et al., arXiv:2108.07755, section 3.3).

    Of the cells whose centre lies in the object, those answer whose present box and score fit it best:
    score · IoU⁶. The best cell's target is its IoU, the others' shrink with their fit.

    Args:
        boxes: (A, 4) that the cells give now.
        scores: 0…1, what the cells say now: (A,) of any object, or (A, T) of each object's class.
        centres: (A, 2) in pixels.
        objects: (T, 4).
        ignored: (I, 4) neither objects nor background: cells whose box overlaps one by more than half, and which answer
            for no object, do not count.
        cells_per_object: at most.
    """
    count = len(boxes)
    owner = torch.full((count,), -1, dtype=torch.long, device=boxes.device)
    target = boxes.new_zeros(count)
    if len(objects):
        iou_AT = box_iou(boxes, objects)
        reach = torch.cat([centres[:, None] - objects[:, :2], objects[:, 2:] - centres[:, None]], dim=2)
        score_AT = scores[:, None] if scores.ndim == 1 else scores
        fit_AT = score_AT * iou_AT**6 * (reach.amin(dim=2) > 0)
        best = fit_AT.topk(min(cells_per_object, count), dim=0).indices
        chosen_AT = torch.zeros_like(fit_AT, dtype=torch.bool).scatter_(0, best, True) & (fit_AT > 0)
        # A cell that two objects want goes to the one that it overlaps more.
        overlap, index = torch.where(chosen_AT, iou_AT, -1.0).max(dim=1)
        assigned = overlap >= 0
        owner[assigned] = index[assigned]
        owned_AT = F.one_hot(index, len(objects)).bool() & assigned[:, None]
        fit_AT = fit_AT * owned_AT
        most_fit, most_iou = fit_AT.amax(dim=0), (iou_AT * owned_AT).amax(dim=0)
        target = (fit_AT / most_fit.clamp_min(1e-12) * most_iou).amax(dim=1)
    counts = torch.ones(count, dtype=torch.bool, device=boxes.device)
    if len(ignored):
        counts = (box_iou(boxes, ignored).amax(dim=1) <= 0.5) | (owner >= 0)
    return Assignment(owner, target, counts)


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


class BoxLosses(NamedTuple):
    """Sums over the cells of one picture, and what they are divided by."""

    objectness: Tensor
    box: Tensor
    sides: Tensor
    quality: Tensor
    weight: Tensor
    positives: Tensor


def nameless_losses(
    *,
    objectness: Tensor,
    quality: Tensor,
    sides: Tensor,
    boxes: Tensor,
    centres: Tensor,
    strides: Tensor,
    objects: Tensor,
    assignment: Assignment,
) -> BoxLosses:
    """Losses of one picture. Only objectness learns from background; sides and quality learn from positives, so that
    unlabelled objects are no negatives for them (OLN, Kim et al., arXiv:2108.06753).

    Args:
        objectness, quality: (A,) logits.
        sides: (A, 4, bins) logits.
        boxes: (A, 4) decoded from them.
        centres, strides: (A, 2) and (A,), pixels.
        objects: (T, 4).
        assignment: of :func:`assign`.
    """
    counts = assignment.counts
    positive = assignment.object >= 0
    loss = quality_focal_loss(objectness[counts], assignment.target[counts]).sum()
    zero = sides.sum() * 0.0 + quality.sum() * 0.0
    if not bool(positive.any()):
        return BoxLosses(loss, zero, zero, zero, zero.detach(), zero.detach())
    box, dfl, weight = _box_losses(sides, boxes, centres, strides, objects, assignment)
    with torch.no_grad():
        overlap = box_iou(boxes[positive], objects[assignment.object[positive]]).diagonal()
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
    sides: Tensor,
    boxes: Tensor,
    centres: Tensor,
    strides: Tensor,
    objects: Tensor,
    classes: Tensor,
    assignment: Assignment,
) -> ClassLosses:
    """Losses of one picture whose objects have classes: a cell's score of its object's class learns the box's IoU.

    Args:
        words: (A, C) logits.
        sides: (A, 4, bins) logits.
        boxes: (A, 4) decoded from them.
        centres, strides: (A, 2) and (A,), pixels.
        objects: (T, 4).
        classes: (T,) int64.
        assignment: of :func:`assign`.
    """
    positive = assignment.object >= 0
    target = torch.zeros_like(words)
    target[positive, classes[assignment.object[positive]]] = assignment.target[positive].to(words)
    scores = quality_focal_loss(words[assignment.counts], target[assignment.counts]).sum()
    if not bool(positive.any()):
        zero = sides.sum() * 0.0
        return ClassLosses(scores, zero, zero, zero.detach())
    return ClassLosses(scores, *_box_losses(sides, boxes, centres, strides, objects, assignment))


def _box_losses(
    sides: Tensor, boxes: Tensor, centres: Tensor, strides: Tensor, objects: Tensor, assignment: Assignment
) -> tuple[Tensor, Tensor, Tensor]:
    """(GIoU loss, loss of the sides' distributions, weight), summed over the positive cells by their targets."""
    positive = assignment.object >= 0
    target, weight = objects[assignment.object[positive]], assignment.target[positive]
    box = (weight * generalized_box_iou_loss(boxes[positive], target, reduction="none")).sum()
    at, step = centres[positive], strides[positive]
    reach = torch.cat([at - target[:, :2], target[:, 2:] - at], dim=1) / step[:, None]
    dfl = (weight * distribution_focal_loss(sides[positive], reach)).sum()
    return box, dfl, weight.sum()
