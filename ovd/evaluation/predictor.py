# SPDX-License-Identifier: Apache-2.0
"""A loaded detector as the evaluation sees it: a picture in, COCO results out, by the published protocol.

ViLD's inference (§3.4 and the released code): softmax over the vocabulary and the background, background dropped, no
threshold, per-class NMS at IoU .5, 300 detections per image; objectness is not used. NMS sees the 5,000 best (region,
class) pairs. Scores on the page are others (calibrated, one class at a time); `scores="calibrated"` evaluates those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms

from ovd.data.coco import ImageId
from ovd.data.splits import Split
from ovd.detections import paste_mask
from ovd.inference.ensemble import FIXED_TEXT_WEIGHT, text_exponents
from ovd.inference.scoring import RegionSet, score_regions, vocabulary_probabilities
from ovd.regions.crops import embed_regions
from ovd.regions.proposals import large_enough
from pretrain.data.rle import encode_mask
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.detector import Detector, RegionFinder
    from ovd.evaluation.coco import Predict
    from ovd.modeling.detr.build import DetrRegions
    from ovd.regions.crops import RegionEncoder
    from ovd.regions.proposals import Proposer
    from ovd.vocabulary import Vocabulary

Scores = Literal["published", "calibrated"]
Ensemble = Literal["fixed", "base-novel"]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Calls a detector on one picture after another.

    Attributes:
        detector: loaded.
        category_ids: (C,) COCO id of each word, in the vocabulary's order.
        rows: (C, D) unit text embeddings.
        scores: `published`, or `calibrated` as the page shows them.
        scale: inverse temperature of the published softmax: the one of training, never a fitted one, because fitting
            sees novel labels.
        exponent: of the text head where there are two heads; a number or (C,).
        limit: detections per image.
        candidates: (region, class) pairs that enter NMS.
        nms: IoU of the per-class NMS.
        objectness_weight: w of ``class^(1−w) · objectness^w``; ViLD uses none, CLIP on crops ½.
        present: image id → COCO ids that are asked for in it; None: all of them in every image.
    """

    detector: Detector
    category_ids: tuple[int, ...]
    rows: Tensor
    scores: Scores = "published"
    scale: float = 100.0
    exponent: float | Tensor = FIXED_TEXT_WEIGHT
    limit: int = 300
    candidates: int = 5000
    nms: float = 0.5
    objectness_weight: float = 0.0
    present: Mapping[ImageId, frozenset[int]] | None = None

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[dict[str, Any]]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        columns = asked_columns(self.category_ids, self.present, image_id)
        if not columns:
            return []
        regions = self.detector.embed(image).regions
        score_RC = self.score(regions)[:, columns]
        flat = score_RC.flatten()
        score_K, index_K = flat.topk(min(self.candidates, flat.numel()))
        region_K, class_K = index_K // score_RC.shape[1], index_K % score_RC.shape[1]
        kept = batched_nms(regions.boxes[region_K].float(), score_K.float(), class_K, self.nms)[: self.limit]
        segmentations: dict[int, dict[str, Any]] = {}
        results = []
        for k in kept.tolist():
            region = int(region_K[k])
            one = _result(regions, region, image_id, self.category_ids[columns[int(class_K[k])]], float(score_K[k]))
            if regions.masks is not None:
                if region not in segmentations:
                    segmentations[region] = region_rle(regions, region)
                one["segmentation"] = segmentations[region]
            results.append(one)
        return results

    @torch.inference_mode()
    def propose(self, image: NDArray[np.uint8], image_id: ImageId) -> list[dict[str, Any]]:
        """The same picture's regions as class-agnostic proposals, scored by objectness."""
        regions = self.detector.embed(image).regions
        proposals = [_result(regions, r, image_id, 0, float(regions.objectness[r])) for r in range(len(regions))]
        if regions.masks is not None:
            for region, one in enumerate(proposals):
                one["segmentation"] = region_rle(regions, region)
        return proposals

    def score(self, regions: RegionSet) -> Tensor:
        """(R, C) scores of all regions."""
        score_RC = self._class_scores(regions)
        if self.objectness_weight:
            weight = self.objectness_weight
            score_RC = score_RC ** (1 - weight) * regions.objectness.to(score_RC)[:, None].clamp(0, 1) ** weight
        return score_RC

    def _class_scores(self, regions: RegionSet) -> Tensor:
        model = self.detector.model
        background = None if model.background is None else model.background.to(self.rows)
        heads = regions.text.to(self.rows), None if regions.image is None else regions.image.to(self.rows)
        if self.scores == "calibrated":
            objectness = regions.objectness.to(self.rows)
            return score_regions(*heads, objectness, self.rows, model.bank.to(self.rows), background, model.calibration)
        return vocabulary_probabilities(*heads, self.rows, background, scale=self.scale, exponent=self.exponent)


def asked_columns(
    category_ids: Sequence[int], present: Mapping[ImageId, frozenset[int]] | None, image_id: ImageId
) -> list[int]:
    """Numbers of the classes that are asked for in an image."""
    if present is None:
        return list(range(len(category_ids)))
    return [column for column, category in enumerate(category_ids) if category in present[image_id]]


