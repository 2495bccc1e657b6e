# SPDX-License-Identifier: Apache-2.0
"""Random data sets, and pycocotools run the official way on them."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def rectangle(box: list[float], size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of a filled box, as JSON holds them."""
    canvas = np.zeros(size, dtype=np.uint8, order="F")
    x, y, w, h = (int(v) for v in box)
    canvas[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    rle = mask_tools.encode(canvas)
    return {"size": list(size), "counts": rle["counts"].decode()}


def random_case(
    seed: int, *, images: int = 6, categories: int = 7, masks: bool = False, ties: bool = False, crowds: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results with shuffled, non-contiguous ids, an absent category, an image without objects, one
    without detections, objects of all three sizes, duplicates, near misses, confusions and plain noise."""
    rng = np.random.default_rng(seed)
    category_ids = [int(i) for i in rng.choice(np.arange(3, 200), categories, replace=False)]
    image_ids = [int(i) for i in rng.choice(np.arange(10, 9999), images, replace=False)]
    size = (240, 320)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in image_ids[1:]:
        for _ in range(int(rng.integers(1, 9))):
            side = np.exp(rng.uniform(np.log(8), np.log(180), 2)).round()
            box = [
                float(rng.integers(0, 320 - side[0])),
                float(rng.integers(0, 240 - side[1])),
                float(side[0]),
                float(side[1]),
            ]
            category = category_ids[int(rng.integers(1, categories))]
            one = {
                "id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box,
                "area": box[2] * box[3], "iscrowd": int(crowds and rng.random() < 0.12),
            }  # fmt: skip
            if masks:
                one["segmentation"] = rectangle(box, size)
            annotations.append(one)
            if image_id == image_ids[-1]:
                continue
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, 0.12, 4) * [box[2], box[3], box[2], box[3]]
                found = [float(v) for v in np.round(np.add(box, shift), 1)]
                found[:2] = np.clip(found[:2], 0, [310, 230]).tolist()
                found[2:] = np.clip(found[2:], 2, [320 - found[0], 240 - found[1]]).tolist()
                named = category if rng.random() < 0.75 else category_ids[int(rng.integers(0, categories))]
                results.append(
                    {"image_id": image_id, "category_id": named, "bbox": found, "score": float(rng.random())}
                )
    for _ in range(10):
        w, h = rng.uniform(5, 150, 2)
        box = [float(rng.uniform(0, 320 - w)), float(rng.uniform(0, 240 - h)), float(w), float(h)]
        image_id = image_ids[int(rng.integers(0, images - 1))]
        named = category_ids[int(rng.integers(0, categories))]
        results.append({"image_id": image_id, "category_id": named, "bbox": box, "score": float(rng.random())})
    for d in results:
        if ties:
            d["score"] = round(d["score"], 1)
        if masks:
            d["segmentation"] = rectangle(d["bbox"], size)
    rng.shuffle(annotations)
    rng.shuffle(results)
    gt = {
        "images": [{"id": i, "width": 320, "height": 240, "file_name": f"{i}.jpg"} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"thing {i}"} for i in category_ids],
    }
    return gt, results


def official(
    gt: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str = "bbox",
    *,
    categories: list[int] | None = None,
    max_dets: list[int] | None = None,
    use_categories: bool = True,
) -> COCOeval:
    """COCOeval after evaluate, accumulate and summarize, fed as Detectron2 feeds it (no box beside a mask)."""
    gt, results = copy.deepcopy(gt), copy.deepcopy(results)
    if kind == "segm":
        for d in results:
            d.pop("bbox", None)
    else:
        for d in results:
            d.pop("segmentation", None)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = gt
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), kind)
        if categories is not None:
            run.params.catIds = sorted(categories)
        if max_dets is not None:
            run.params.maxDets = max_dets
        run.params.useCats = int(use_categories)
        run.evaluate()
        run.accumulate()
        if len(run.params.maxDets) == 3:
            run.summarize()
    return run
