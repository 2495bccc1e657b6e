# SPDX-License-Identifier: Apache-2.0
"""A loaded detector as the evaluation sees it: a picture in, COCO results out, by the published protocol.

ViLD's inference (§3.4 and the released code): softmax over the vocabulary and the background, background dropped, no
threshold, per-class NMS at IoU .5, 300 detections per image; objectness is not used. NMS sees the 5,000 best (region,
class) pairs. Scores on the page are others (calibrated, one class at a time); `scores="calibrated"` evaluates those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ovd.data.splits import Split
from ovd.detections import CocoResult, paste_mask
from ovd.inference.arrays import Floats, best_first, one_blas_thread
from ovd.inference.ensemble import FIXED_TEXT_WEIGHT, text_exponents
from ovd.inference.postprocess import (
    MAX_DETECTIONS,
    PROTOCOL_CANDIDATES,
    PROTOCOL_NMS_IOU,
    Candidates,
    best_pairs,
    best_per_class,
    postprocess,
    soft_nms,
)
from ovd.inference.scorers import ObjectnessScorer, PublishedScorer, Scorer
from ovd.inference.scoring import RegionSet
from pretrain.data.coco import ImageId
from pretrain.data.masks import JsonRle, encode_mask
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.detector import Detector
    from ovd.evaluation.run import Predict
    from ovd.inference.detr_regions import ClosedSetDetr
    from ovd.inference.region_model import PatchLocator
    from ovd.regions.proposals import Proposer
    from ovd.vocabulary import Vocabulary

Scores = Literal["published", "calibrated"]
Ensemble = Literal["fixed", "base-novel"]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Runs a detector on one picture after another.

    Attributes:
        detector: gives the regions.
        category_ids: (C,) COCO id of each class.
        scorer: scores the regions for these classes.
        limit: detections per image.
        candidates: (region, class) pairs that enter NMS.
        per_class: regions of each class that enter NMS, in place of ``candidates``; None: those.
        nms_iou: of the per-class NMS.
        soft_nms: sigma of Soft-NMS, which takes its place; None: NMS.
        present: image id → COCO ids that are looked for in it; None: all of them in every image.
    """

    detector: Detector
    category_ids: tuple[int, ...]
    scorer: Scorer
    limit: int = MAX_DETECTIONS
    candidates: int = PROTOCOL_CANDIDATES
    per_class: int | None = None
    nms_iou: float = PROTOCOL_NMS_IOU
    soft_nms: float | None = None
    present: Mapping[ImageId, frozenset[int]] | None = None

    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        columns = columns_for(self.category_ids, self.present, image_id)
        if not columns:
            return []
        regions = self.detector.embed(image).regions
        with one_blas_thread:
            score_RC = self.scorer(regions)[:, columns]
        chosen = self._chosen(regions.boxes, score_RC)
        drawn = set() if regions.masks is None else set(chosen.region.tolist())
        segmentations = {region: region_rle(regions, region) for region in drawn}
        results = coco_results(chosen, regions.boxes, image_id, [self.category_ids[column] for column in columns])
        for region, result in zip(chosen.region.tolist(), results, strict=True):
            if region in segmentations:
                result["segmentation"] = segmentations[region]
        return results

    def _chosen(self, boxes: Floats, score_RC: Floats) -> Candidates:
        """What is left of all (region, class) pairs."""
        if self.soft_nms is not None:
            return best_pairs(soft_nms(boxes, score_RC, sigma=self.soft_nms), count=self.limit)
        if self.per_class is None:
            candidates = best_pairs(score_RC, count=self.candidates)
        else:
            candidates = best_per_class(score_RC, count=self.per_class)
        return postprocess(boxes, candidates, nms_iou=self.nms_iou, cross_class_iou=None, limit=self.limit)

    def propose(self, image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        """The same picture's regions as class-agnostic proposals, scored by objectness."""
        regions = self.detector.embed(image).regions
        scored = np.column_stack([regions.boxes, regions.objectness])
        once = np.sort(np.unique(scored, axis=0, return_index=True)[1])  # fine-tuned classes may share a box
        proposals = []
        for region, (*box, score) in zip(once.tolist(), scored[once].tolist(), strict=True):
            proposal = coco_result(box, image_id, 0, score)
            if regions.masks is not None:
                proposal["segmentation"] = region_rle(regions, region)
            proposals.append(proposal)
        return proposals


@dataclass(frozen=True, kw_only=True)
class PretextPredictor:
    """A UP-DETR pretext model whose queries are conditioned on crops; a score is the query's objectness.

    Attributes:
        model: of the pretext.
        category_ids: (C,) COCO id of each row.
        rows: (C, D) embeddings of the crops, see `ovd.Detector.patch_rows`.
        nms_iou: of the per-class NMS.
        limit, present: see `Predictor`.
    """

    model: PatchLocator
    category_ids: tuple[int, ...]
    rows: Floats
    nms_iou: float
    limit: int = MAX_DETECTIONS
    present: Mapping[ImageId, frozenset[int]] | None = None

    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        columns = columns_for(self.category_ids, self.present, image_id)
        if not columns:
            return []
        located = self.model.locate(image, self.rows[columns])
        score = located.score
        chosen = postprocess(
            located.boxes,
            Candidates(np.arange(len(score)), located.class_id, score),
            nms_iou=self.nms_iou,
            cross_class_iou=None,
            limit=self.limit,
        )
        return coco_results(chosen, located.boxes, image_id, [self.category_ids[column] for column in columns])


@dataclass(frozen=True, kw_only=True)
class ClosedSetPredictor:
    """A detector of a closed list of classes: each query is its most likely class.

    Attributes:
        model: a transformer.
        category_ids: (C,) COCO id of each class, in the model's order; -1: not evaluated.
        limit: detections per image.
    """

    model: ClosedSetDetr
    category_ids: tuple[int, ...]
    limit: int = MAX_DETECTIONS

    @classmethod
    def of(cls, model: ClosedSetDetr, split: Split, *, limit: int) -> ClosedSetPredictor:
        """Match classes with categories by name.

        Raises:
            UserError: none of them is a category of the split.
        """
        by_name = {split.names[i].casefold(): i for i in split.ids}
        ids = tuple(by_name.get(name.casefold(), -1) for name in model.classes)
        if all(i < 0 for i in ids):
            raise UserError(
                f"this detector knows {', '.join(model.classes[:5])} …; none is a category of split {split.name!r}"
            )
        return cls(model=model, category_ids=ids, limit=limit)

    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        boxes, scores, classes = self.model.labels(image)
        order = best_first(scores)
        chosen = Candidates(order, classes[order], scores[order])
        evaluated = np.array(self.category_ids)[chosen.class_id] >= 0
        return coco_results(chosen[evaluated][: self.limit], boxes, image_id, self.category_ids)


def columns_for(
    category_ids: Sequence[int], present: Mapping[ImageId, frozenset[int]] | None, image_id: ImageId
) -> list[int]:
    """Numbers of the classes that are evaluated in an image."""
    if present is None:
        return list(range(len(category_ids)))
    return [column for column, category in enumerate(category_ids) if category in present[image_id]]


def predictor_for(
    detector: Detector,
    split: Split,
    *,
    vocabulary: Vocabulary | None = None,
    categories: Mapping[int, str] | None = None,
    ensemble: Ensemble = "fixed",
    scores: Scores = "published",
    scale: float = 100.0,
    limit: int = 300,
) -> Predictor:
    """A predictor whose words are the names of a split's categories.

    Args:
        detector: loaded.
        split: its categories are the vocabulary (the *generalised* setting: base and novel compete).
        vocabulary: words with synonyms and templates in place of the bare names; every word must be the name of one of
            `categories`, categories that it leaves out are never detected.
        categories: id -> name; those of the split when None.
        ensemble: `base-novel` weighs the two heads by group, which needs to know what is novel, as ViLD's evaluation
            does; `fixed` is one weight for all, as for typed words. Without a second head both are the same.
        scores: `published`, or `calibrated` as the page shows them; models without such a softmax have only these.
        scale: inverse temperature of the published softmax.
        limit: detections per image.

    Raises:
        UserError: a word that names no category.
    """
    from ovd.vocabulary import Vocabulary

    names = {i: split.names[i] for i in split.ids} if categories is None else dict(categories)
    if vocabulary is None:
        vocabulary, ids = Vocabulary.of(names.values(), templates=detector.templates), tuple(names)
    else:
        by_name = {name.casefold(): i for i, name in names.items()}
        if unknown := [n for n in vocabulary.names if n.casefold() not in by_name]:
            raise UserError(f"vocabulary: {unknown[0]!r} is not a category of split {split.name!r}.")
        if vocabulary.negatives:
            raise UserError("vocabulary: an evaluation has no negative words; remove the entries with a minus.")
        ids = tuple(by_name[n.casefold()] for n in vocabulary.names)
    rows, model = detector.text.embed(vocabulary), detector.model
    background = model.background
    scorer: Scorer
    if scores == "calibrated" or not model.has_published_protocol:
        scorer = model.scorer(rows, [c.phrases for c in vocabulary.classes], model.background_words)
    else:
        exponent: float | Floats = FIXED_TEXT_WEIGHT
        if ensemble == "base-novel":
            exponent = text_exponents(np.array([split.group_of(i) == "base" for i in ids]))
        scorer = PublishedScorer(rows=rows, background=background, scale=scale, exponent=exponent)
    if model.objectness_weight:  # the embedding alone does not say that a region is nothing
        scorer = ObjectnessScorer(scorer=scorer, weight=model.objectness_weight)
    return Predictor(detector=detector, category_ids=ids, scorer=scorer, limit=limit)


def proposals_of(model: Proposer, *, top: int) -> Predict:
    """Proposals without classes: what `run_source` and `run_images` take as ``propose``."""

    def propose(image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        boxes, scores = model.propose(image, top=top)
        pairs = zip(np.asarray(boxes).tolist(), np.asarray(scores).tolist(), strict=True)
        return [coco_result(box, image_id, 0, score) for box, score in pairs]

    return propose


def coco_results(
    candidates: Candidates, boxes: Floats, image_id: ImageId, category_ids: Sequence[int]
) -> list[CocoResult]:
    """Rows of a COCO results file; ``boxes`` are those of all regions, ``category_ids`` of all classes."""
    return [
        coco_result(boxes[region].tolist(), image_id, category_ids[class_id], score)
        for region, class_id, score in zip(
            candidates.region.tolist(), candidates.class_id.tolist(), candidates.score.tolist(), strict=True
        )
    ]


def region_rle(regions: RegionSet, index: int) -> JsonRle:
    """Compressed run lengths, as JSON holds them, of one region's mask at the size of the picture."""
    if regions.masks is None:
        raise ValueError("these regions have no masks")
    return encode_mask(paste_mask(regions.masks[index], regions.boxes[index], regions.size))


def coco_result(corners: Sequence[float], image_id: ImageId, category_id: int, score: float) -> CocoResult:
    """One row of a COCO results file; corners are x1, y1, x2, y2 in pixels."""
    x1, y1, x2, y2 = corners
    # Six significant digits keep the order of scores as small as softmax over a thousand words makes them.
    box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(f"{score:.6g}")}
