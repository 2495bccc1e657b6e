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

import contextlib
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools
from pycocotools.cocoeval import COCOeval

from ovd.data.coco import Annotation, GroundTruth, ImageId, Results, check_ground_truth, check_results, picture_file
from ovd.data.lvis import Federated
from ovd.data.masks import to_rle
from ovd.data.splits import Split
from ovd.evaluation.recall import class_agnostic_recall
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.scenes import SceneSource

SHAPE = {"bbox": "bbox", "segm": "segmentation"}
# name -> (index of the IoU threshold or None for the mean of ten, index of COCO's area range: all, small, medium,
# large)
AVERAGES: dict[str, tuple[int | None, int]] = {
    "AP": (None, 0), "AP50": (0, 0), "AP75": (5, 0), "APs": (None, 1), "APm": (None, 2), "APl": (None, 3),
}  # fmt: skip
RECALL_CAPS = (100, 300)
LVIS_DETECTIONS = 300
"""Per image, over all categories (`lvis/results.py`); COCO caps per image and category."""

Predict = Callable[[NDArray[np.uint8], ImageId], list[dict[str, Any]]]


@dataclass(kw_only=True)
class Metrics:
    """What an evaluation found.

    Attributes:
        values: `TYPE/NAME[_base|_novel]` -> value in [0, 1] or NaN where there is nothing to average; TYPE is bbox or
            segm, NAME is AP, AP50, AP75, APs, APm, APl, AR100, AR300 (IoU .5:.95), or AR100…@50 with the `@50` last
            (`bbox/AR100_novel@50`).
        per_class: one row per category of the split: id, class, split, n_gt, n_det, then the values of each type.
        split: the split used.
        counts: images, objects and detections that entered, and what was left out.
        warnings: what was odd in the input.
        dataset_sha256: of the ground truth.
    """

    values: dict[str, float]
    per_class: list[dict[str, Any]]
    split: Split
    counts: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    dataset_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Matches:
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


