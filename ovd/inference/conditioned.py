# SPDX-License-Identifier: Apache-2.0
"""Detections of a UP-DETR pretext model, whose queries are conditioned on examples: a score is a query's objectness."""

from __future__ import annotations

import numpy as np

from ovd.detections import Detections
from ovd.inference.postprocess import CROSS_CLASS_IOU, MAX_DETECTIONS, NMS_IOU, Candidates, postprocess
from ovd.inference.region_model import ConditionedBoxes
from ovd.query import Query
from pretrain.engine.errors import UserError


def require_examples_only(query: Query) -> None:
    """Refuse words and negative examples, which such a model has no embeddings for.

    Raises:
        UserError: words or negative examples.
    """
    if query.words.classes or len(query.positive_examples) < len(query.examples):
        raise UserError(
            "this transformer was pretrained on patches: it searches by example only, without words "
            "or negatives; give examples only, or train it on labels with model.variant=text"
        )


def conditioned_detections(
    located: ConditionedBoxes,
    query: Query,
    *,
    size: tuple[int, int],
    threshold: float,
    limit: int = MAX_DETECTIONS,
    nms_iou: float = NMS_IOU,
    cross_class_iou: float | None = CROSS_CLASS_IOU,
    one_class_per_region: bool = True,
) -> Detections:
    """Detections from the boxes of conditioned queries.

    Args:
        located: of the query's positive examples.
        query: examples only.
        size: (height, width) of the picture.
        threshold: lowest score listed.
        limit, nms_iou, cross_class_iou: see `ovd.inference.regions.Regions.classify`.
        one_class_per_region: either is the same here: each object query has one class.
    """
    boxes, score = located.boxes, located.score
    class_id = np.array(query.columns, dtype=np.int64)[located.class_id]
    best_C = np.zeros(len(query.names), dtype=np.float32)
    np.maximum.at(best_C, class_id, score)
    candidates = Candidates(np.arange(len(score)), class_id, score)[score >= np.float32(threshold)]
    return Detections.of(
        postprocess(boxes, candidates, nms_iou=nms_iou, cross_class_iou=cross_class_iou, limit=limit),
        boxes=boxes,
        size=size,
        names=query.names,
        best=best_C,
        threshold=threshold,
        notices=query.notices,
    )
