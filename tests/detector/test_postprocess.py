# SPDX-License-Identifier: Apache-2.0
"""Threshold, NMS and top-k: the boxes that torchvision keeps, and the order of equal scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms as reference_nms

from ovd.inference.postprocess import (
    Candidates,
    batched_nms,
    best_class_per_region,
    best_pairs,
    best_per_class,
    narrowest,
    pairs_above,
    postprocess,
    soft_nms,
)


def random_boxes(rng: np.random.Generator, count: int, *, grid: bool) -> NDArray[np.float32]:
    """Boxes in 300 × 300 pixels; on a grid many coincide and many overlaps are equal."""
    step = 30 if grid else 1e-4
    corner = np.floor(rng.uniform(0, 200, (count, 2)) / step) * step
    side = np.ceil(rng.uniform(1, 100, (count, 2)) / step) * step
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 7, 50])
def test_top_per_class__equals_a_sort(count: int) -> None:
    score_RC = np.random.default_rng(count).integers(0, 5, (7, 4)).astype(np.float32)  # many are equal
    pairs = [
        (-score_RC[r, c], r, c) for c in range(4) for r in sorted(range(7), key=lambda r: (-score_RC[r, c], r))[:count]
    ]
    found = best_per_class(score_RC, count=count)
    assert list(zip(-found.score, found.region, found.class_id, strict=True)) == sorted(pairs)


@pytest.mark.parametrize("count", [1, 40, 300, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("grid", [False, True], ids=["scattered", "ties"])
def test_nms__equals_torchvision(count: int, grid: bool) -> None:
    for seed, iou in enumerate([0.3, 0.5, 0.5, 0.85, 1 / 3, 1.0]):
        rng = np.random.default_rng([seed, count])
        boxes = random_boxes(rng, count, grid=grid)
        score = rng.random(count).astype(np.float32)
        if grid:
            score = np.round(score * 8).astype(np.float32) / 8
        classes = rng.integers(0, [1, 3, 80][seed % 3], count)
        tensors = torch.from_numpy(boxes), torch.from_numpy(score), torch.from_numpy(classes)
        expected = reference_nms(*tensors, iou).tolist()
        kept = batched_nms(boxes, score, classes, iou).tolist()
        # Of more than 1,000 boxes torchvision sorts the kept ones by score without promising the order of equal ones.
        assert kept == (expected if count <= 1000 else sorted(expected, key=lambda k: (-score[k], k)))
        assert batched_nms(boxes, score, classes, iou, limit=25).tolist() == kept[:25]


def test_nms__boxes_without_area_suppress_nothing() -> None:
    flat = np.array([[5, 5, 5, 9]] * 3, dtype=np.float32)
    score, classes = np.array([0.1, 0.3, 0.2], dtype=np.float32), np.zeros(3, dtype=np.int64)
    assert batched_nms(flat, score, classes, 0.5).tolist() == [1, 2, 0]
    assert batched_nms(flat[:0], score[:0], classes[:0], 0.5).tolist() == []


def test_postprocess__cross_class_nms_before_limit() -> None:
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 99], [200, 0, 300, 100], [200, 0, 300, 60]], dtype=np.float32)
    candidates = Candidates(np.arange(4), np.array([0, 1, 0, 1]), np.array([0.5, 0.9, 0.8, 0.7], dtype=np.float32))
    assert postprocess(boxes, candidates).region.tolist() == [1, 2, 3]
    assert postprocess(boxes, candidates, limit=2).region.tolist() == [1, 2]
    both = postprocess(boxes, candidates, cross_class_iou=None)
    assert both.region.tolist() == [1, 2, 3, 0] and both.score.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])


@pytest.mark.parametrize("seed", range(5))
def test_top_pairs__equal_a_stable_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = (np.round(rng.random((30, 7)) * 20) / 20).astype(np.float32)
    order = sorted(range(score.size), key=lambda k: (-score.ravel()[k], k))
    for count in (1, 50, 210, 500):
        best = best_pairs(score, count=count)
        assert (best.region * 7 + best.class_id).tolist() == order[:count]
        assert (best.score == score[best.region, best.class_id]).all()


def test_candidates__best_class_or_all_above_the_threshold() -> None:
    score = np.array([[0.2, 0.6, 0.5], [0.1, 0.0, 0.2], [0.5, 0.5, 0.4]], dtype=np.float32)
    one = best_class_per_region(score, threshold=0.5)
    assert list(zip(one.region, one.class_id, strict=True)) == [(0, 1), (2, 0)]
    every = pairs_above(score, threshold=0.5)
    assert list(zip(every.region, every.class_id, strict=True)) == [(0, 1), (0, 2), (2, 0), (2, 1)]
    for empty in (score[:0], np.zeros((0, 0), dtype=np.float32)):
        assert len(best_class_per_region(empty, threshold=0.0)) == len(pairs_above(empty, threshold=0.0)) == 0
        assert len(best_pairs(empty, count=5)) == 0


def soft_nms_of_one_class(boxes: NDArray[np.float32], score: NDArray[np.float32], sigma: float) -> NDArray[np.float64]:
    """The paper's algorithm (figure 3), box by box."""
    left = {i: float(s) for i, s in enumerate(score)}
    final = np.zeros(len(score))
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        final[best] = left.pop(best)
        for i in left:
            width, height = (
                max(0.0, float(min(boxes[i][a + 2], boxes[best][a + 2]) - max(boxes[i][a], boxes[best][a])))
                for a in (0, 1)
            )
            areas = [float((b[2] - b[0]) * (b[3] - b[1])) for b in (boxes[i], boxes[best])]
            iou = width * height / (sum(areas) - width * height)
            left[i] *= math.exp(-(iou**2) / sigma)
    return final


