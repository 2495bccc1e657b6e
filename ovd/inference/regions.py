# SPDX-License-Identifier: Apache-2.0
"""A picture's regions after the network, ready to be classified by any words.

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
from ovd.inference.arrays import one_blas_thread
from ovd.inference.everything import PROMPT_FREE_CROSS_CLASS_IOU, PromptFreeWords
from ovd.inference.postprocess import (
    CROSS_CLASS_IOU,
    MAX_DETECTIONS,
    NMS_IOU,
    Candidates,
    best_class_per_region,
    narrowest,
    pairs_above,
    postprocess,
)
from ovd.inference.scorers import QueryScores, Shown
from ovd.inference.scoring import RegionSet
from ovd.query import Query
from ovd.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ovd.detector import Detector


@dataclass(kw_only=True)
class Regions:
    """A picture's boxes and embeddings, ready to be classified by any words.

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

    @one_blas_thread
    def scores(self, query: Query | Vocabulary) -> QueryScores:
        """Score all regions.

        Returns:
            (R, C) scores of the classes, and (R, N) of the negative words and examples.
        """
        query = Query(query) if isinstance(query, Vocabulary) else query
        return self.detector.scorer(query)(self.regions)

    @one_blas_thread
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
        threshold, scorer = self.detector.threshold_for(query, threshold), self.detector.scorer(query)
        if query.prompt_free is None:
            shown = scorer.shown(self.regions, threshold=threshold)
            if one_class_per_region:
                candidates = best_class_per_region(shown.score_RS, threshold=threshold)
                kind_of = scorer.kind_of(shown.classes)
                candidates = narrowest(candidates, shown.score_RS, kind_of, threshold=threshold)
            else:
                candidates = pairs_above(shown.score_RS, threshold=threshold)
            kept = postprocess(
                self.regions.boxes, candidates, nms_iou=nms_iou, cross_class_iou=cross_class_iou, limit=limit
            )
            score_K = shown.score_RS[kept.region, kept.class_id]  # of the name shown, which may be a narrower one
            kept = replace(kept, score=score_K, class_id=shown.classes[kept.class_id])
            kept = kept[np.argsort(-score_K, kind="stable")]
        else:  # such queries have no negatives
            scores = query.prompt_free.rescored(scorer(self.regions).score_RC)
            shown = Shown.of(scores, threshold=threshold)
            kept = self._prompt_free(query.prompt_free, shown, threshold=threshold, nms_iou=nms_iou, limit=limit)
        return Detections.of(
            kept,
            boxes=self.regions.boxes,
            size=self.regions.size,
            names=query.names,
            best=shown.best,
            threshold=threshold,
            masks=self.regions.masks,
            notices=query.notices,
        )

    def _prompt_free(
        self, words: PromptFreeWords, shown: Shown, *, threshold: float, nms_iou: float, limit: int
    ) -> Candidates:
        """One word for each object; NMS treats a family of words as one class."""
        candidates = best_class_per_region(shown.score_RS, threshold=threshold)
        candidates = replace(candidates, class_id=words.family[shown.classes[candidates.class_id]])
        kept = postprocess(
            self.regions.boxes,
            candidates,
            nms_iou=nms_iou,
            cross_class_iou=PROMPT_FREE_CROSS_CLASS_IOU,
            limit=limit,
        )
        if not len(kept):
            return kept
        return replace(kept, class_id=shown.classes[shown.score_RS[kept.region].argmax(axis=1)])


def picture_key(pixels: NDArray[np.uint8]) -> str:
    """sha256 of a picture's size and pixels."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
