# SPDX-License-Identifier: Apache-2.0
"""Detections in COCO's results format, checked against a ground truth.

What cannot be evaluated is refused with the entry's position; what can be, but looks odd, is counted in a warning.
Inputs are never changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypedDict

from pretrain.data import masks
from pretrain.data.coco import GroundTruth, is_id, kind_of, require_id, required
from pretrain.data.coco_boxes import checked_box, over_border, require_pixels
from pretrain.data.coco_entries import ImageId
from pretrain.engine.errors import UserError
from pretrain.engine.stored import is_number


class _Shapes(TypedDict, total=False):
    bbox: list[float]
    segmentation: masks.Rle


class CheckedResult(_Shapes):
    """A detection that can be evaluated; it has `bbox` (x, y, width, height), `segmentation`, or both."""

    image_id: ImageId
    category_id: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """Checked detections, copied from what was given."""

    detections: list[CheckedResult]
    warnings: list[str] = field(default_factory=list)


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
        raise UserError(f"{where}: expected a list of detections, found {kind_of(results)}.{hint}")
    checked: list[CheckedResult] = []
    odd = Counter[str]()
    for n, d in enumerate(results):
        entry = f"{where}[{n}]"
        image_id = require_id(required(d, "image_id", entry), gt.sizes, f"{entry}: image_id")
        category = 0
        if classes:
            category_id = required(d, "category_id", entry)
            if is_id(category_id) and category_id in outside and category_id not in gt.categories:
                odd["dropped"] += 1
                continue
            category = require_id(category_id, gt.categories, f"{entry}: category_id")
        checked.append(_checked_result(d, image_id, category, gt.sizes[image_id], entry, odd))
    require_pixels((one["bbox"] for one in checked if "bbox" in one), where)
    boxes = Counter(
        (one["image_id"], one["category_id"], one["score"], *one["bbox"]) for one in checked if "bbox" in one
    )
    odd["repeated"] = boxes.total() - len(boxes)
    misread = odd["over"] > len(checked) / 4 and odd["corners"] > 0.95 * odd["over"]
    hint = "; are they x1, y1, x2, y2? COCO's are x, y, width, height" if misread else ""
    texts = {
        "repeated": "{} detections repeat image, class, box and score of another one, and count as false: were parts "
        "of the results put together twice?",
        "dropped": "{} detections of categories that the ground truth does not define are left out",
        "over": f"{{}} of {len(checked)} boxes reach over the border of their image (kept as they are){hint}",
        "flat": "{} boxes have no area and can match nothing",
    }
    warnings = [text.format(odd[key]) for key, text in texts.items() if odd[key]]
    if not checked:
        warnings.append("no detections: every precision and recall is 0")
    return Results(detections=checked, warnings=warnings)


def _checked_result(
    d: Any, image_id: ImageId, category: int, size: tuple[int, int] | None, entry: str, odd: Counter[str]
) -> CheckedResult:
    """One detection of a known image and category; its oddities are added to ``odd``."""
    score = required(d, "score", entry)
    if not is_number(score):
        raise UserError(f"{entry}: score must be a finite number, is {score!r}.")
    result: CheckedResult = {"image_id": image_id, "category_id": category, "score": score}
    if d.get("segmentation"):
        result["segmentation"] = masks.to_rle(d["segmentation"], size, entry)
    if d.get("bbox"):
        result["bbox"] = checked_box(d["bbox"], entry)
        odd["flat"] += result["bbox"][2] == 0 or result["bbox"][3] == 0
        if size is not None:
            reaches, clipped = over_border(result["bbox"], size, f"{entry}: box {result['bbox']}", image_id)
            odd["over"] += reaches
            odd["corners"] += clipped
    elif "segmentation" not in result:
        raise UserError(f"{entry}: neither bbox nor segmentation.")
    return result