class CropModel:
    """A detector's boxes, named by the image encoder itself from their crops: "CLIP on cropped regions" (ViLD §3.2).

    It knows no background, so a region of nothing is always something; `predictor_for` multiplies objectness in.

    Args:
        model: gives boxes, objectness and masks.
        encoder: embeds the crops, 1x and 1.5x summed as for the distillation.
    """

    background: Tensor | None = None
    objectness_weight = 0.5

    def __init__(self, *, model: RegionFinder, encoder: RegionEncoder) -> None:
        self.model, self.encoder = model, encoder
        self.bank, self.calibration = model.bank, model.calibration
        self.top: int | None = getattr(model, "top", None)

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """The model's regions with the encoder's embeddings; boxes under two pixels cannot be cropped."""
        found = self.model.regions(image)
        keep = large_enough(found.boxes)
        embedding = embed_regions(self.encoder, image, found.boxes[keep])
        return replace(
            found,
            boxes=found.boxes[keep],
            objectness=found.objectness[keep],
            text=embedding,
            image=None,
            masks=None if found.masks is None else found.masks[keep],
        )


class ToldModel:
    """A transformer whose queries are told the words that are looked for, some at a time (OV-DETR's inference).

    Args:
        model: trained with ``model.conditioned``.
        rows: (C, D) embeddings of the words, or of crops.
        at_once: words per pass, as in training.
    """

    def __init__(self, *, model: DetrRegions, rows: Tensor, at_once: int) -> None:
        self.model, self.rows, self.at_once = model, rows, at_once
        self.bank, self.calibration, self.background = model.bank, model.calibration, model.background
        self.objectness_weight = model.objectness_weight

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """Regions that the told queries found."""
        return self.model.told_regions(image, self.rows, at_once=self.at_once)


@dataclass(frozen=True, kw_only=True)
class ClosedPredictor:
    """A detector of a closed list of classes: each query is its most likely class.

    Attributes:
        model: has ``labels``.
        category_ids: (C,) COCO id of each class, in the model's order; -1: not evaluated.
        limit: detections per image.
    """

    model: DetrRegions
    category_ids: tuple[int, ...]
    limit: int = 300

    @classmethod
    def of(cls, model: DetrRegions, split: Split, *, limit: int) -> ClosedPredictor:
        """Classes are told by their names.

        Raises:
            UserError: none of them is a category of the split.
        """
        by_name = {split.names[i].casefold(): i for i in split.ids}
        ids = tuple(by_name.get(name.casefold(), -1) for name in model.card.classes)
        if all(i < 0 for i in ids):
            raise UserError(
                f"this detector knows {', '.join(model.card.classes[:5])} …; none is a category of split {split.name!r}"
            )
        return cls(model=model, category_ids=ids, limit=limit)

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[dict[str, Any]]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        boxes, scores, classes = self.model.labels(image)
        order = scores.argsort(descending=True).tolist()
        named = [k for k in order if self.category_ids[int(classes[k])] >= 0][: self.limit]
        return [
            coco_result(boxes[k].tolist(), image_id, self.category_ids[int(classes[k])], float(scores[k]))
            for k in named
        ]


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
        scores, scale: see `Predictor`.
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
            raise UserError("vocabulary: negative words have no place in an evaluation; remove the minus entries.")
        ids = tuple(by_name[n.casefold()] for n in vocabulary.names)
    exponent: float | Tensor = FIXED_TEXT_WEIGHT
    if ensemble == "base-novel":
        exponent = text_exponents(torch.tensor([split.group_of(i) == "base" for i in ids]))
    rows = detector.text.embed(vocabulary)
    return Predictor(
        detector=detector,
        category_ids=ids,
        rows=rows,
        scores=scores,
        scale=scale,
        exponent=exponent,
        limit=limit,
        # A model whose embeddings do not say that a region is nothing says it by its objectness.
        objectness_weight=float(getattr(detector.model, "objectness_weight", 0.0)),
    )


def proposal_predictor(folder: Path, *, top: int, device: str = "cpu") -> Predict:
    """`proposals_of` an exported detector of any kind, class-agnostic ones too.

    Args:
        folder: of the detector.
        top: how many, the best first.
        device: where it runs.

    Raises:
        UserError: see :func:`ovd.modeling.vild.build.load_model`.
    """
    from ovd.modeling.load import load_proposer

    return proposals_of(load_proposer(folder, device=device), top=top)


def proposals_of(model: Proposer, *, top: int) -> Predict:
    """Proposals without classes: what `run_source` and `run_images` take as ``propose``."""

    def propose(image: NDArray[np.uint8], image_id: ImageId) -> list[dict[str, Any]]:
        boxes, scores = model.propose(image, top=top)
        pairs = zip(np.asarray(boxes).tolist(), np.asarray(scores).tolist(), strict=True)
        return [coco_result(box, image_id, 0, score) for box, score in pairs]

    return propose


def region_rle(regions: RegionSet, index: int) -> dict[str, Any]:
    """Compressed run lengths, as JSON holds them, of one region's mask at the size of the picture."""
    if regions.masks is None:
        raise ValueError("these regions have no masks")
    return encode_mask(paste_mask(regions.masks[index], regions.boxes[index], regions.size).numpy())


def _result(regions: RegionSet, region: int, image_id: ImageId, category_id: int, score: float) -> dict[str, Any]:
    return coco_result(regions.boxes[region].tolist(), image_id, category_id, score)


def coco_result(corners: Sequence[float], image_id: ImageId, category_id: int, score: float) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    # Six significant digits keep the order of scores as small as softmax over a thousand words makes them.
    box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(f"{score:.6g}")}
