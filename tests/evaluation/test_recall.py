# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic recall against a few lines of plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from ovd.evaluation.recall import IOU_THRESHOLDS, class_agnostic_recall, matched_objects


def plain_iou(a: list[float], b: list[float]) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def plain_recall(objects: list[list[float]], found: list[tuple[float, list[float]]], cap: int, threshold: float) -> int:
    free = list(range(len(objects)))
    for _, box in sorted(found, key=lambda d: -d[0])[:cap]:
        candidates = [(plain_iou(box, objects[g]), g) for g in free]
        best = max(candidates, default=(0.0, -1))
        if best[0] >= threshold:
            free.remove(best[1])
    return len(objects) - len(free)


@pytest.mark.parametrize("seed", range(8))
def test_recall__of_a_group_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    objects: dict[int, list[dict]] = {}
    detections: dict[int, list[dict]] = {}
    for image in range(5):
        boxes = np.column_stack([rng.uniform(0, 60, (6, 2)), rng.uniform(10, 40, (6, 2))])
        objects[image] = [{"bbox": b.tolist(), "category_id": int(rng.integers(1, 4)), "iscrowd": 0} for b in boxes]
        near = boxes[rng.integers(0, 6, 25)] + rng.normal(0, 3, (25, 4))
        detections[image] = [{"bbox": b.tolist(), "score": float(rng.random()), "category_id": 0} for b in near]
    result = class_agnostic_recall(objects, detections, {"base": (1, 3), "novel": (2,)}, caps=(5, 20))
    for group, ids in (("base", (1, 3)), ("novel", (2,))):
        for cap in (5, 20):
            for t, threshold in enumerate(IOU_THRESHOLDS):
                hit = total = 0
                for image, everything in objects.items():
                    mine = [a["bbox"] for a in everything if a["category_id"] in ids]
                    found = [(d["score"], d["bbox"]) for d in detections[image]]
                    hit += plain_recall(mine, found, cap, threshold)
                    total += len(mine)
                assert result[group][cap][t] == pytest.approx(hit / total, abs=1e-12)


def test_recall__detection_of_the_other_group_counts_towards_the_cap() -> None:
    both = {1: [{"bbox": [0, 0, 10, 10], "category_id": c, "iscrowd": 0} for c in (1, 2)]}
    found = {1: [{"bbox": [0, 0, 10, 10], "score": 0.9, "category_id": 0}]}
    recall = class_agnostic_recall(both, found, {"base": (1,), "novel": (2,), "all": (1, 2)}, caps=(100,))
    assert recall["base"][100][0] == recall["novel"][100][0] == 1.0
    assert recall["all"][100][0] == 0.5
    crowded = {
        1: [
            {"bbox": [0, 0, 10, 10], "score": 0.9, "category_id": 0},
            {"bbox": [50, 50, 9, 9], "score": 1.0, "category_id": 0},
        ]
    }
    assert class_agnostic_recall(both, crowded, {"base": (1,)}, caps=(1,))["base"][1][0] == 0.0


def test_matching__one_detection_per_object_best_iou_first() -> None:
    iou = np.array([[0.6, 0.8], [0.7, 0.9]])
    assert matched_objects(iou, [0.5]).tolist() == [[True, True]]  # the second is left with object 0
    assert matched_objects(iou, [0.75]).tolist() == [[False, True]]


def test_recall__is_0_without_detections_and_nan_without_objects() -> None:
    objects = {1: [{"bbox": [0, 0, 10, 10], "category_id": 1, "iscrowd": 0}]}
    recall = class_agnostic_recall(objects, {}, {"base": (1,), "novel": (2,)})
    assert (recall["base"][100] == 0).all()
    assert np.isnan(recall["novel"][300]).all()