@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_soft_nms__equals_the_papers_per_class(count: int, sigma: float) -> None:
    rng = np.random.default_rng(count)
    boxes, score_RC = random_boxes(rng, count, grid=False), rng.random((count, 4)).astype(np.float32)
    decayed = soft_nms(boxes, score_RC, sigma=sigma)
    for c in range(4):
        np.testing.assert_allclose(decayed[:, c], soft_nms_of_one_class(boxes, score_RC[:, c], sigma), rtol=1e-5)


def test_soft_nms__keeps_the_neighbour_that_nms_drops() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 6], [50, 50, 60, 60]], np.float32)  # IoU .6, and apart
    decayed = soft_nms(boxes, np.array([[0.9], [0.8], [0.7]], np.float32), sigma=0.5)
    np.testing.assert_allclose(decayed[:, 0], [0.9, 0.8 * math.exp(-(0.6**2) / 0.5), 0.7], rtol=1e-6)
    with pytest.raises(ValueError, match="above 0"):
        soft_nms(boxes, decayed, sigma=0)


ANIMAL_DOG_BEAGLE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=bool)
"""Which class in the row is a kind of the one in the column."""


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ([0.8, 0.8, 0.5], 2),  # of two kinds in a line the last, step by step: .5 is more than half of .8
        ([0.8, 0.8, 0.39], 1),  # less than half
        ([0.8, 0.3, 0.3], 0),
        ([0.8, 0.3, 0.45], 2),
        ([0.3, 0.19, 0.0], 0),  # below the threshold
        ([0.5, 0.9, 0.2], 1),  # the best is named whatever lies above it
    ],
)
def test_narrowest__kind_with_half_the_score_names_the_box(scores: list[float], name: int) -> None:
    score_RC = np.array([[0.0, 0.0, 0.0], scores], np.float32)
    best = best_class_per_region(score_RC, threshold=0.2)
    found = narrowest(best, score_RC, ANIMAL_DOG_BEAGLE, threshold=0.2)
    assert found.class_id.tolist() == [name] and found.region.tolist() == [1]
    assert found.score.tolist() == best.score.tolist() == [max(np.float32(scores))]


def test_narrowest__unrelated_classes_stay() -> None:
    score_RC = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    best = best_class_per_region(score_RC, threshold=0.2)
    found = narrowest(best, score_RC, np.zeros((3, 3), bool), threshold=0.2)
    assert found.class_id.tolist() == best.class_id.tolist()
