# SPDX-License-Identifier: Apache-2.0
"""Ten thousand words are scored by the formulas, one pair of a region and a word at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ovd.inference.arrays import best_first, unit_rows
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.open_words import CompetitorGroups, OpenWords, distinct_rows
from ovd.inference.postprocess import best_class_per_region
from ovd.inference.scoring import Calibration, RegionSet
from tests.detector.fakes import COLOURS, make_detector, picture

CALIBRATION = Calibration(
    slope=1.7,
    offset=0.1,
    open_scale=15.0,
    open_objectness=0.8,
    open_quality=0.6,
    open_area=0.25,
    open_unknown=0.7,
    open_slope=1.2,
    open_offset=3.9,
)


def regions(rng: np.random.Generator, count: int = 7, dim: int = 16) -> RegionSet:
    corner = rng.uniform(0, 50, (count, 2))
    return RegionSet(
        boxes=np.concatenate([corner, corner + rng.uniform(5, 50, (count, 2))], axis=1).astype(np.float32),
        objectness=rng.uniform(0, 1, count).astype(np.float32),
        text=unit_rows(rng.normal(size=(count, dim)).astype(np.float32)),
        image=unit_rows(rng.normal(size=(count, dim)).astype(np.float32)),
        masks=None,
        size=(100, 120),
        word_scores=rng.uniform(0, 1, (count, 3)).astype(np.float32),
        bias=rng.normal(size=count).astype(np.float32),
        quality=rng.uniform(0, 1, count).astype(np.float32),
    )


def squashed(slope: float, offset: float, p: float, *, eps: float = 1e-6) -> float:
    p = min(max(p, eps), 1 - eps)
    return 1 / (1 + math.exp(-(slope * math.log(p / (1 - p)) + offset)))


def by_hand(seen: RegionSet, region: int, words: WordScorer, word: int) -> float:
    """The score of one pair in double precision, sum by sum."""
    c = words.calibration
    closed = np.flatnonzero(words.hyponyms[word]).tolist()
    if closed:
        scores = []
        for known in closed:
            cosine = float(seen.text[region].astype(float) @ words.word_rows[known].astype(float))
            head = 1 / (1 + math.exp(-(words.scale * cosine + float(seen.bias[region]))))
            mean = float(seen.word_scores[region, known]) ** (1 - c.head_weight) * head**c.head_weight
            scores.append(squashed(c.slope, c.offset, mean))
        return max(scores)
    image = seen.image[region].astype(float)
    mine = math.exp(c.open_scale * float(image @ words.rows[word].astype(float)))
    pairs = zip(words.competitors, words.competitor_mask[word], strict=True)
    others = sum(math.exp(c.open_scale * float(image @ row.astype(float))) for row, rival in pairs if rival)
    x1, y1, x2, y2 = (float(v) for v in seen.boxes[region])
    area = (x2 - x1) * (y2 - y1) / (seen.size[0] * seen.size[1])
    whole = float(seen.objectness[region]) ** c.open_objectness * area**c.open_area
    whole *= float(seen.quality[region]) ** c.open_quality
    known = zip(seen.word_scores[region], words.related[word], strict=True)
    whole *= (1 - max((float(p) for p, related in known if not related), default=0.0)) ** c.open_unknown
    return squashed(c.open_slope, c.open_offset, mine / (mine + others) * whole, eps=1e-12)


def scorer(rng: np.random.Generator, count: int, dim: int = 16) -> WordScorer:
    competitor_mask = rng.random((count, 12)) > 0.2
    competitor_mask[::3] = True  # many have no synonym
    hyponyms = rng.random((count, 3)) > 0.9
    related = hyponyms | (rng.random((count, 3)) > 0.7)
    return WordScorer(
        rows=unit_rows(rng.normal(size=(count, dim)).astype(np.float32)),
        competitors=unit_rows(rng.normal(size=(12, dim)).astype(np.float32)),
        competitor_mask=competitor_mask,
        word_rows=unit_rows(rng.normal(size=(3, dim)).astype(np.float32)),
        hyponyms=hyponyms,
        related=related,
        scale=4.0,
        calibration=CALIBRATION,
    )


@pytest.mark.parametrize("count", [1, 40])
def test_open_words__scores_equal_the_formula(count: int) -> None:
    rng = np.random.default_rng(count)
    seen, words = regions(rng), scorer(rng, count)
    expected = [[by_hand(seen, r, words, w) for w in range(count)] for r in range(len(seen))]
    np.testing.assert_allclose(words(seen), expected, rtol=2e-5, atol=1e-7)


def test_open_words__many_score_as_each_alone() -> None:
    """More than one block of them, and of a few regions."""
    rng = np.random.default_rng(0)
    seen, words = regions(rng, count=150), scorer(rng, 2000)
    together = words(seen)
    for word in rng.choice(2000, 30, replace=False).tolist():
        np.testing.assert_allclose(words.select([word])(seen)[:, 0], together[:, word], rtol=1e-5)


def test_open_words__boxes_of_finetuned_classes_score_zero_without_a_warning() -> None:
    rng = np.random.default_rng(0)
    seen = regions(rng, count=150)
    seen.objectness = np.zeros(150, np.float32)  # as theirs is
    competitor_mask = np.ones((40, 12), bool)
    competitor_mask[:30, :11] = False  # so that the odds of others are multiples of theirs
    words = OpenWords(
        rows=unit_rows(rng.normal(size=(40, 16)).astype(np.float32)),
        competitors=unit_rows(rng.normal(size=(12, 16)).astype(np.float32)),
        groups=CompetitorGroups.of(competitor_mask, np.zeros((40, 0), bool)),
        calibration=replace(CALIBRATION, open_scale=30.0),
    )
    with np.errstate(over="raise", invalid="raise"):
        assert words(seen).max() < 1e-3


@pytest.mark.parametrize("slope", [1.2, -1.2, 0.0])
@pytest.mark.parametrize(("count", "classes", "level"), [(150, 5000, 0.3), (20, 400, 0.9), (9, 300, 0.0), (0, 30, 0.1)])
def test_open_words__threshold_equals_full_scoring(count: int, classes: int, level: float, slope: float) -> None:
    """Of random regions: the same best scores, the same classes, the same scores of these."""
    rng = np.random.default_rng(classes)
    seen, words = regions(rng, count=count), scorer(rng, classes)
    words = replace(words, calibration=replace(CALIBRATION, open_slope=slope))
    every = words(seen)
    shown = words.shown(seen, threshold=level)
    np.testing.assert_allclose(shown.best, every.max(axis=0, initial=0.0), rtol=1e-6)
    far = np.abs(shown.best - level) > 1e-6  # from where rounding decides
    assert far.sum() > 0.9 * classes
    np.testing.assert_array_equal(np.isin(np.arange(classes), shown.classes)[far], (shown.best >= level)[far])
    np.testing.assert_allclose(shown.score_RS, every[:, shown.classes], rtol=1e-6)
    assert (np.diff(shown.classes) > 0).all()


@pytest.mark.parametrize("words", ["every colour", "red, -blue", "red"])
def test_open_words__query_equals_its_scores(words: str) -> None:
    """With negative words too, and by scorers that have no shorter way."""
    detector = make_detector()
    query = detector.query([*COLOURS, "unicorn"] if words == "every colour" else words)
    regions = detector.embed(picture()).regions
    score_RC, negative_RN = detector.scorer(query)(regions)
    if negative_RN.shape[1]:
        score_RC = np.where((score_RC <= negative_RN), -1, score_RC)
    shown = detector.scorer(query).shown(regions, threshold=0.3)
    np.testing.assert_array_equal(shown.classes, np.flatnonzero(score_RC.max(axis=0) >= 0.3))
    np.testing.assert_array_equal(shown.score_RS, score_RC[:, shown.classes])
    np.testing.assert_array_equal(shown.best, score_RC.max(axis=0))


@pytest.mark.parametrize("scale", [15.0, 60.0])
def test_open_words__dominant_synonym_keeps_precision(scale: float) -> None:
    """Nearly all of the competitors' odds are left out: what remains is not total minus left out."""
    rows = np.eye(4, dtype=np.float32)
    seen = regions(np.random.default_rng(0), count=1, dim=4)
    seen.image, seen.objectness = rows[:1], np.ones(1, np.float32)
    seen.boxes, seen.size = np.array([[0, 0, 10, 10]], np.float32), (10, 10)
    competitor_mask = np.array([[False, True, True, True], [True, True, True, True], [False] * 4])
    plain = Calibration(open_scale=scale)
    words = OpenWords(
        rows=rows[[1, 0, 1]],
        competitors=rows,
        groups=CompetitorGroups.of(competitor_mask, np.zeros((3, 0), bool)),
        calibration=plain,
    )
    assert words(seen)[0, 0] == pytest.approx(1 / 4, rel=1e-5)  # against three others that are as far away
    assert words(seen)[0, 1] == pytest.approx(1 / 2, rel=1e-4)  # against itself
    assert words(seen)[0, 2] > 0.99  # against none


