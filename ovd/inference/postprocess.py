# SPDX-License-Identifier: Apache-2.0
"""From the scores of regions to detections: threshold, per-class NMS, cross-class NMS, top-k. NumPy only.

NMS keeps exactly the boxes that ``torchvision.ops.batched_nms`` keeps on a CPU. Of equal scores the first comes first.

Shapes: R regions, C classes, K candidates: (region, class) pairs with a score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

NMS_IOU = 0.3
"""Per-class NMS of shown boxes. Detectron2 and ViLD take .5, which AP rewards and which leaves a box and its half side
by side: of the boxes shown .59 are right with .3 and .52 with .5 (80 validation scenes of seed 3000)."""

CROSS_CLASS_IOU = 0.85
"""Two classes on (nearly) the same box are two names for one thing: the better one is shown."""

MAX_DETECTIONS = 300
"""Per image; LVIS's protocol."""

PROTOCOL_NMS_IOU = 0.5
"""Per-class NMS of the published evaluations."""

PROTOCOL_CANDIDATES = 5000
"""(region, class) pairs that enter NMS in ViLD's released code."""

SOFT_NMS_SIGMA = 0.5
"""Of Soft-NMS, where no other is given: the paper's value (arXiv:1704.04503, section 4)."""

NARROWER_SHARE = 0.5
"""Of a word's score, from which on a kind of it names the box: it is then more likely than not. Of words typed after
one above them .84 of those in the photo name its box and .09 of those that are not; by their scores alone it would be
.34 and .03, as equal scores go to the word typed first (276 validation photos of one thing)."""

TRICK_LIMIT = 1000
"""Boxes up to which torchvision separates classes by shifting their boxes apart, on a CPU."""


class PostprocessOptions(TypedDict, total=False):
    """Options of `postprocess`; defaults are those of `ovd.inference.regions.Regions.classify`."""

    limit: int
    nms_iou: float
    cross_class_iou: float | None


class ClassifyOptions(PostprocessOptions, total=False):
    """Keyword arguments of `ovd.inference.regions.Regions.classify` besides the query and the threshold."""

    one_class_per_region: bool


@dataclass(frozen=True)
class Candidates:
    """Regions with a class and a score.

    Attributes:
        region: (K,) int64, index of the box.
        class_id: (K,) int64.
        score: (K,) float32.
    """

    region: NDArray[np.int64]
    class_id: NDArray[np.int64]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, index: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Candidates:
        """Some of them, in the order of ``index``."""
        return Candidates(self.region[index], self.class_id[index], self.score[index])


def best_class_per_region(score_RC: NDArray[np.float32], *, threshold: float) -> Candidates:
    """Each region with its best class, if its score reaches the threshold."""
    if not score_RC.size:
        return Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    top_R = score_RC.max(axis=1)
    region = np.flatnonzero(top_R >= np.float32(threshold))  # few of many; the class is computed for these only
    return Candidates(region, score_RC[region].argmax(axis=1), top_R[region])


def narrowest(
    candidates: Candidates, score_RC: NDArray[np.float32], kind_of_CC: NDArray[np.bool_], *, threshold: float
) -> Candidates:
    """The candidates under the narrowest names that fit, their scores as they are: *dog* beside *animal*.

    Args:
        candidates: regions with their best classes.
        score_RC: of all regions and classes.
        kind_of_CC: the class in the row is a kind of the class in the column.
        threshold: lowest score of a narrower class.
    """
    class_K = candidates.class_id.copy()
    for k, region in enumerate(candidates.region.tolist()):
        score_C = score_RC[region]
        while (narrower := kind_of_CC[:, class_K[k]] & (score_C >= threshold)).any():
            best = int(np.where(narrower, score_C, -1).argmax())
            if score_C[best] < NARROWER_SHARE * score_C[class_K[k]]:
                break
            class_K[k] = best
    return replace(candidates, class_id=class_K)


def pairs_above(score_RC: NDArray[np.float32], *, threshold: float) -> Candidates:
    """Every (region, class) pair that reaches the threshold, region by region."""
    region, class_id = np.nonzero(score_RC >= np.float32(threshold))
    return Candidates(region, class_id, score_RC[region, class_id])


def best_pairs(score_RC: NDArray[np.float32], *, count: int) -> Candidates:
    """The ``count`` best (region, class) pairs, best first; of equal scores the first region, then the first class."""
    flat = score_RC.ravel()
    if count < len(flat):
        lowest = np.partition(flat, len(flat) - count)[len(flat) - count]
        index = np.flatnonzero(flat >= lowest)
    else:
        index = np.arange(len(flat))
    index = index[np.argsort(-flat[index], kind="stable")[:count]]
    region, class_id = np.divmod(index, max(1, score_RC.shape[1]))
    return Candidates(region, class_id, flat[index])


def best_per_class(score_RC: NDArray[np.float32], *, count: int) -> Candidates:
    """The ``count`` best regions of each class, best pair first; of equal scores the first region, then the class."""
    order = np.argsort(-score_RC, axis=0, kind="stable")[:count]
    region, class_id = order.ravel(), np.tile(np.arange(score_RC.shape[1]), len(order))
    score = score_RC[region, class_id]
    first = np.lexsort((class_id, region, -score))
    return Candidates(region[first], class_id[first], score[first])


