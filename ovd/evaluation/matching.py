# SPDX-License-Identifier: Apache-2.0
"""COCO's matching of detections with objects, one category at a time; pycocotools does it."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools
from pycocotools.cocoeval import COCOeval

from ovd.data.lvis import Federated
from ovd.data.splits import Split
from ovd.evaluation.results import CheckedResult, check_results
from pretrain.data.coco import Annotation, GroundTruth, check_ground_truth
from pretrain.data.coco_entries import CocoJson, ImageId
from pretrain.data.masks import Rle, to_rle
from pretrain.engine.errors import UserError

SHAPE = {"bbox": "bbox", "segm": "segmentation"}
T = TypeVar("T", bound=Mapping[str, object])


class _Shape(TypedDict, total=False):
    bbox: list[float]
    segmentation: Rle
    score: float
    ignore: int


class CocoEntry(_Shape):
    """An object or a detection as pycocotools compares them: with `bbox` or `segmentation`, a detection with `score`.

    ``id`` counts from 1; 0 means "unmatched".
    """

    id: int
    image_id: ImageId
    category_id: int
    area: float
    iscrowd: int


class MatchedImage(TypedDict):
    """pycocotools' record of one image and category; n detections, m objects, T IoU thresholds."""

    image_id: ImageId
    category_id: int
    aRng: list[float]
    maxDet: int
    dtIds: list[int]
    gtIds: list[int]
    dtMatches: NDArray[np.float64]  # (T, n) id of the object, 0: none
    gtMatches: NDArray[np.float64]  # (T, m) id of the detection, 0: none
    dtScores: list[float]
    gtIgnore: NDArray[np.float64]  # (m,)
    dtIgnore: NDArray[np.bool_]  # (T, n)


@dataclass(frozen=True, kw_only=True)
class CategoryMatches:
    """One category's detections with their fate at one IoU threshold, in the order of images, then of scores.

    Attributes:
        image: (n,) position of the image among the sorted image ids.
        score: (n,) as given.
        correct: (n,) matched to an object.
        ignored: (n,) matched to a crowd: counts neither way.
        objects: (images,) number of objects to be found.
    """

    image: NDArray[np.int64]
    score: NDArray[np.float64]
    correct: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int64]


def match_table(
    gt: CocoJson,
    results: Sequence[CocoJson],
    split: Split | None = None,
    *,
    iou_type: str = "bbox",
    iou: float = 0.5,
    max_dets: int = 100,
    where: tuple[str, str] = ("annotations", "predictions"),
) -> dict[int, CategoryMatches]:
    """Which detections are correct, by category: what calibration, curves and the bootstrap are computed from.

    Args:
        iou: one of COCO's ten thresholds, .5 to .95.

    Other arguments and errors as `evaluate`. Categories without objects are included.
    """
    truth = check_ground_truth(gt, where=where[0])
    split = split or Split.everything(truth.categories)
    split.check_categories(truth.categories, where=where[0])
    missing = set(split.names) - set(truth.categories)
    checked = check_results(results, truth, outside=missing, where=where[1])
    evaluated = set(split.ids)
    gts, dts = shaped(
        truth,
        [a for a in truth.annotations if a["category_id"] in evaluated],
        [d for d in checked.detections if d["category_id"] in evaluated],
        iou_type,
        where,
    )
    position = {image_id: n for n, image_id in enumerate(truth.sizes)}
    t = round((iou - 0.5) / 0.05)
    if not 0 <= t <= 9 or abs(0.5 + 0.05 * t - iou) > 1e-9:
        raise ValueError(f"iou must be one of .50, .55 … .95, is {iou}")
    return {i: c.matches(t, position) for i, c in per_category(iou_type, gts, dts, split, max_dets).items()}


