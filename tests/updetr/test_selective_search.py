# SPDX-License-Identifier: Apache-2.0
"""Boxes around likely things."""

from __future__ import annotations

import numpy as np

from ovd.data.selective_search import _merged, _segments, likely_boxes


def scene(height: int = 160, width: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """A picture of three flat things on a noisy ground, and their boxes."""
    picture = np.random.default_rng(0).integers(100, 130, (height, width, 3), dtype=np.uint8)
    boxes = np.array([[20, 20, 70, 60], [120, 30, 190, 90], [60, 100, 110, 150]])
    for (x1, y1, x2, y2), colour in zip(boxes, ((220, 30, 30), (30, 60, 220), (250, 240, 60)), strict=True):
        picture[y1:y2, x1:x2] = colour
    return picture, boxes


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))


def test_selective_search__salient_objects_rank_first() -> None:
    picture, things = scene()
    boxes, values = likely_boxes(picture, scale=(0.1, 0.7), max_aspect=3.0)
    assert (np.diff(values) <= 0).all()
    for thing in things:
        best = [overlap(thing, box) for box in boxes[:20]]
        assert max(best) > 0.7, thing


def test_selective_search__boxes_lie_in_the_picture_within_scale_and_aspect() -> None:
    for shape in ((160, 240), (50, 300), (17, 17), (400, 30)):
        picture = np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8)
        boxes, _ = likely_boxes(picture, scale=(0.2, 0.6), max_aspect=2.0)
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (boxes >= 0).all() and (boxes[:, 2] <= shape[1]).all() and (boxes[:, 3] <= shape[0]).all()
        share = np.sqrt(sides.prod(1) / (shape[0] * shape[1]))
        assert (share >= 0.2 - 1e-9).all() and (share <= 0.6 + 1e-9).all()


def test_selective_search__uniform_picture() -> None:
    boxes, values = likely_boxes(np.full((64, 64, 3), 7, dtype=np.uint8), scale=(0.1, 0.7), max_aspect=3.0)
    assert boxes.shape == (len(values), 4) and np.allclose(values, 0)


def test_selective_search__merging_ends_with_the_whole_picture_and_loses_no_pixel() -> None:
    picture, _ = scene()
    small = np.ascontiguousarray(picture[::2, ::2])
    segments = _segments(small)
    assert segments.shape == small.shape[:2] and segments.min() > 0
    first = len(np.unique(segments))
    tree = _merged(segments, small)
    assert len(tree) == 2 * first - 1  # a binary tree
    area, box, colour = tree[-1]
    assert area == segments.size and box == (0, 0, small.shape[1], small.shape[0])
    np.testing.assert_allclose(colour, small.reshape(-1, 3).mean(0))
    assert sum(one[0] for one in tree[:first]) == segments.size
