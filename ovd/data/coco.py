# SPDX-License-Identifier: Apache-2.0
"""COCO-format ground truth and results: read, checked, brought into one form.

Nothing here is silent: what cannot be evaluated is refused with the entry's position; what can be, but looks odd, is
counted and reported as a warning. Inputs are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pycocotools import mask as mask_tools

from pretrain.engine.errors import UserError

ImageId = int | str


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Checked ground truth.

    Attributes:
        sizes: image id -> (height, width) in pixels, or None where the file does not say; ascending by id.
        categories: category id -> name.
        annotations: fresh dicts with `id` (1, 2, … in file order), `image_id`, `category_id`, `bbox` (x, y, w, h),
            `area`, `iscrowd` (0 or 1) and, where the file has one, `segmentation`.
        warnings: what was odd.
    """

    sizes: Mapping[ImageId, tuple[int, int] | None]
    categories: Mapping[int, str]
    annotations: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        """Whether every annotation has a mask (true for a file without annotations)."""
        return all("segmentation" in a for a in self.annotations)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Checked detections: fresh dicts with `image_id`, `category_id`, `score`, and `bbox` and/or `segmentation`."""

    detections: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        """Whether every detection has a mask (true for no detections)."""
        return all("segmentation" in d for d in self.detections)


def check_ground_truth(gt: Any, *, where: str = "annotations") -> GroundTruth:
    """Ground truth in COCO format, checked.

    Annotation ids are replaced: COCO's evaluation takes id 0 for "unmatched", so a file that counts from 0 would lose
    an object.

    Args:
        gt: an object with lists `images`, `annotations`, `categories`. Missing `area` and `iscrowd` are filled in.
        where: the file, for messages.

    Raises:
        UserError: a missing list or key, a duplicate or unknown id, a box that is not four finite numbers or has
            negative size.
    """
    if not isinstance(gt, dict):
        hint = " This looks like a results file." if isinstance(gt, list) else ""
        raise UserError(f"{where}: expected an object with images, annotations, categories; found {_kind(gt)}.{hint}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(gt.get(key), list):
            raise UserError(f"{where}: {key!r} must be a list, {'is missing' if key not in gt else _kind(gt[key])}.")
    warnings: list[str] = []

    sizes: dict[ImageId, tuple[int, int] | None] = {}
    for n, image in enumerate(gt["images"]):
        entry = f"{where}: images[{n}]"
        image_id = _key(image, "id", entry)
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise UserError(f"{entry}: id must be a number or a text, is {image_id!r}.")
        if image_id in sizes:
            raise UserError(f"{entry}: image id {image_id!r} occurs twice.")
        h, w = image.get("height"), image.get("width")
        known = _is_number(h) and _is_number(w) and h > 0 and w > 0
        sizes[image_id] = (int(h), int(w)) if known else None
    if len({type(i) for i in sizes}) > 1:
        raise UserError(f"{where}: some image ids are numbers and some are texts; use one kind.")
    if unsized := sum(s is None for s in sizes.values()):
        warnings.append(f"{unsized} images without width and height: boxes there cannot be checked against the image")

    categories: dict[int, str] = {}
    for n, category in enumerate(gt["categories"]):
        entry = f"{where}: categories[{n}]"
        category_id, name = _key(category, "id", entry), _key(category, "name", entry)
        if isinstance(category_id, bool) or not isinstance(category_id, int):
            raise UserError(f"{entry}: id must be a whole number, is {category_id!r}.")
        if category_id in categories:
            raise UserError(f"{entry}: category id {category_id} occurs twice.")
        if not isinstance(name, str):
            raise UserError(f"{entry}: name must be a text, is {name!r}.")
        categories[category_id] = name

    annotations: list[dict[str, Any]] = []
    ids: set[Any] = set()
    filled = overruled = empty = repeated = 0
    for n, a in enumerate(gt["annotations"]):
        entry = f"{where}: annotations[{n}]"
        image_id = _known(_key(a, "image_id", entry), sizes, f"{entry}: image_id")
        category_id = _known(_key(a, "category_id", entry), categories, f"{entry}: category_id")
        box = _box(_key(a, "bbox", entry), entry)
        empty += box[2] == 0 or box[3] == 0
        crowd = a.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise UserError(f"{entry}: iscrowd must be 0 or 1, is {crowd!r}.")
        overruled += bool(a.get("ignore", 0)) and not crowd
        fresh = {"id": n + 1, "image_id": image_id, "category_id": category_id, "bbox": box, "iscrowd": int(crowd)}
        if a.get("segmentation"):
            fresh["segmentation"] = a["segmentation"]
        area = a.get("area")
        if area is None:
            filled += 1
            area = (
                float(mask_tools.area(to_rle(fresh["segmentation"], sizes[image_id], entry)))
                if "segmentation" in fresh
                else box[2] * box[3]
            )
        elif not _is_number(area) or area < 0:
            raise UserError(f"{entry}: area must be a number ≥ 0, is {area!r}.")
        fresh["area"] = area
        annotations.append(fresh)
        if isinstance(a.get("id"), int):
            repeated += a["id"] in ids
            ids.add(a["id"])
    if 0 in ids:
        warnings.append(
            "annotation id 0: pycocotools would count that object as never found; here it is renumbered and counts"
        )
    if repeated:
        warnings.append(f"{repeated} annotation ids occur more than once; all of them are counted")
    if filled:
        warnings.append(f"{filled} annotations without area: taken from the mask, else from the box")
    if overruled:
        warnings.append(
            f"{overruled} annotations have 'ignore' set without iscrowd: COCO's evaluation counts them all the same"
        )
    if empty:
        warnings.append(f"{empty} annotations have a box without area")
    ordered = {i: sizes[i] for i in sorted(sizes)}  # one kind of id, checked above
    return GroundTruth(sizes=ordered, categories=categories, annotations=annotations, warnings=warnings)


def check_results(
    results: Any, gt: GroundTruth, *, outside: Collection[int] = (), where: str = "predictions", classes: bool = True
) -> Results:
    """Detections in COCO's results format, checked against the ground truth.

    Args:
        results: a list of `{"image_id", "category_id", "score", "bbox": [x, y, w, h]}` with `"segmentation"` beside or
            in place of `bbox`.
        gt: checked ground truth.
        outside: category ids known without being in `gt.categories`; their detections are dropped and counted.
        where: the file, for messages.
        classes: False for class-agnostic proposals, which need no `category_id`.

    Boxes that reach over the border are kept as they are and counted (clipping would change the digits).

    Raises:
        UserError: not a list, a missing key, an unknown image or category id, a score or box that is not finite, a box
            of negative size or wholly outside its image, a mask of another size than the image; the message names the
            entry.
    """
    if not isinstance(results, list):
        hint = ""
        if isinstance(results, dict) and isinstance(results.get("annotations"), list):
            hint = " This looks like a ground-truth file; predictions are a plain list."
        raise UserError(f"{where}: expected a list of detections, found {_kind(results)}.{hint}")
    fresh: list[dict[str, Any]] = []
    over = flat = dropped = xyxy = 0
    for n, d in enumerate(results):
        entry = f"{where}[{n}]"
        image_id = _known(_key(d, "image_id", entry), gt.sizes, f"{entry}: image_id")
        one: dict[str, Any] = {"image_id": image_id, "category_id": 0}
        if classes:
            category_id = _key(d, "category_id", entry)
            if _hashable(category_id) and category_id in outside and category_id not in gt.categories:
                dropped += 1
                continue
            one["category_id"] = _known(category_id, gt.categories, f"{entry}: category_id")
        score = _key(d, "score", entry)
        if not _is_number(score):
            raise UserError(f"{entry}: score must be a finite number, is {score!r}.")
        one["score"] = score
        size = gt.sizes[image_id]
        if d.get("segmentation"):
            one["segmentation"] = to_rle(d["segmentation"], size, entry)
        if d.get("bbox"):
            x, y, w, h = one["bbox"] = _box(d["bbox"], entry)
            flat += w == 0 or h == 0
            if size is not None:
                H, W = size
                if x > W or y > H or x + w < 0 or y + h < 0:
                    raise UserError(f"{entry}: box {one['bbox']} lies wholly outside image {image_id!r} of {W}×{H} px.")
                # Half a pixel is what rounding does.
                if x < -0.5 or y < -0.5 or x + w > W + 0.5 or y + h > H + 0.5:
                    over += 1
                    xyxy += x < w <= W + 1 and y < h <= H + 1
        elif "segmentation" not in one:
            raise UserError(f"{entry}: neither bbox nor segmentation.")
        fresh.append(one)
    warnings = []
    if dropped:
        warnings.append(f"{dropped} detections of categories that the ground truth does not define are left out")
    if over:
        hint = ""
        if over > len(fresh) / 4 and xyxy > 0.95 * over:
            hint = "; are they x1, y1, x2, y2? COCO's are x, y, width, height"
        warnings.append(f"{over} of {len(fresh)} boxes reach over the border of their image (kept as they are){hint}")
    if flat:
        warnings.append(f"{flat} boxes have no area and can match nothing")
    if not fresh:
        warnings.append("no detections: every precision and recall is 0")
    return Results(detections=fresh, warnings=warnings)


def to_rle(segmentation: Any, size: tuple[int, int] | None, entry: str) -> dict[str, Any]:
    """Compressed run lengths of polygons, uncompressed or compressed run lengths, as pycocotools makes them.

    Args:
        segmentation: list of polygons [x, y, …], or `{"size": [h, w], "counts": list | str | bytes}`.
        size: (height, width) of the image; needed for polygons.
        entry: where it stands, for messages.

    Raises:
        UserError: anything else, a size that is not the image's, damaged counts, or polygons on an image of unknown
            size.
    """
    if isinstance(segmentation, list):
        if size is None:
            raise UserError(f"{entry}: polygons need the image's width and height in the ground truth.")
        good = segmentation and all(
            isinstance(p, list) and len(p) >= 4 and len(p) % 2 == 0 and all(_is_number(v) for v in p)
            for p in segmentation
        )
        if not good:
            raise UserError(f"{entry}: segmentation is neither polygons [[x, y, …], …] nor run lengths.")
        return dict(mask_tools.merge(mask_tools.frPyObjects(segmentation, *size)))
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise UserError(f"{entry}: segmentation is neither polygons nor an object with size and counts.")
    counts, hw = segmentation["counts"], segmentation["size"]
    if not (isinstance(hw, (list, tuple)) and len(hw) == 2 and all(type(v) is int and v > 0 for v in hw)):
        raise UserError(f"{entry}: the mask's size must be [height, width], is {hw!r}.")
    if size is not None and tuple(hw) != size:
        raise UserError(f"{entry}: the mask's [height, width] is {list(hw)}, its image's {list(size)}.")
    if isinstance(counts, list):
        if not all(type(v) is int and v >= 0 for v in counts) or sum(counts) != hw[0] * hw[1]:
            raise UserError(f"{entry}: run lengths must be whole numbers that add up to height × width.")
        return dict(mask_tools.frPyObjects({"size": list(hw), "counts": counts}, *hw))
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise UserError(f"{entry}: damaged run lengths.") from None
    # Each character holds 5 bits and a "more follows" bit (0x20) above 48; an unfinished last number would be read past
    # its end.
    if not isinstance(counts, bytes) or not counts or min(counts) < 48 or max(counts) > 111 or (counts[-1] - 48) & 0x20:
        raise UserError(f"{entry}: damaged run lengths.")
    rle = {"size": list(hw), "counts": counts}
    if mask_tools.area(rle) > hw[0] * hw[1]:
        raise UserError(f"{entry}: damaged run lengths (they cover more than the image).")
    return rle


def _key(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {_kind(entry)}.")
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing.")
    return entry[key]


def _hashable(value: Any) -> bool:
    return isinstance(value, (int, str, float)) and not isinstance(value, bool)


def _known(value: Any, known: Mapping[Any, Any], where: str) -> Any:
    if _hashable(value):
        if value in known:
            return int(value) if isinstance(value, float) else value
        other: Any = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else str(value)
        if other in known:
            raise UserError(f"{where} {value!r} is written as {_kind(value)}; the ground truth has {other!r}.")
    raise UserError(f"{where} {value!r} is not in the ground truth.")


def _box(value: Any, entry: str) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(_is_number(v) for v in value):
        raise UserError(f"{entry}: bbox must be four finite numbers x, y, width, height; is {value!r}.")
    if value[2] < 0 or value[3] < 0:
        raise UserError(f"{entry}: bbox {list(value)} has a negative width or height.")
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true/false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