def shown_at(matches: Iterable[CategoryMatches], *, threshold: float) -> tuple[float, float]:
    """(share of the boxes that reach a threshold and are right, share of the objects that have such a box).

    Boxes on crowds count neither way.
    """
    right = shown = objects = 0
    for one in matches:
        seen = (one.score >= threshold) & ~one.ignored
        right += int(one.correct[seen].sum())
        shown += int(seen.sum())
        objects += int(one.objects.sum())
    return right / max(1, shown), right / max(1, objects)


def shaped(
    truth: GroundTruth,
    annotations: Sequence[Annotation],
    detections: Sequence[CheckedResult],
    kind: str,
    where: tuple[str, str] = ("annotations", "predictions"),
) -> tuple[list[CocoEntry], list[CocoEntry]]:
    """Objects and detections with the shape and area that one kind of evaluation compares.

    Returns:
        objects with the file's area; detections with their own, of the box or of the mask.

    Raises:
        UserError: masks wanted, and an object or a detection without one.
    """
    if kind not in SHAPE:
        raise ValueError(f"iou type must be bbox or segm, is {kind!r}")
    gts = [_object(a) for a in annotations]
    dts = [_detection(d, n) for n, d in enumerate(detections, 1)]
    if kind == "bbox":
        for dt, d in zip(dts, detections, strict=True):
            dt["bbox"] = d["bbox"] if "bbox" in d else mask_tools.toBbox(d["segmentation"]).tolist()
            dt["area"] = dt["bbox"][2] * dt["bbox"][3]
        return gts, dts
    for gt, a in zip(gts, annotations, strict=True):
        entry = f"{where[0]}: annotations[{a['id'] - 1}]"
        if "segmentation" not in a:
            raise UserError(f"{entry} has no segmentation; evaluate boxes only.")
        gt["segmentation"] = to_rle(a["segmentation"], truth.sizes[a["image_id"]], entry)
    for dt, d in zip(dts, detections, strict=True):
        if "segmentation" not in d:
            raise UserError(
                f"{where[1]}: a detection of image {d['image_id']!r} has no segmentation; evaluate boxes only."
            )
        dt["segmentation"], dt["area"] = d["segmentation"], float(mask_tools.area(d["segmentation"]))
    return gts, dts


def _object(a: Annotation) -> CocoEntry:
    return {
        "id": a["id"], "image_id": a["image_id"], "category_id": a["category_id"],
        "bbox": a["bbox"], "area": a["area"], "iscrowd": a["iscrowd"],
    }  # fmt: skip


def _detection(d: CheckedResult, number: int) -> CocoEntry:
    return {
        "id": number, "image_id": d["image_id"], "category_id": d["category_id"],
        "score": d["score"], "area": 0.0, "iscrowd": 0,
    }  # fmt: skip


