# SPDX-License-Identifier: Apache-2.0
"""Metrics against pycocotools, and the traps on the way."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from ovd.data.splits import Split
from ovd.evaluation.coco import as_one_category, evaluate
from ovd.evaluation.matching import CategoryMatches, match_table, shown_at
from tests.evaluation.cases import official, random_case, rectangle

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


def stats_of(values: dict[str, float], kind: str, suffix: str = "") -> list[float]:
    """Our values in the oracle's form: −1 where there is nothing to average."""
    found = [values[f"{kind}/{name}{suffix}"] for name in NAMES]
    return [-1.0 if math.isnan(v) else v for v in found]


def halves(gt: dict[str, Any]) -> Split:
    names = {c["id"]: c["name"] for c in gt["categories"]}
    ids = sorted(names)
    return Split(name="halves", base=tuple(ids[::2]), novel=tuple(ids[1::2]), names=names)


def tiny(
    boxes: list[list[float]], found: list[tuple[list[float], float]], **more: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One image of 100×100, one category with id 7."""
    gt = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": 7, "bbox": b, "area": b[2] * b[3], "iscrowd": 0, **more}
            for n, b in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cup"}],
    }
    return gt, [{"image_id": 1, "category_id": 7, "bbox": b, "score": s} for b, s in found]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_box_ap__equals_pycocotools_for_all_base_and_novel(seed: int, ties: bool) -> None:
    gt, results = random_case(seed, ties=ties)
    split = halves(gt)
    values = evaluate(gt, results, split, ("bbox",)).values
    assert stats_of(values, "bbox") == official(gt, results).stats[:6].tolist()
    assert stats_of(values, "bbox", "_base") == official(gt, results, categories=list(split.base)).stats[:6].tolist()
    assert stats_of(values, "bbox", "_novel") == official(gt, results, categories=list(split.novel)).stats[:6].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_mask_ap__equals_pycocotools_when_results_also_have_boxes(seed: int) -> None:
    gt, results = random_case(seed, masks=True)
    values = evaluate(gt, results, halves(gt)).values
    assert stats_of(values, "segm") == official(gt, results, "segm").stats[:6].tolist()
    assert stats_of(values, "bbox") == official(gt, results, "bbox").stats[:6].tolist()


def test_per_class_ap__equals_pycocotools() -> None:
    gt, results = random_case(3, images=20)
    run = official(gt, results)
    for column, row in enumerate(sorted(evaluate(gt, results).per_class, key=lambda r: r.id)):
        for name, t, area in (("AP", slice(None), 0), ("AP50", 0, 0), ("AP75", 5, 0), ("APl", slice(None), 3)):
            curve = run.eval["precision"][t, :, column, area, 2]
            assert row.n_gt == sum(a["category_id"] == row.id and not a["iscrowd"] for a in gt["annotations"])
            if (curve > -1).any():
                assert row.values[name] == pytest.approx(curve.mean(), abs=1e-12)
            else:
                assert math.isnan(row.values[name])


@pytest.mark.parametrize("cap", [1, 3, 300])
def test_max_dets__custom_values_do_not_give_ap_minus_1(cap: int) -> None:
    gt, results = random_case(5, images=12)
    precision = official(gt, results, max_dets=[cap]).eval["precision"]
    values = evaluate(gt, results, None, ("bbox",), max_dets=cap).values
    for area, name in enumerate(("AP", "APs", "APm", "APl")):
        curve = precision[:, :, :, area, 0]
        assert values[f"bbox/{name}"] == curve[curve > -1].mean()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_recall__equals_use_cats_0_on_the_group_alone(seed: int, kind: str) -> None:
    gt, results = random_case(seed, masks=kind == "segm", ties=seed % 2 == 0, images=8)
    split = halves(gt)
    values = evaluate(gt, results, split, (kind,)).values
    for suffix, ids in (("", split.ids), ("_base", split.base), ("_novel", split.novel)):
        only = gt | {"annotations": [a for a in gt["annotations"] if a["category_id"] in ids]}
        recall = official(only, results, kind, max_dets=[1, 100, 300], use_categories=False).eval["recall"][:, 0, 0]
        for column, cap in ((1, 100), (2, 300)):
            assert values[f"{kind}/AR{cap}{suffix}"] == pytest.approx(recall[:, column].mean(), abs=1e-12)
            assert values[f"{kind}/AR{cap}{suffix}@50"] == pytest.approx(recall[0, column], abs=1e-12)


def test_mean__skips_categories_without_objects() -> None:
    gt, results = tiny([[10, 10, 40, 40]], [([10, 10, 40, 40], 0.9)])
    gt["categories"].append({"id": 9, "name": "never there"})
    results.append({"image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "score": 0.99})
    metrics = evaluate(gt, results, None, ("bbox",))
    assert metrics.values["bbox/AP50"] == pytest.approx(1.0)
    assert math.isnan(metrics.per_class[1].values["AP"])
    assert metrics.per_class[1].n_det == 1


def test_ap__precision_beyond_the_reached_recall_is_0() -> None:
    # One of two objects is found: precision is 1 up to recall .5 (51 of the 101 recall points), then 0.
    gt, results = tiny([[0, 0, 20, 20], [60, 60, 20, 20]], [([0, 0, 20, 20], 0.9), ([30, 30, 20, 20], 0.8)])
    assert evaluate(gt, results, None, ("bbox",)).values["bbox/AP50"] == pytest.approx(51 / 101)


def test_crowds__count_neither_as_missed_nor_as_false_positives() -> None:
    gt, results = tiny([[0, 0, 20, 20]], [([0, 0, 20, 20], 0.5), ([41, 41, 20, 20], 0.9), ([42, 42, 20, 20], 0.8)])
    crowd = {"id": 2, "image_id": 1, "category_id": 7, "bbox": [40, 40, 60, 60], "area": 3600, "iscrowd": 1}
    gt["annotations"].append(crowd)
    metrics = evaluate(gt, results, None, ("bbox",))
    assert metrics.values["bbox/AP50"] == pytest.approx(1.0)
    assert metrics.values["bbox/AR100@50"] == 1.0
    assert metrics.counts["objects"] == 1


def test_ignore_flag__without_iscrowd_counts_as_in_pycocotools_with_a_warning() -> None:
    gt, results = tiny([[0, 0, 20, 20], [50, 50, 20, 20]], [([0, 0, 20, 20], 0.9)])
    gt["annotations"][1]["ignore"] = 1
    metrics = evaluate(gt, results, None, ("bbox",))
    assert metrics.values["bbox/AP50"] == official(gt, results).stats[1] == pytest.approx(51 / 101)
    assert any("'ignore'" in w for w in metrics.warnings)


def test_annotation_id_0__is_not_lost() -> None:
    gt, results = tiny([[0, 0, 20, 20]], [([0, 0, 20, 20], 0.9)])
    gt["annotations"][0]["id"] = 0
    assert official(gt, results).stats[1] == 0  # the trap: a match with id 0 reads as no match
    metrics = evaluate(gt, results, None, ("bbox",))
    assert metrics.values["bbox/AP50"] == pytest.approx(1.0)
    assert any("id 0" in w for w in metrics.warnings)


def test_mask_area__is_the_masks_not_the_boxs() -> None:
    # A thin diagonal has a large box and a small mask. Unmatched and of medium size it would be a false positive.
    gt, _ = tiny([[0, 0, 10, 10]], [])
    gt["annotations"][0]["segmentation"] = rectangle([0, 0, 10, 10], (100, 100))
    right = {
        "image_id": 1,
        "category_id": 7,
        "score": 0.5,
        "bbox": [0, 0, 10, 10],
        "segmentation": rectangle([0, 0, 10, 10], (100, 100)),
    }
    thin = {
        "image_id": 1,
        "category_id": 7,
        "score": 0.9,
        "bbox": [20, 20, 60, 60],
        "segmentation": rectangle([20, 20, 60, 2], (100, 100)),
    }
    values = evaluate(gt, [right, thin]).values
    assert values["segm/APs"] == official(gt, [right, thin], "segm").stats[3] == pytest.approx(0.5)
    assert values["bbox/APs"] == official(gt, [right, thin], "bbox").stats[3] == pytest.approx(1.0)


def test_ap__is_0_with_a_warning_without_detections() -> None:
    gt, _ = random_case(0)
    metrics = evaluate(gt, [], halves(gt), ("bbox",))
    assert metrics.values["bbox/AP"] == 0.0
    assert metrics.values["bbox/AR100_base"] == 0.0
    assert any("no detections" in w for w in metrics.warnings)


def test_ap__is_nan_with_a_warning_without_objects() -> None:
    gt, results = random_case(0)
    metrics = evaluate(gt | {"annotations": []}, results, None, ("bbox",))
    assert all(math.isnan(v) for v in metrics.values.values())
    assert any("n/a" in w for w in metrics.warnings)


def test_evaluate__accepts_a_file_without_images() -> None:
    gt = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    assert all(math.isnan(v) for v in evaluate(gt, []).values.values())


def test_as_one_category__equals_pycocotools_use_cats_0() -> None:
    gt, results = random_case(3)
    metrics = evaluate(*as_one_category(gt, results), None, ("bbox",))
    assert stats_of(metrics.values, "bbox") == list(official(gt, results, "bbox", use_categories=False).stats[:6])


def test_recall__box_of_two_categories_counts_once() -> None:
    gt, results = tiny([[0, 0, 20, 20]], [([0, 0, 20, 20], 0.4)])
    twice = [*results, {**results[0], "category_id": 9, "score": 0.9}]
    things, found = as_one_category(gt, twice)
    assert [one["score"] for one in found] == [0.9]
    assert evaluate(things, found, None, ("bbox",)).values["bbox/AP"] == pytest.approx(1.0)


def test_missing_images__count_as_missed_with_a_warning() -> None:
    gt, results = tiny([[0, 0, 20, 20]], [([0, 0, 20, 20], 0.9)])
    gt["images"].append({"id": 2, "width": 100, "height": 100})
    gt["annotations"].append(gt["annotations"][0] | {"id": 2, "image_id": 2})
    metrics = evaluate(gt, results, None, ("bbox",))
    assert metrics.values["bbox/AR100@50"] == 0.5
    assert any("1 of 2 images" in w for w in metrics.warnings)


@pytest.mark.parametrize("seed", range(3))
def test_ap__does_not_depend_on_the_order_of_results(seed: int) -> None:
    gt, results = random_case(seed)
    shuffled = [results[i] for i in np.random.default_rng(seed).permutation(len(results))]
    a, b = (evaluate(gt, r, None, ("bbox",)).values for r in (results, shuffled))
    assert a == pytest.approx(b, abs=0, nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_ap__does_not_depend_on_ids(seed: int) -> None:
    gt, results = random_case(seed)
    ids = sorted(c["id"] for c in gt["categories"])
    category = {i: 1000 - 3 * n for n, i in enumerate(ids)}
    image = {i["id"]: 5000 + n * 7 for n, i in enumerate(sorted(gt["images"], key=lambda i: -i["id"]))}
    other = {
        "images": [i | {"id": image[i["id"]]} for i in gt["images"]],
        "annotations": [
            a | {"image_id": image[a["image_id"]], "category_id": category[a["category_id"]]} for a in gt["annotations"]
        ],
        "categories": [c | {"id": category[c["id"]]} for c in gt["categories"]],
    }
    renamed = [d | {"image_id": image[d["image_id"]], "category_id": category[d["category_id"]]} for d in results]
    first, second = (evaluate(g, r, None, ("bbox",)).values for g, r in ((gt, results), (other, renamed)))
    assert first == pytest.approx(second, abs=1e-12, nan_ok=True)


def test_split__categories_outside_change_no_figure() -> None:
    gt, results = random_case(2, images=12)
    names = {c["id"]: c["name"] for c in gt["categories"]}
    ids = sorted(names)
    split = Split(name="some", base=tuple(ids[:3]), novel=tuple(ids[3:5]), names=names)
    without = gt | {"annotations": [a for a in gt["annotations"] if a["category_id"] in split.ids]}
    kept = [d for d in results if d["category_id"] in split.ids]
    all_of_it, only = evaluate(gt, results, split, ("bbox",)), evaluate(without, kept, split, ("bbox",))
    assert all_of_it.values == pytest.approx(only.values, abs=0, nan_ok=True)
    assert all_of_it.counts["detections_outside_split"] == len(results) - len(kept) > 0
    assert {r.id for r in all_of_it.per_class} == set(split.ids)


def test_evaluate__does_not_change_its_inputs() -> None:
    gt, results = random_case(1, masks=True)
    before = copy.deepcopy((gt, results))
    evaluate(gt, results, halves(gt))
    assert (gt, results) == before


def test_evaluate__prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(*random_case(1), None, ("bbox",))
    assert capsys.readouterr().out == ""


def test_recall__of_proposals_replaces_that_of_results() -> None:
    gt, results = tiny([[0, 0, 20, 20], [50, 50, 20, 20]], [([0, 0, 20, 20], 0.9)])
    proposals = [{"image_id": 1, "score": 0.1, "bbox": b} for b in ([0, 0, 20, 20], [50, 50, 20, 21])]
    values = evaluate(gt, results, None, ("bbox",), proposals=proposals).values
    assert values["bbox/AR100@50"] == 1.0
    assert values["bbox/AP50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("iou, t", [(0.5, 0), (0.75, 5)])
def test_match_table__equals_pycocotools_matches(iou: float, t: int) -> None:
    gt, results = random_case(4, images=10)
    run = official(gt, results)
    for column, (category, m) in enumerate(sorted(match_table(gt, results, iou=iou).items())):
        recall = run.eval["recall"][t, column, 0, 2]
        if m.objects.sum():
            assert m.correct.sum() / m.objects.sum() == pytest.approx(recall)
        assert len(m.score) == sum(d["category_id"] == category for d in results)
        assert not (m.correct & m.ignored).any()


def test_shown_at__crowds_count_neither_way() -> None:
    none = np.zeros(2, dtype=bool)
    one = CategoryMatches(
        image=np.array([0, 0, 1, 1]),
        score=np.array([0.9, 0.6, 0.3, 0.8]),
        correct=np.array([True, False, True, False]),
        ignored=np.array([False, False, False, True]),
        objects=np.array([2, 1]),
    )
    nothing = CategoryMatches(
        image=np.array([0, 1]), score=np.zeros(2), correct=none, ignored=none, objects=np.array([1, 0])
    )
    assert shown_at([one, nothing], threshold=0.5) == (1 / 2, 1 / 4)
    assert shown_at([nothing], threshold=0.5) == (0.0, 0.0)