def evaluate(
    gt: Mapping[str, Any],
    results: list[dict[str, Any]] | None,
    split: Split | None = None,
    iou_types: Sequence[str] | None = None,
    *,
    max_dets: int = 100,
    proposals: list[dict[str, Any]] | None = None,
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
        federated: what was looked at in each image; see `ovd.evaluation.lvis`, which passes it.

    Returns:
        Metrics. For masks, an object's size is that of its mask, also when the detection carries a box (as Detectron2
        does).

    Raises:
        UserError: anything in the inputs that cannot be evaluated, by entry; masks wanted and not there.
    """
    truth = check_ground_truth(gt, where=where[0])
    split = split or Split.everything(truth.categories)
    split.check_categories(truth.categories, where=where[0])
    known = set(split.names) - set(truth.categories)
    checked = Results(detections=[])
    if results is not None or proposals is None:
        checked = check_results(results, truth, outside=known, where=where[1])
    warnings = [*truth.warnings, *checked.warnings]
    if iou_types is None and results is None:
        iou_types = ("bbox",)
    elif iou_types is None:
        iou_types, why = _kinds(truth, checked.detections)
        warnings += why
    boxes = None
    if proposals is not None:
        agnostic = check_results(proposals, truth, where="proposals", classes=False)
        warnings += [f"proposals: {w}" for w in agnostic.warnings]
        boxes = agnostic.detections

    evaluated = set(split.ids)
    annotations = [a for a in truth.annotations if a["category_id"] in evaluated]
    detections = [d for d in checked.detections if d["category_id"] in evaluated]
    unjudged = 0
    if federated is not None:
        best = [d for d in _best_of_each_image(checked.detections) if d["category_id"] in evaluated]
        detections = [d for d in best if d["category_id"] in federated.judged[d["image_id"]]]
        unjudged = len(best) - len(detections)
    counts = {
        "images": len(truth.sizes),
        "objects": sum(not a["iscrowd"] for a in annotations),
        "detections": len(detections),
        "objects_outside_split": len(truth.annotations) - len(annotations),
        "detections_outside_split": len(results or ()) - sum(d["category_id"] in evaluated for d in checked.detections),
    }
    if federated is not None:
        counts["detections_not_judged"] = unjudged
    if not counts["objects"]:
        warnings.append("no objects of the split's categories: every metric is n/a")
    if detections and len(silent := truth.sizes.keys() - {d["image_id"] for d in detections}):
        warnings.append(f"{len(silent)} of {len(truth.sizes)} images have no detections: their objects count as missed")

    rows: dict[int, dict[str, Any]] = {
        i: {"id": i, "class": split.names[i], "split": split.group_of(i), "n_gt": 0, "n_det": 0} for i in split.ids
    }
    for a in annotations:
        rows[a["category_id"]]["n_gt"] += not a["iscrowd"]
    for d in detections:
        rows[d["category_id"]]["n_det"] += 1

    values: dict[str, float] = {}
    for kind in dict.fromkeys(iou_types):
        gts, dts = shaped(truth, annotations, detections, kind, where)
        named = [] if results is None else [*_categories(kind, gts, dts, split, max_dets, federated).values()]
        precision = np.stack([c.precision() for c in named], axis=2) if named else np.zeros(0)
        for name, (t, area) in AVERAGES.items() if named else ():
            for group, ids in split.groups.items():
                columns = [n for n, i in enumerate(split.ids) if i in ids]
                curves = precision[:, :, columns, area]
                values[_key(kind, name, group)] = _mean(curves if t is None else curves[t])
            for n, i in enumerate(split.ids):
                one = precision[:, :, n, area]
                rows[i][name if kind == "bbox" else f"segm_{name}"] = _mean(one if t is None else one[t])
        if boxes is not None and kind == "segm" and not all("segmentation" in d for d in boxes):
            continue  # proposals without masks say nothing about masks
        pool = dts if boxes is None else shaped(truth, annotations, boxes, kind, where)[1]
        recall = class_agnostic_recall(
            _by(gts, "image_id"), _by(pool, "image_id"), split.groups, shape=SHAPE[kind], caps=RECALL_CAPS
        )
        for group, by_cap in recall.items():
            for cap, recall_T in by_cap.items():
                values[_key(kind, f"AR{cap}", group)] = float(np.mean(recall_T))
                values[_key(kind, f"AR{cap}", group) + "@50"] = float(recall_T[0])
    return Metrics(
        values=values,
        per_class=list(rows.values()),
        split=split,
        counts=counts,
        warnings=warnings,
        dataset_sha256=content_sha256(gt),
    )


def match_table(
    gt: Mapping[str, Any],
    results: list[dict[str, Any]],
    split: Split | None = None,
    *,
    iou_type: str = "bbox",
    iou: float = 0.5,
    max_dets: int = 100,
    where: tuple[str, str] = ("annotations", "predictions"),
) -> dict[int, Matches]:
    """Which detections are correct, by category: what calibration, curves and the bootstrap are computed from.

    Args:
        iou: one of COCO's ten thresholds, .5 to .95.

    Other arguments and errors as `evaluate`. Categories without objects are included.
    """
    truth = check_ground_truth(gt, where=where[0])
    split = split or Split.everything(truth.categories)
    split.check_categories(truth.categories, where=where[0])
    known = set(split.names) - set(truth.categories)
    checked = check_results(results, truth, outside=known, where=where[1])
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
    return {i: c.matches(t, position) for i, c in _categories(iou_type, gts, dts, split, max_dets).items()}


def evaluate_source(
    source: SceneSource,
    predict: Predict | None,
    split: Split | None = None,
    iou_types: Sequence[str] | None = None,
    *,
    propose: Predict | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Run a model over generated scenes and evaluate it; nothing touches the disk.

    Args:
        source: scenes with all labels; scene `index` becomes image id `index + 1`.
        predict: `(image uint8 (H, W, 3) RGB, image_id) -> COCO results of that image`; None judges `propose` alone.
        split: base and novel; None takes the shipped split of the source's nouns.
        iou_types: as `evaluate`.
        propose: class-agnostic proposals, from which AR is computed in place of `predict`'s results.
        on_image: called with (images done, images in all).

    Raises:
        UserError: as `evaluate`; or a source that hides the labels of novel objects.
    """
    gt, results, proposals = run_source(source, predict, propose=propose, on_image=on_image)
    return evaluate(gt, results, split or Split.load("stickers"), iou_types, proposals=proposals)


