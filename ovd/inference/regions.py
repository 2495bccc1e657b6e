# SPDX-License-Identifier: Apache-2.0
"""A picture after the network: its regions can be classified by any words, again and again.

Shapes: R regions, C classes, N negatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from ovd.inference.everything import OVERLAP, SHOWN_THRESHOLD
from ovd.inference.postprocess import (
    CROSS_CLASS_IOU,
    MAX_DETECTIONS,
    NMS_IOU,
    best_class_per_region,
    pairs_above,
    postprocess,
)
from ovd.inference.scorers import QueryScores
from ovd.inference.scoring import RegionSet
from ovd.query import Query
from ovd.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ovd.detector import Detector


@dataclass(kw_only=True)
class Regions:
    """One picture after the network: boxes and embeddings, ready for any words.

    Attributes:
        regions: boxes, objectness, embeddings and masks, see `RegionSet`.
        key: sha256 of the pixels.
        detector: whose words and threshold serve when `classify` is called without.
    """

    regions: RegionSet
    key: str
    detector: Detector = field(repr=False)

    def __len__(self) -> int:
        return len(self.regions)

    def scores(self, query: Query | Vocabulary) -> QueryScores:
        """Score all regions.

        Returns:
            (R, C) scores of the classes, and (R, N) of the negative words and examples.
        """
        query = Query(query) if isinstance(query, Vocabulary) else query
        return self.detector.scorer(query)(self.regions)

    def classify(
        self,
        vocabulary: Query | Vocabulary | str | Iterable[str] | None = None,
        *,
        threshold: float | None = None,
        limit: int = MAX_DETECTIONS,
        one_class_per_region: bool = True,
        nms_iou: float = NMS_IOU,
        cross_class_iou: float | None = CROSS_CLASS_IOU,
    ) -> Detections:
        """Classify the regions by the words and examples given; the network is not run.

        A region that looks as much like a negative word or example as like a class, or more, is left out.

        Args:
            vocabulary: words, or words and examples (`Detector.query`); "everything" for all that the detector knows;
                those of `Detector.set_classes` when None.
            threshold: lowest score listed; the checkpoint's calibrated default when None.
            limit: at most so many detections, best first.
            one_class_per_region: show each region under its best class only; False lists every class above the
                threshold, as COCO and LVIS evaluation want it.
            nms_iou: class-aware NMS.
            cross_class_iou: of two classes on boxes overlapping more than this the better is kept; None keeps both.

        Raises:
            UserError: no words, or a threshold outside [0, 1].
        """
        query = vocabulary if isinstance(vocabulary, Query) else self.detector.query(vocabulary)
        level = self.detector.threshold_for(query, threshold)
        score_RC, negative_RN = self.scores(query)
        if negative_RN.shape[1]:
            score_RC = np.where(score_RC <= negative_RN.max(axis=1, keepdims=True), np.float32(-1), score_RC)
        if (naming := query.naming) is not None:
            one_class_per_region = True
            score_RC, cross_class_iou = naming.one_name(score_RC, level=SHOWN_THRESHOLD), OVERLAP
        best_C = score_RC.max(axis=0, initial=0.0)
        listed_classes = np.flatnonzero(best_C >= level)  # few of many words: no other has a detection
        select = best_class_per_region if one_class_per_region else pairs_above
        candidates = select(score_RC[:, listed_classes], threshold=level)
        candidates = replace(candidates, class_id=listed_classes[candidates.class_id])
        boxes = self.regions.boxes
        one_family = candidates if naming is None else replace(candidates, class_id=naming.family[candidates.class_id])
        chosen = postprocess(boxes, one_family, nms_iou=nms_iou, cross_class_iou=cross_class_iou, limit=limit)
        if naming is not None:  # back from families to words
            chosen = replace(chosen, class_id=score_RC.argmax(axis=1)[chosen.region])
        return Detections.of(
            chosen,
            boxes=boxes,
            size=self.regions.size,
            names=query.names,
            best=best_C,
            threshold=level,
            masks=self.regions.masks,
            notices=query.notices,
        )


def picture_key(pixels: NDArray[np.uint8]) -> str:
    """sha256 of a picture's size and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