def postprocess(
    boxes_R4: NDArray[np.float32],
    candidates: Candidates,
    *,
    nms_iou: float = NMS_IOU,
    cross_class_iou: float | None = CROSS_CLASS_IOU,
    limit: int = MAX_DETECTIONS,
) -> Candidates:
    """The candidates that remain after non-maximum suppression, best score first.

    Args:
        boxes_R4: x1, y1, x2, y2 of all regions.
        candidates: of these regions.
        nms_iou: of two boxes of one class that overlap more than this, the better stays.
        cross_class_iou: the same for two classes; None keeps both.
        limit: at most so many, the best.
    """
    boxes_K4 = boxes_R4[candidates.region]
    first = limit if cross_class_iou is None else None
    keep = batched_nms(boxes_K4, candidates.score, candidates.class_id, nms_iou, limit=first)
    if cross_class_iou is not None:
        keep = keep[_suppress(boxes_K4[keep], cross_class_iou, limit=limit)]
    return candidates[keep]


def batched_nms(
    boxes_K4: NDArray[np.float32],
    score_K: NDArray[np.float32],
    class_K: NDArray[np.int64],
    iou: float,
    *,
    limit: int | None = None,
) -> NDArray[np.int64]:
    """Indices that remain after NMS within each class, best score first; of equal scores the first.

    Args:
        boxes_K4: float32 corners, as the network gave them.
        score_K, class_K: of each box.
        iou: overlap above which the worse of two boxes of a class is dropped.
        limit: stop after so many; None: all.
    """
    if not len(boxes_K4):
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-score_K, kind="stable")
    boxes, classes = boxes_K4[order].astype(np.float32), class_K[order]
    if len(boxes) > TRICK_LIMIT:
        return order[_suppress(boxes, iou, classes=classes, limit=limit)]
    # torchvision's way, in single precision as there: far-off coordinates round, and that can decide a tie of overlaps.
    shift = classes.astype(np.float32) * (boxes.max() + np.float32(1))
    return order[_suppress(boxes + shift[:, None], iou, limit=limit)]


def box_ious(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, M) intersection over union of corner boxes (N, 4) and (M, 4); 0 of boxes without area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared: NDArray[np.float32] = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


def soft_nms(boxes_R4: NDArray[np.float32], score_RC: NDArray[np.float32], *, sigma: float) -> NDArray[np.float32]:
    """(R, C) scores after Gaussian Soft-NMS within each class (arXiv:1704.04503, section 3).

    In each class the best remaining region keeps its score, and every other one's is multiplied by
    ``exp(-IoU² / sigma)``; no box is dropped. All classes are done at once, one region of each at a time.

    Args:
        boxes_R4: x1, y1, x2, y2.
        score_RC: of each region and class, at least 0.
        sigma: the paper takes .5.

    Raises:
        ValueError: `sigma` is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}: expected above 0")
    decay_RR = np.exp(-(box_ious(boxes_R4, boxes_R4) ** 2) / sigma)
    score_CR = score_RC.T.astype(np.float64)
    remaining_CR = np.ones(score_CR.shape, dtype=bool)
    classes = np.arange(len(score_CR))
    for _ in range(len(boxes_R4)):
        best_C = np.where(remaining_CR, score_CR, -1).argmax(axis=1)
        remaining_CR[classes, best_C] = False
        score_CR *= np.where(remaining_CR, decay_RR[best_C], 1)
    return score_CR.T.astype(np.float32)


def _suppress(
    boxes_K4: NDArray[np.float32],
    iou: float,
    *,
    classes: NDArray[np.int64] | None = None,
    limit: int | None = None,
) -> NDArray[np.int64]:
    """Greedy NMS over boxes that are sorted best first: indices kept, in order.

    Args:
        boxes_K4: float32 corners.
        iou: a box overlapping an earlier kept one by more than this is dropped.
        classes: only boxes of one class suppress each other; None: all do.
        limit: stop after so many.
    """
    x1, y1, x2, y2 = np.ascontiguousarray(boxes_K4.T)
    area = (x2 - x1) * (y2 - y1)
    alive = np.ones(len(boxes_K4), dtype=bool)
    keep: list[int] = []
    zero = np.float32(0)
    for i in range(len(boxes_K4)):
        if not alive[i]:
            continue
        keep.append(i)
        if len(keep) == limit:
            break
        later = alive[i + 1 :] if classes is None else alive[i + 1 :] & (classes[i + 1 :] == classes[i])
        j = np.flatnonzero(later) + i + 1
        width = np.maximum(zero, np.minimum(x2[i], x2[j]) - np.maximum(x1[i], x1[j]))
        height = np.maximum(zero, np.minimum(y2[i], y2[j]) - np.maximum(y1[i], y1[j]))
        shared = width * height
        with np.errstate(divide="ignore", invalid="ignore"):  # two boxes without area: 0 / 0 suppresses nothing
            overlap = shared / (area[i] + area[j] - shared)
        alive[j[overlap.astype(np.float64) > iou]] = False
    return np.array(keep, dtype=np.int64)