class CategoryEvaluation(COCOeval):
    """pycocotools on one category and the images that hold it: of hundreds of categories, most cells are empty."""

    def __init__(
        self,
        kind: str,
        gts: list[CocoEntry],
        dts: list[CocoEntry],
        category_id: int,
        max_dets: int,
        incomplete: frozenset[ImageId] = frozenset(),
    ) -> None:
        super().__init__(None, None, kind)
        self.incomplete = incomplete  # images where objects of the category may be unlabelled
        self.gt_entries, self.dt_entries = gts, dts
        self.params.imgIds = sorted({a["image_id"] for a in self.gt_entries} | {d["image_id"] for d in self.dt_entries})
        self.params.catIds = [category_id]
        self.params.maxDets = [max_dets]

    def _prepare(self) -> None:
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for a in self.gt_entries:
            self._gts[a["image_id"], a["category_id"]].append({**a, "ignore": a["iscrowd"]})
        for d in self.dt_entries:
            self._dts[d["image_id"], d["category_id"]].append(d)

    def evaluateImg(self, imgId: ImageId, catId: int, aRng: list[float], maxDet: int) -> MatchedImage | None:
        """As COCO's; where the labels are incomplete, a detection that matches nothing counts neither way."""
        entry = self._evaluate_image(imgId, catId, aRng, maxDet)
        if entry is not None and imgId in self.incomplete:
            entry["dtIgnore"] = np.logical_or(entry["dtIgnore"], entry["dtMatches"] == 0)
        return entry

    def _evaluate_image(self, imgId: ImageId, catId: int, aRng: list[float], maxDet: int) -> MatchedImage | None:
        """A shortcut for images without an object of the category (most of them): nothing can match."""
        if self._gts.get((imgId, catId)):
            return super().evaluateImg(imgId, catId, aRng, maxDet)
        dts = sorted(self._dts.get((imgId, catId), ()), key=lambda d: -d["score"])[
            :maxDet
        ]  # stable, as COCO's mergesort
        if not dts:
            return None
        T = len(self.params.iouThrs)
        too_small_or_large = np.array([d["area"] < aRng[0] or d["area"] > aRng[1] for d in dts])
        return {
            "image_id": imgId, "category_id": catId, "aRng": aRng, "maxDet": maxDet,
            "dtIds": [d["id"] for d in dts], "gtIds": [], "dtScores": [d["score"] for d in dts],
            "dtMatches": np.zeros((T, len(dts))), "gtMatches": np.zeros((T, 0)), "gtIgnore": np.zeros(0),
            "dtIgnore": too_small_or_large[None].repeat(T, axis=0),
        }  # fmt: skip

    def precision(self) -> NDArray[np.float64]:
        """(10 IoU thresholds, 101 recalls, 4 area ranges); −1 where there is no object."""
        if not self.gt_entries:
            return np.full((10, 101, 4), -1.0)
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluate()
            self.accumulate()
        return np.asarray(self.eval["precision"])[:, :, 0, :, 0]

    def matches(self, t: int, position: Mapping[ImageId, int]) -> CategoryMatches:
        """Detections with their fate at IoU threshold number `t`, all sizes."""
        self.params.areaRng, self.params.areaRngLbl = self.params.areaRng[:1], self.params.areaRngLbl[:1]
        objects = np.zeros(len(position), dtype=np.int64)
        for a in self.gt_entries:
            objects[position[a["image_id"]]] += not a["iscrowd"]
        cells: list[MatchedImage] = []
        if self.params.imgIds:
            with contextlib.redirect_stdout(io.StringIO()):
                self.evaluate()
            cells = [e for e in self.evalImgs if e is not None]
        empty = [np.zeros(0)]
        ignored = np.concatenate([e["dtIgnore"][t] for e in cells] or empty).astype(bool)
        matched = np.concatenate([e["dtMatches"][t] for e in cells] or empty) > 0
        return CategoryMatches(
            image=np.concatenate([np.full(len(e["dtScores"]), position[e["image_id"]]) for e in cells] or empty).astype(
                np.int64
            ),
            score=np.concatenate([e["dtScores"] for e in cells] or empty).astype(np.float64),
            correct=matched & ~ignored,
            ignored=ignored,
            objects=objects,
        )


def per_category(
    kind: str,
    gts: list[CocoEntry],
    dts: list[CocoEntry],
    split: Split,
    max_dets: int,
    federated: Federated | None = None,
) -> dict[int, CategoryEvaluation]:
    by_gt, by_dt = group_by(gts, "category_id"), group_by(dts, "category_id")
    incomplete: defaultdict[int, set[ImageId]] = defaultdict(set)
    for image_id, categories in federated.incomplete.items() if federated is not None else ():
        for category in categories:
            incomplete[category].add(image_id)
    return {i: CategoryEvaluation(kind, by_gt[i], by_dt[i], i, max_dets, frozenset(incomplete[i])) for i in split.ids}


def group_by(entries: Iterable[T], key: str) -> defaultdict[Any, list[T]]:
    """The entries by their value of a key, in their order."""
    grouped: defaultdict[Any, list[T]] = defaultdict(list)
    for e in entries:
        grouped[e[key]].append(e)
    return grouped