def run_source(
    source: SceneSource,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """COCO ground truth of a scene source, the model's results, its proposals; arguments as `evaluate_source`."""
    from pretrain.data.export import coco_header
    from pretrain.data.scenes import coco_objects

    if source.labels != "all":
        raise UserError("this source hides the labels of novel objects (labels=base), so nothing can be said of them.")
    gt: dict[str, Any] = {**coco_header(source.stickers, source), "images": [], "annotations": []}
    collect = _Collect(predict, propose)
    for index in range(len(source)):
        scene = source.scene(index)
        image_id = index + 1
        image, objects = coco_objects(scene, image_id=image_id, first_annotation_id=len(gt["annotations"]) + 1)
        gt["images"].append(image)
        gt["annotations"] += objects
        collect(scene.image, image_id)
        if on_image is not None:
            on_image(image_id, len(source))
    return gt, collect.results, collect.proposals


def run_images(
    gt: Mapping[str, Any],
    folder: Path,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """The model's results, and its proposals, on the pictures of a COCO file.

    Args:
        gt: ground truth; every image needs `file_name`, or LVIS's `coco_url`.
        folder: what `file_name` is relative to.

    Other arguments as `evaluate_source`.

    Raises:
        UserError: an image without a file name, unreadable, or of another size than the file says.
    """
    from pretrain.data.folder import read_image

    collect = _Collect(predict, propose)
    sizes = check_ground_truth(gt).sizes
    for n, entry in enumerate(gt["images"]):
        name = picture_file(entry, where=f"images[{n}]")
        image = read_image(folder / name)
        size = sizes[entry["id"]]
        if size is not None and image.shape[:2] != size:
            raise UserError(
                f"{folder / name}: {image.shape[1]}×{image.shape[0]} px, but the annotations say "
                f"{size[1]}×{size[0]}: boxes would be off. (Resized, or turned by its EXIF orientation?)"
            )
        collect(image, entry["id"])
        if on_image is not None:
            on_image(n + 1, len(gt["images"]))
    return collect.results, collect.proposals


class _Collect:
    """Results and proposals of one picture after another; None for what is not asked for."""

    def __init__(self, predict: Predict | None, propose: Predict | None) -> None:
        self.predict, self.propose = predict, propose
        self.results: list[dict[str, Any]] | None = None if predict is None else []
        self.proposals: list[dict[str, Any]] | None = None if propose is None else []

    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> None:
        if self.predict is not None and self.results is not None:
            self.results += self.predict(image, image_id)
        if self.propose is not None and self.proposals is not None:
            self.proposals += self.propose(image, image_id)


def content_sha256(content: Any) -> str:
    """sha256 of a JSON value's content, whatever its spacing and key order."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


def shaped(
    truth: GroundTruth,
    annotations: Sequence[Annotation],
    detections: list[dict[str, Any]],
    kind: str,
    where: tuple[str, str] = ("annotations", "predictions"),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Objects and detections with the shape and area that one kind of evaluation compares.

    Returns:
        New dicts: annotations with the file's area; detections with their own, of the box or of the mask.

    Raises:
        UserError: masks wanted, and an object or a detection without one.
    """
    if kind not in SHAPE:
        raise ValueError(f"iou type must be bbox or segm, is {kind!r}")
    if kind == "bbox":
        gts = [{k: v for k, v in a.items() if k != "segmentation"} for a in annotations]
        dts = []
        for n, d in enumerate(detections):
            box = d["bbox"] if "bbox" in d else mask_tools.toBbox(d["segmentation"]).tolist()
            dts.append(_detection(d, n, bbox=box, area=box[2] * box[3]))
        return gts, dts
    gts = []
    for a in annotations:
        entry = f"{where[0]}: annotations[{a['id'] - 1}]"
        if "segmentation" not in a:
            raise UserError(f"{entry} has no segmentation; evaluate boxes only.")
        gts.append({**a, "segmentation": to_rle(a["segmentation"], truth.sizes[a["image_id"]], entry)})
    dts = []
    for n, d in enumerate(detections):
        if "segmentation" not in d:
            raise UserError(
                f"{where[1]}: a detection of image {d['image_id']!r} has no segmentation; evaluate boxes only."
            )
        dts.append(_detection(d, n, segmentation=d["segmentation"], area=float(mask_tools.area(d["segmentation"]))))
    return gts, dts


def as_one_category(
    gt: Mapping[str, Any], detections: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results for AP of any thing: every object and every detection is of category 1, "thing".

    Args:
        gt: COCO ground truth.
        detections: COCO results or proposals. A box that comes under several categories counts once, with its best
            score.
    """
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in detections:
        key = (one["image_id"], *one["bbox"])
        if key not in best or best[key]["score"] < one["score"]:
            best[key] = {**one, "category_id": 1}
    objects = [{**a, "category_id": 1} for a in gt["annotations"]]
    return {**gt, "categories": [{"id": 1, "name": "thing"}], "annotations": objects}, list(best.values())


def _kinds(truth: GroundTruth, detections: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    masked = sum("segmentation" in d for d in detections)
    if detections and not masked:
        return ("bbox",), []
    if bare := sum("segmentation" not in a for a in truth.annotations):
        return ("bbox",), [f"masks are not evaluated: {bare} annotations have none"]
    if masked < len(detections):  # a mistake in writing them, more likely than a wish
        return ("bbox",), [f"masks are not evaluated: {len(detections) - masked} detections have none"]
    return ("bbox", "segm"), []


def _detection(d: dict[str, Any], n: int, **shape: Any) -> dict[str, Any]:
    keep = {k: d[k] for k in ("image_id", "category_id", "score")}
    return keep | shape | {"id": n + 1, "iscrowd": 0}  # ids from 1: COCO's 0 means "unmatched"


class _Category(COCOeval):
    """pycocotools on one category and the images that hold it: of hundreds of categories, most cells are empty."""

    def __init__(
        self,
        kind: str,
        gts: list[dict[str, Any]],
        dts: list[dict[str, Any]],
        category_id: int,
        max_dets: int,
        incomplete: frozenset[ImageId] = frozenset(),
    ) -> None:
        super().__init__(None, None, kind)
        self.incomplete = incomplete  # images where objects of the category may be unlabelled
        self.mine_gt, self.mine_dt = gts, dts
        self.params.imgIds = sorted({a["image_id"] for a in self.mine_gt} | {d["image_id"] for d in self.mine_dt})
        self.params.catIds = [category_id]
        self.params.maxDets = [max_dets]

    def _prepare(self) -> None:
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for a in self.mine_gt:
            self._gts[a["image_id"], a["category_id"]].append(a | {"ignore": a["iscrowd"]})
        for d in self.mine_dt:
            self._dts[d["image_id"], d["category_id"]].append(d)

    def evaluateImg(self, imgId: Any, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """As COCO's; where the labels are incomplete, a detection that matches nothing counts neither way."""
        entry = self._evaluate_image(imgId, catId, aRng, maxDet)
        if entry is not None and imgId in self.incomplete:
            entry["dtIgnore"] = np.logical_or(entry["dtIgnore"], entry["dtMatches"] == 0)
        return entry

    def _evaluate_image(self, imgId: Any, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """The short way for images without an object of the category, which are the most: nothing can match."""
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
        if not self.mine_gt:
            return np.full((10, 101, 4), -1.0)
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluate()
            self.accumulate()
        return np.asarray(self.eval["precision"])[:, :, 0, :, 0]

    def matches(self, t: int, position: Mapping[Any, int]) -> Matches:
        """Detections with their fate at IoU threshold number `t`, all sizes."""
        self.params.areaRng, self.params.areaRngLbl = self.params.areaRng[:1], self.params.areaRngLbl[:1]
        objects = np.zeros(len(position), dtype=np.int64)
        for a in self.mine_gt:
            objects[position[a["image_id"]]] += not a["iscrowd"]
        cells: list[Any] = []
        if self.params.imgIds:
            with contextlib.redirect_stdout(io.StringIO()):
                self.evaluate()
            cells = [e for e in self.evalImgs if e is not None]
        empty: list[Any] = [np.zeros(0)]
        ignored = np.concatenate([e["dtIgnore"][t] for e in cells] or empty).astype(bool)
        matched = np.concatenate([e["dtMatches"][t] for e in cells] or empty) > 0
        return Matches(
            image=np.concatenate([np.full(len(e["dtScores"]), position[e["image_id"]]) for e in cells] or empty).astype(
                np.int64
            ),
            score=np.concatenate([e["dtScores"] for e in cells] or empty).astype(np.float64),
            correct=matched & ~ignored,
            ignored=ignored,
            objects=objects,
        )


def _categories(
    kind: str,
    gts: list[dict[str, Any]],
    dts: list[dict[str, Any]],
    split: Split,
    max_dets: int,
    federated: Federated | None = None,
) -> dict[int, _Category]:
    by_gt, by_dt = _by(gts, "category_id"), _by(dts, "category_id")
    incomplete: defaultdict[int, set[ImageId]] = defaultdict(set)
    for image_id, categories in federated.incomplete.items() if federated is not None else ():
        for category in categories:
            incomplete[category].add(image_id)
    return {i: _Category(kind, by_gt[i], by_dt[i], i, max_dets, frozenset(incomplete[i])) for i in split.ids}


def _best_of_each_image(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `LVIS_DETECTIONS` best of each image; of equal scores the first."""
    images = _by(detections, "image_id").values()
    return [d for image in images for d in sorted(image, key=lambda d: -d["score"])[:LVIS_DETECTIONS]]


def _key(kind: str, name: str, group: str) -> str:
    return f"{kind}/{name}" + ("" if group == "all" else f"_{group}")


def _mean(precision: NDArray[np.float64]) -> float:
    real = precision[precision > -1]
    return float(np.mean(real)) if real.size else math.nan


def _by(entries: list[dict[str, Any]], key: str) -> defaultdict[Any, list[dict[str, Any]]]:
    grouped: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for e in entries:
        grouped[e[key]].append(e)
    return grouped


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot hash a {type(value).__name__}")
