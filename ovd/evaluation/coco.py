# SPDX-License-Identifier: Apache-2.0
"""COCO metrics by base and novel categories.

Matching and precision/recall curves are pycocotools' own; only the averaging is ours, because its summary cannot
average over a group of categories, is tied to 100 detections, and prints. For every mean that both can make, the digits
are equal.

Two numbers with the same words mean different things, so to be exact: `AP*` are per category and averaged over the
categories that have at least one object, with at most `max_dets` detections *per image and category*; `AR*` ignore
categories, with at most 100 or 300 detections *per image*. A mean over nothing is NaN (n/a), not −1 and not 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovd.data.lvis import Federated
from ovd.data.splits import Split
from ovd.evaluation.matching import SHAPE, CocoEntry, group_by, per_category, shaped
from ovd.evaluation.recall import class_agnostic_recall
from ovd.evaluation.results import CheckedResult, Results, check_results
from pretrain.data.coco import Annotation, GroundTruth, check_ground_truth
from pretrain.data.coco_entries import CocoJson

# name -> (index of the IoU threshold or None for the mean of ten, index of COCO's area range: all, small, medium,
# large)
AVERAGES: dict[str, tuple[int | None, int]] = {
    "AP": (None, 0), "AP50": (0, 0), "AP75": (5, 0), "APs": (None, 1), "APm": (None, 2), "APl": (None, 3),
}  # fmt: skip
RECALL_CAPS = (100, 300)
LVIS_DETECTIONS = 300
"""Per image, over all categories (`lvis/results.py`); COCO caps per image and category."""


@dataclass(kw_only=True)
class ClassMetrics:
    """The figures of one category.

    Attributes:
        id, name, split: of the category; ``split`` is its group.
        n_gt, n_det: objects that are no crowds, and detections.
        values: AP, AP50 …, for masks ``segm_AP`` …
    """

    id: int
    name: str
    split: str
    n_gt: int
    n_det: int
    values: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, str | int | float]:
        """Its line of ``per_class.csv``."""
        line: dict[str, str | int | float] = {
            "id": self.id, "class": self.name, "split": self.split, "n_gt": self.n_gt, "n_det": self.n_det
        }  # fmt: skip
        return line | self.values


@dataclass(kw_only=True)
class Metrics:
    """The figures of an evaluation.

    Attributes:
        values: `TYPE/NAME[_base|_novel]` -> value in [0, 1] or NaN where there is nothing to average; TYPE is bbox or
            segm, NAME is AP, AP50, AP75, APs, APm, APl, AR100, AR300 (IoU .5:.95), or AR100…@50 with the `@50` last
            (`bbox/AR100_novel@50`).
        per_class: one row per category of the split.
        split: the split used.
        counts: images, objects and detections that entered, and what was left out.
        warnings: what was odd in the input.
        dataset_sha256: of the ground truth.
    """

    values: dict[str, float]
    per_class: list[ClassMetrics]
    split: Split
    counts: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    dataset_sha256: str = ""


def evaluate(
    gt: CocoJson,
    results: Sequence[CocoJson] | None,
    split: Split | None = None,
    iou_types: Sequence[str] | None = None,
    *,
    max_dets: int = 100,
    proposals: Sequence[CocoJson] | None = None,
    where: tuple[str, str] = ("annotations", "predictions"),
    federated: Federated | None = None,
) -> Metrics:
    """Evaluate COCO-format results.

    Args:
        gt: object with `images`, `annotations`, `categories`; not changed.
        results: list of detections (`image_id`, `category_id`, `score`, `bbox` x, y, w, h and/or `segmentation`); not
            changed. None judges `proposals` alone: no AP.
        split: base and novel categories; None puts all in base. Objects and detections of other categories are left out
            before anything is counted.
        iou_types: `"bbox"`, `"segm"` or both; None takes boxes, and masks where both sides have them.
        max_dets: per image and category, for AP (COCO: 100).
        proposals: class-agnostic boxes with scores, from which AR is computed in place of `results`.
        where: names of the two inputs, for messages.
        federated: the categories annotated in each image; see `ovd.evaluation.lvis`, which passes it.

    Returns:
        metrics. For masks, an object's size is that of its mask, also when the detection carries a box (as Detectron2
        does).

    Raises:
        UserError: anything in the inputs that cannot be evaluated, by entry; masks wanted and not there.
    """
    truth = check_ground_truth(gt, where=where[0])
    split = split or Split.everything(truth.categories)
    split.check_categories(truth.categories, where=where[0])
    inputs = _checked_inputs(results, proposals, truth, split, iou_types, where[1])
    entries = _entries(truth, inputs.detections, split, federated)
    entries.counts["detections_outside_split"] += len(results or ()) - len(inputs.detections)
    rows = _rows(entries, split)
    values: dict[str, float] = {}
    boxes = inputs.proposals
    for kind in dict.fromkeys(inputs.iou_types):
        gts, dts = shaped(truth, entries.annotations, entries.detections, kind, where)
        if results is not None:
            curves = per_category(kind, gts, dts, split, max_dets, federated).values()
            _average_precision(kind, [c.precision() for c in curves], split, values, rows)
        if boxes is None:
            values |= _average_recall(kind, gts, dts, split)
        elif kind == "bbox" or all("segmentation" in d for d in boxes):  # without masks they have no AR of masks
            values |= _average_recall(kind, gts, shaped(truth, entries.annotations, boxes, kind, where)[1], split)
    return Metrics(
        values=values,
        per_class=list(rows.values()),
        split=split,
        counts=entries.counts,
        warnings=[*truth.warnings, *inputs.warnings, *_entry_warnings(entries, truth)],
        dataset_sha256=content_sha256(gt),
    )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Checked results and proposals, and the kinds of IoU that they can be evaluated by."""

    detections: list[CheckedResult]
    proposals: list[CheckedResult] | None
    iou_types: Sequence[str]
    warnings: list[str]


