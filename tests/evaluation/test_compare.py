# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from ovd.evaluation.coco import evaluate
from ovd.evaluation.compare import RankedDetections, bootstrap
from ovd.evaluation.matching import match_table
from tests.evaluation.cases import random_case


@pytest.mark.parametrize("iou, name", [(0.5, "AP50"), (0.75, "AP75")])
@pytest.mark.parametrize("seed", range(5))
def test_precision__equal_weights_give_the_evaluations_ap(seed: int, iou: float, name: str) -> None:
    gt, results = random_case(seed, images=12)
    table = match_table(gt, results, iou=iou)
    expected = evaluate(gt, results, None, ("bbox",)).values[f"bbox/{name}"]
    assert bootstrap(table, table, {"all": list(table)}, samples=0)["all"].a == pytest.approx(expected, abs=1e-9)


def test_precision__weight_2_equals_the_image_twice() -> None:
    gt, results = random_case(8, images=6)
    image_ids = sorted(i["id"] for i in gt["images"])
    twin = 10_000
    doubled = copy.deepcopy(gt)
    doubled["images"].append(gt["images"][0] | {"id": twin})
    chosen = image_ids[2]
    for a in gt["annotations"]:
        if a["image_id"] == chosen:
            doubled["annotations"].append(a | {"id": 900 + a["id"], "image_id": twin})
    more = results + [d | {"image_id": twin} for d in results if d["image_id"] == chosen]
    weight = np.array([2.0 if i == chosen else 1.0 for i in image_ids])
    table, other = match_table(gt, results), match_table(doubled, more)
    # Ties between an image and its twin are broken inside a pair of equal scores: precision after the pair is the same.
    twice = [RankedDetections.of(table[i]).precision(weight) for i in table]
    expected = [RankedDetections.of(other[i]).precision(np.ones(len(weight) + 1)) for i in other]
    assert twice == pytest.approx(expected, abs=0.02, nan_ok=True)


def test_bootstrap__interval_excludes_0_only_for_a_clear_gain() -> None:
    gt, results = random_case(1, images=40)
    b, gone = match_table(gt, results), match_table(gt, [])
    groups = {"all": list(b)}
    same = bootstrap(b, b, groups, samples=50)["all"]
    assert (same.difference, same.low, same.high, same.clear) == (0, 0, 0, False)
    gain = bootstrap(gone, b, groups, samples=100)["all"]
    assert gain.clear and gain.low > 0
    assert gain.low <= gain.difference <= gain.high
    assert gain.a == 0
    reverse = bootstrap(b, gone, groups, samples=100)["all"]
    assert (reverse.low, reverse.high) == (pytest.approx(-gain.high), pytest.approx(-gain.low))


def test_bootstrap__interval_depends_on_the_seed_only() -> None:
    gt, results = random_case(1, images=20)
    a, b = match_table(gt, results[::2]), match_table(gt, results)
    first, second, third = (bootstrap(a, b, {"x": list(a)}, samples=40, seed=s)["x"] for s in (3, 3, 4))
    assert first == second
    assert (first.low, first.high) != (third.low, third.high)


def test_bootstrap__difference_is_nan_without_objects() -> None:
    gt, results = random_case(1)
    table = match_table(gt | {"annotations": []}, results)
    assert math.isnan(bootstrap(table, table, {"x": list(table)}, samples=5)["x"].difference)


def test_bootstrap__tables_of_different_pictures_are_refused() -> None:
    first, second = (match_table(*random_case(s, images=6)) for s in (1, 2))
    merged = dict(zip(first, second.values(), strict=True))
    with pytest.raises(ValueError, match="different ground truth"):
        bootstrap(first, merged, {"x": list(first)}, samples=2)


def test_bootstrap__groups_share_the_resampled_pictures() -> None:
    gt, results = random_case(4, images=15)
    a, b = match_table(gt, results[::2]), match_table(gt, results)
    ids = sorted(a)
    both = bootstrap(a, b, {"base": ids[:3], "novel": ids[3:]}, samples=30)
    for name, some in (("base", ids[:3]), ("novel", ids[3:])):
        assert both[name] == bootstrap(a, b, {name: some}, samples=30)[name]
