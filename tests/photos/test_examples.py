# SPDX-License-Identifier: Apache-2.0
"""Crops looked for in photos: how they are compared, and how their scores are fitted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ovd.data.photo_words import Photo
from ovd.evaluation.photo_calibration import TypedPhotos, fit, fit_examples
from ovd.evaluation.photo_examples import WordCrops, boxes_to_cut, with_crops
from ovd.evaluation.typed import TypedScene
from ovd.inference.arrays import sigmoid, unit_rows
from ovd.inference.example_scorers import CENTRE_PRIOR, WordProfileScorer, root_profile
from ovd.inference.scoring import Calibration, RegionSet
from tests.photos.test_fvlm import scorer as word_scorer

WORDS = np.eye(4, dtype=np.float32)


def region_set(rows: np.ndarray, objectness: np.ndarray | None = None, boxes: np.ndarray | None = None) -> RegionSet:
    count = len(rows)
    return RegionSet(
        boxes=np.tile([0.0, 0.0, 10.0, 10.0], (count, 1)) if boxes is None else boxes,
        objectness=np.ones(count) if objectness is None else objectness,
        text=np.zeros_like(rows),
        image=rows,
        masks=None,
        size=(100, 100),
    )


def test_crop_scores__bhattacharyya_of_words_and_centred_cosine() -> None:
    rng = np.random.default_rng(0)
    region, crop = unit_rows(rng.normal(size=(2, 4)).astype(np.float32))
    common = region / (1 + CENTRE_PRIOR)  # the one region's, drawn towards zero
    a, b = (vector / np.linalg.norm(vector) for vector in (region - common, crop - common))
    likeness = math.exp(float(a @ b) - 1)
    weights = [[math.exp(7.0 * float(v)) for v in row] for row in (region, crop)]
    p, q = ([w / sum(row) for w in row] for row in weights)
    coefficient = sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))

    calibration = Calibration(logit_scale=7.0, objectness_weight=0.5)
    crops = WordProfileScorer(rows=crop[None], words=WORDS, calibration=calibration)
    score = crops(region_set(region[None], np.array([0.64])))
    assert float(score[0, 0]) == pytest.approx(coefficient * likeness * 0.8, rel=1e-5)
    fitted = replace(crops, calibration=replace(calibration, slope=2.0, offset=-0.5))
    raw = coefficient * likeness * 0.8
    expected = sigmoid(np.array(2 * math.log(raw / (1 - raw)) - 0.5))
    assert float(fitted(region_set(region[None], np.array([0.64])))[0, 0]) == pytest.approx(float(expected), rel=1e-4)


def test_crop_scores__words_at_zero_do_not_count() -> None:
    """A common part of all embeddings that lies beside the words changes no profile; the crop itself is its best."""
    words = np.eye(5, dtype=np.float32)[:4]
    rows = unit_rows(np.array([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0.5], [0, 1, 0, 0, 0.5]], np.float32))
    roots = root_profile(rows, words, scale=10.0)
    np.testing.assert_allclose((roots**2).sum(axis=1), 1, rtol=1e-5)
    alike = roots @ roots.T
    assert alike[0, 1] > 0.95 and alike[1, 2] < 0.2  # by cosine the last two share .2 of 1
    no_crops = WordProfileScorer(rows=rows[:0], words=words, calibration=Calibration())
    assert no_crops(region_set(rows)).shape == (3, 0)


def test_boxes_to_cut__largest_confident_box_of_each_word() -> None:
    photo = Photo(
        file=Path("a.jpg"),
        size=(200, 200),
        boxes=np.array([[0, 0, 40, 40], [0, 0, 90, 90], [0, 0, 99, 99], [0, 0, 31, 90], [0, 0, 80, 80]], np.float32),
        words=np.array([0, 0, 0, 1, 7]),
        scores=np.array([0.9, 0.6, 0.4, 0.9, 0.9], np.float32),
        noun=None,
    )
    assert boxes_to_cut(photo, words=5) == {0: (0.0, 0.0, 90.0, 90.0)}  # others: doubtful, thin, not looked for


def scene(index: int, rng: np.random.Generator) -> TypedScene:
    """Four boxes: one of the first word, which is labelled and typed, and three of the third, which nobody typed."""
    boxes = np.array([[20.0 * i, 0.0, 20.0 * i + 15.0, 15.0] for i in range(4)])
    rows = unit_rows(WORDS[[0, 2, 2, 2]] + rng.normal(scale=0.25, size=(4, 4)).astype(np.float32))
    return TypedScene(
        regions=region_set(rows, rng.uniform(0.5, 1.0, 4), boxes),
        boxes=boxes[:1],
        classes=np.array([0]),
        present=(0,),
        absent=(1, 3),
        index=index,
    )


def test_word_crops__no_photo_is_searched_for_its_own() -> None:
    first, second = np.full((4, 4), 1.0, np.float32), np.full((4, 4), 2.0, np.float32)
    crops = WordCrops(rows=np.stack([first, second]), sources={0: (7, 8), 1: (9, 7)})
    rng = np.random.default_rng(0)
    seven, other, none = with_crops(
        [scene(7, rng), scene(8, rng), replace(scene(3, rng), present=(0,)), replace(scene(4, rng), present=(2,))],
        crops,
    )
    assert seven.rows is not None and other.rows is not None and none.rows is not None
    assert seven.rows[:2, 0].tolist() == [2.0, 1.0] and other.rows[:2, 0].tolist() == [1.0, 1.0]
    assert seven.absent == (1,)  # nobody has two crops of word 3


def test_fit_examples__changes_scores_of_crops_only() -> None:
    rng = np.random.default_rng(1)
    crops = WordCrops(
        rows=np.stack([unit_rows(WORDS + rng.normal(scale=0.1, size=(4, 4)).astype(np.float32))] * 2),
        sources=dict.fromkeys(range(4), (1000, 1001)),
    )
    scenes = [scene(index, rng) for index in range(60)]
    words = word_scorer([[True, False]] * 4)
    data = TypedPhotos(
        scenes=scenes,
        named=[],
        scorer=words,
        examples=with_crops(scenes, crops),
        example_scorer=WordProfileScorer(rows=crops.rows[0], words=WORDS, calibration=Calibration().of_examples()),
    )
    crops_fitted = fit_examples(data.half(0))
    assert crops_fitted is not None
    fitted = words.calibration.with_examples(crops_fitted)
    assert fitted.of_examples() != words.calibration.of_examples() and fitted.slope == words.calibration.slope
    before, words_alone = words.calibration.of_examples(), replace(words.calibration, open_slope=2.0)
    assert words_alone == words_alone.with_examples(before)  # how the command tells that crops were not fitted
    assert fitted != fitted.with_examples(before)
    assert fitted.example_slope > 0 and fitted.example_threshold < 1
    assert data.example_scorer is not None
    score = replace(data.example_scorer, calibration=fitted.of_examples())
    held_out = data.half(1).examples
    shown = [score.select([0])(one.regions)[:, 0] for one in held_out]
    assert np.mean([one.argmax() == 0 for one in shown]) > 0.9
    ece = abs(np.mean([one.max() for one in shown]) - np.mean([one.argmax() == 0 for one in shown]))
    assert ece < 0.15  # a fit on thirty photos
    nothing_absent = replace(data, examples=[replace(one, absent=()) for one in data.examples])
    nothing_right = replace(data, examples=[replace(one, boxes=one.boxes + 50) for one in data.examples])
    few = replace(data, examples=data.examples[:5])
    assert [fit_examples(other) for other in (nothing_absent, nothing_right, few)] == [None] * 3


def test_fit__scores_of_other_words_stay_where_no_photo_of_one_is_named() -> None:
    rng = np.random.default_rng(2)
    scenes = []
    for index in range(60):
        known = rng.uniform(0, 0.6, (4, 2)).astype(np.float32)
        known[0, 0] = rng.uniform(0.4, 0.9)
        one = scene(index, rng)
        scenes.append(replace(one, regions=replace(one.regions, word_scores=known, bias=np.zeros(4, np.float32))))
    scorer = word_scorer([[True, False], [False, True], [False, False], [False, False]])
    before = replace(scorer.calibration, open_slope=2.0, open_offset=3.0, open_fallback=0.4)
    fitted, _ = fit(TypedPhotos(scenes=scenes, named=[], scorer=replace(scorer, calibration=before)))
    assert fitted.slope != before.slope
    assert (fitted.open_slope, fitted.open_offset, fitted.open_fallback) == (2.0, 3.0, 0.4)
