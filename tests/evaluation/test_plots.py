# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation: their curves are the table's figures, and the files are whole."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovd import evaluate
from ovd.data.splits import Split
from ovd.evaluation import coco
from ovd.evaluation.matching import match_table
from ovd.evaluation.plots import FLOOR, curves_svg, mean_curve, score_reliability

SPLIT = Split(name="two", base=frozenset({1, 2}), novel=frozenset({3}), names={1: "dog", 2: "cat", 3: "lamp"})


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random objects, and detections of which some are near one."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "width": 200, "height": 200} for i in range(12)]
    annotations, results = [], []
    for image in range(12):
        for _ in range(5):
            box = [*rng.uniform(0, 120, 2).tolist(), *rng.uniform(20, 70, 2).tolist()]
            category = int(rng.integers(1, 4))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.1)}
            )  # fmt: skip
            for _ in range(2):
                moved = [v + rng.normal(0, 6) for v in box[:2]] + [max(4.0, v + rng.normal(0, 6)) for v in box[2:]]
                results.append({"image_id": image, "category_id": category, "bbox": moved, "score": rng.random()})
    categories = [{"id": i, "name": name} for i, name in SPLIT.names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize(("iou", "key"), [(0.5, "AP50"), (0.75, "AP75")])
@pytest.mark.parametrize("seed", [0, 1])
def test_pr_curve__mean_is_the_tables_ap(iou: float, key: str, seed: int) -> None:
    gt, results = drawn(seed)
    values = coco.evaluate(gt, results, SPLIT, ["bbox"]).values
    table = match_table(gt, results, SPLIT, iou=iou)
    assert float(mean_curve(table, SPLIT.ids).mean()) == pytest.approx(values[f"bbox/{key}"], abs=1e-9)
    novel = float(mean_curve(table, [3]).mean())
    assert novel == pytest.approx(values[f"bbox/{key}_novel"], abs=1e-9)
    assert (np.diff(mean_curve(table, [3])) <= 1e-12).all()  # interpolated precision never rises


def test_reliability_plot__leaves_out_crowds() -> None:
    gt, results = drawn(0)
    table = match_table(gt, results, SPLIT)
    curve = score_reliability(table)
    shown = sum(int(((one.score >= FLOOR) & ~one.ignored).sum()) for one in table.values())
    right = sum(int((one.correct & (one.score >= FLOOR)).sum()) for one in table.values())
    assert curve.count.sum() == shown < len(results)
    assert np.nansum(curve.accuracy * curve.count) == pytest.approx(right)


def test_plots__command_writes_both(tmp_path: Path) -> None:
    gt, results = drawn(0)
    for name, content in (("gt", gt), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = ["--annotations", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "results.json")]
    assert evaluate.main([*files, "--plots", str(tmp_path / "plots")]) == 0
    for name in ("precision_recall", "reliability"):
        assert ET.parse(tmp_path / f"plots/{name}.svg").getroot().tag.endswith("svg")
    text = (tmp_path / "plots/precision_recall.svg").read_text()
    ap50 = 100 * coco.evaluate(gt, results, None, ["bbox"]).values["bbox/AP50"]
    assert f"IoU 0.50: AP {ap50:.1f}" in text


def test_plots__names_are_escaped() -> None:
    root = ET.fromstring(curves_svg({"a < b & c": np.linspace(1, 0, 101)}, title='"x" & <y>'))
    assert "a < b & c: AP 50.0" in "".join(root.itertext()) and root.attrib["aria-label"] == '"x" & <y>'