def _checked_inputs(
    results: Sequence[CocoJson] | None,
    proposals: Sequence[CocoJson] | None,
    truth: GroundTruth,
    split: Split,
    iou_types: Sequence[str] | None,
    where: str,
) -> _Inputs:
    """See `evaluate`; ``where`` names the results."""
    checked = Results(detections=[])
    if results is not None or proposals is None:
        missing = set(split.names) - set(truth.categories)
        checked = check_results(results, truth, outside=missing, where=where)
    warnings = list(checked.warnings)
    if iou_types is None:
        iou_types, why = (("bbox",), []) if results is None else _iou_types(truth, checked.detections)
        warnings += why
    boxes = None
    if proposals is not None:
        agnostic = check_results(proposals, truth, where="proposals", classes=False)
        boxes = agnostic.detections
        warnings += [f"proposals: {w}" for w in agnostic.warnings]
    return _Inputs(detections=checked.detections, proposals=boxes, iou_types=iou_types, warnings=warnings)


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """The annotations and detections that are evaluated, and how many there were."""

    annotations: list[Annotation]
    detections: list[CheckedResult]
    counts: dict[str, int]


def _entries(
    truth: GroundTruth, detections: list[CheckedResult], split: Split, federated: Federated | None
) -> _Entries:
    """Objects and detections of the split; under LVIS's protocol the judged ones of each image's best detections."""
    evaluated = set(split.ids)
    annotations = [a for a in truth.annotations if a["category_id"] in evaluated]
    inside = [d for d in detections if d["category_id"] in evaluated]
    judged = inside
    if federated is not None:
        best = [d for d in _best_of_each_image(detections) if d["category_id"] in evaluated]
        judged = [d for d in best if d["category_id"] in federated.judged[d["image_id"]]]
    counts = {
        "images": len(truth.sizes),
        "objects": sum(not a["iscrowd"] for a in annotations),
        "detections": len(judged),
        "objects_outside_split": len(truth.annotations) - len(annotations),
        "detections_outside_split": len(detections) - len(inside),
    }
    if federated is not None:
        counts["detections_not_judged"] = len(best) - len(judged)
    return _Entries(annotations=annotations, detections=judged, counts=counts)


def _entry_warnings(entries: _Entries, truth: GroundTruth) -> list[str]:
    """Warnings: no objects, or images without detections."""
    warnings = []
    if not entries.counts["objects"]:
        warnings.append("no objects of the split's categories: every metric is n/a")
    silent = truth.sizes.keys() - {d["image_id"] for d in entries.detections}
    if entries.detections and silent:
        warnings.append(f"{len(silent)} of {len(truth.sizes)} images have no detections: their objects count as missed")
    return warnings