@pytest.mark.parametrize("shape", [(50, 12), (5, 0), (0, 3), (1, 1)])
def test_distinct_rows__rebuild_the_table(shape: tuple[int, int]) -> None:
    table = np.random.default_rng(1).random(shape) > 0.8
    distinct = distinct_rows(table)
    np.testing.assert_array_equal(distinct.rows[distinct.of], table)
    assert len({row.tobytes() for row in distinct.rows}) == len(distinct.rows)


@pytest.mark.parametrize("count", [None, 0, 1, 7, 60, 100])
def test_top_k__equals_a_stable_sort(count: int | None) -> None:
    scores = np.random.default_rng(2).integers(0, 6, 60).astype(np.float32)
    for values in (scores, np.where(scores == 5, np.float32("nan"), scores)):
        np.testing.assert_array_equal(best_first(values, count), np.argsort(-values, kind="stable")[:count])


@pytest.mark.parametrize("order", ["C", "F"])
def test_best_class__first_of_equal_scores(order: str) -> None:
    score = np.asarray(np.random.default_rng(3).integers(0, 9, (30, 20)) / 8, np.float32, order=order)  # type: ignore[call-overload]
    found = best_class_per_region(score, threshold=1.0)
    expected = [(r, row.index(max(row))) for r, row in enumerate(score.tolist()) if max(row) >= 1.0]
    assert list(zip(found.region.tolist(), found.class_id.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(found.score, score[found.region, found.class_id])
