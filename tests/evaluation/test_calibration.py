# SPDX-License-Identifier: Apache-2.0
"""Reliability and drift."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ovd.evaluation.reliability import reliability, reliability_svg, score_drift


def test_reliability__ece_of_three_known_bins() -> None:
    # Two bins of width .5: scores .2, .4 (none right), scores .6, .8, 1.0 (two right).
    curve = reliability([0.2, 0.4, 0.6, 0.8, 1.0], [0, 0, 1, 0, 1], bins=2)
    assert curve.count.tolist() == [2, 3]
    assert curve.ece == pytest.approx(2 / 5 * 0.3 + 3 / 5 * (0.8 - 2 / 3))
    assert curve.mce == pytest.approx(0.3)


def test_reliability__bin_edges_belong_to_the_upper_bin() -> None:
    assert reliability([0.0, 0.5, 1.0], [1, 1, 1], bins=2).count.tolist() == [1, 2]


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability__ece_equals_a_loop_over_bins(bins: int) -> None:
    rng = np.random.default_rng(bins)
    score = rng.random(500)
    correct = rng.random(500) < score**2
    expected = 0.0
    for b in range(bins):
        inside = (score >= b / bins) & (score < (b + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - score[inside].mean())
    assert reliability(score, correct, bins=bins).ece == pytest.approx(expected)


def test_reliability__overconfident_scores_have_a_larger_ece() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(20_000)
    correct = rng.random(20_000) < score
    assert reliability(score, correct).ece < 0.02
    assert reliability(np.ones(20_000), correct).ece == pytest.approx(0.5, abs=0.02)


def test_reliability__ece_is_nan_without_detections() -> None:
    curve = reliability([], [])
    assert math.isnan(curve.ece) and math.isnan(curve.mce)
    assert "0 detections" in reliability_svg(curve)


@pytest.mark.parametrize("score, correct", [([1.1], [1]), ([-0.1], [0]), ([float("nan")], [0]), ([0.5, 0.5], [1])])
def test_reliability__scores_outside_0_to_1_are_refused(score: list[float], correct: list[int]) -> None:
    with pytest.raises(ValueError, match="score"):
        reliability(score, correct)


def test_score_drift__counts_a_lost_detection_as_score_0() -> None:
    mean, within = score_drift(np.array([0.9, 0.5, 0.7, 0.3]), np.array([0.9, 0.45, 0.6, math.nan]))
    assert mean == pytest.approx((0 + 0.05 + 0.1 + 0.3) / 4)
    assert within == 0.5
    assert all(map(math.isnan, score_drift(np.zeros(0), np.zeros(0))))


def test_reliability_svg__is_well_formed_and_escapes_its_title() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(100)
    svg = reliability_svg(reliability(score, score > 0.5), title="<script>&", caption="novel & base")
    root = ET.fromstring(svg)
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == 1 + 15
    assert "<script" not in svg