def _rows(entries: _Entries, split: Split) -> dict[int, ClassMetrics]:
    """The beginning of the table per category: names and counts."""
    objects = Counter(a["category_id"] for a in entries.annotations if not a["iscrowd"])
    detections = Counter(d["category_id"] for d in entries.detections)
    return {
        i: ClassMetrics(id=i, name=split.names[i], split=split.group_of(i), n_gt=objects[i], n_det=detections[i])
        for i in split.ids
    }


def _average_precision(
    kind: str,
    curves: list[NDArray[np.float64]],
    split: Split,
    values: dict[str, float],
    rows: dict[int, ClassMetrics],
) -> None:
    """Write the means of precision curves into ``values``, by group, and into ``rows``, by category.

    Args:
        kind: bbox or segm.
        curves: (IoU thresholds, recalls, area ranges) of each category of the split.
        split: the categories.
        values, rows: see `Metrics`.
    """
    if not curves:
        return
    precision = np.stack(curves, axis=2)
    for name, (t, area) in AVERAGES.items():
        for group, ids in split.groups.items():
            columns = [n for n, i in enumerate(split.ids) if i in ids]
            part = precision[:, :, columns, area]
            values[_key(kind, name, group)] = _mean(part if t is None else part[t])
        for n, i in enumerate(split.ids):
            part = precision[:, :, n, area]
            rows[i].values[name if kind == "bbox" else f"segm_{name}"] = _mean(part if t is None else part[t])


def _average_recall(
    kind: str, gts: Sequence[CocoEntry], detections: Sequence[CocoEntry], split: Split
) -> dict[str, float]:
    """Class-agnostic recall by group and number of detections per image, as keys of `Metrics.values`."""
    values: dict[str, float] = {}
    recall = class_agnostic_recall(
        group_by(gts, "image_id"), group_by(detections, "image_id"), split.groups, shape=SHAPE[kind], caps=RECALL_CAPS
    )
    for group, by_cap in recall.items():
        for cap, recall_T in by_cap.items():
            values[_key(kind, f"AR{cap}", group)] = float(np.mean(recall_T))
            values[_key(kind, f"AR{cap}", group) + "@50"] = float(recall_T[0])
    return values


def content_sha256(content: object) -> str:
    """sha256 of a JSON value's content, whatever its spacing and key order."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


def as_one_category(gt: CocoJson, detections: Iterable[CocoJson]) -> tuple[CocoJson, list[CocoJson]]:
    """Ground truth and results for AP of any thing: every object and every detection is of category 1, "thing".

    Args:
        gt: COCO ground truth.
        detections: COCO results or proposals. A box that comes under several categories counts once, with its best
            score.
    """
    best: dict[tuple[Any, ...], CocoJson] = {}
    for detection in detections:
        key = (detection["image_id"], *detection["bbox"])
        if key not in best or best[key]["score"] < detection["score"]:
            best[key] = {**detection, "category_id": 1}
    objects = [{**a, "category_id": 1} for a in gt["annotations"]]
    return {**gt, "categories": [{"id": 1, "name": "thing"}], "annotations": objects}, list(best.values())


def _iou_types(truth: GroundTruth, detections: list[CheckedResult]) -> tuple[tuple[str, ...], list[str]]:
    """Boxes, and masks where both sides have them; with the warning where only one has."""
    masked = sum("segmentation" in d for d in detections)
    if detections and not masked:
        return ("bbox",), []
    if bare := sum("segmentation" not in a for a in truth.annotations):
        return ("bbox",), [f"masks are not evaluated: {bare} annotations have none"]
    if masked < len(detections):  # a mistake in writing them, more likely than a wish
        return ("bbox",), [f"masks are not evaluated: {len(detections) - masked} detections have none"]
    return ("bbox", "segm"), []


def _best_of_each_image(detections: list[CheckedResult]) -> list[CheckedResult]:
    """The `LVIS_DETECTIONS` best of each image; of equal scores the first."""
    images = group_by(detections, "image_id").values()
    return [d for image in images for d in sorted(image, key=lambda d: -d["score"])[:LVIS_DETECTIONS]]


def _key(kind: str, name: str, group: str) -> str:
    return f"{kind}/{name}" + ("" if group == "all" else f"_{group}")


def _mean(precision: NDArray[np.float64]) -> float:
    real = precision[precision > -1]
    return float(np.mean(real)) if real.size else math.nan


def _jsonable(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot hash a {type(value).__name__}")
