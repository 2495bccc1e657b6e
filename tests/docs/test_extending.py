# SPDX-License-Identifier: Apache-2.0
"""The page about extending quotes files that run: here they run, and the page is compared with them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from pretrain.data.coco import check_ground_truth
from pretrain.engine.errors import UserError
from tests.docs.pages import ROOT
from tests.docs.test_examples import load

QUOTED = re.findall(
    r"<!-- quoted: (\S+) -->\n```python\n(.*?)```",
    (ROOT / "docs/guide/extending.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("file", "text"), QUOTED, ids=[file for file, _ in QUOTED])
def test_extending__page_quotes_the_files(file: str, text: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert text.strip() == source.removeprefix("# SPDX-License-Identifier: Apache-2.0\n").strip()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 40


def test_extending__every_extension_has_an_example() -> None:
    assert len(QUOTED) >= 5


@pytest.fixture
def metric() -> ModuleType:
    return load("extending/metric")


@pytest.mark.parametrize(("base", "novel", "mean"), [(0.6, 0.3, 0.4), (0.5, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_metric_example__is_written_with_the_others(
    metric: ModuleType, tmp_path: Path, base: float, novel: float, mean: float
) -> None:
    truth, results = load("evaluate_results").toy()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    split = metric.Split.from_dict({"name": "mine", "base": ["dog"], "novel": ["zebra"]}, categories=names)
    metrics = metric.evaluate(truth, results, split)
    metrics.values.update({"bbox/AP50_base": base, "bbox/AP50_novel": novel})
    metric.write(metric.add_harmonic_mean(metrics), tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert written["bbox/AP50_hmean"] == pytest.approx(mean)


def test_metric_example__runs_as_a_command(metric: ModuleType, tmp_path: Path) -> None:
    truth, results = load("evaluate_results").toy()
    split = {"name": "mine", "base": ["dog"], "novel": ["zebra"]}
    for name, content in (("gt", truth), ("results", results), ("split", split)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    files = [str(tmp_path / f"{name}.json") for name in ("gt", "results", "split")]
    assert metric.main([*files, str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert written["bbox/AP50_hmean"] == pytest.approx(1.0)  # the zebra's IoU is .5, which counts at AP50


def test_loss_example__equals_its_formula() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    unit = [row / row.norm() for row in (*a, *b)]
    total = 0.0
    for i, row in enumerate(unit):
        partner = (i + 5) % 10
        below = sum(math.exp(float(row @ other) / 0.2) for j, other in enumerate(unit) if j not in (i, partner))
        total += math.log(below) - float(row @ unit[partner]) / 0.2
    loss = load("extending/loss").decoupled_contrastive(a, b, temperature=0.2)
    assert float(loss) == pytest.approx(total / 10, abs=1e-5)


def test_data_example__csv_becomes_a_readable_coco_file(tmp_path: Path) -> None:
    data = load("extending/detection_data")
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    table = tmp_path / "boxes.csv"
    table.write_text("file,x1,y1,x2,y2,name\na.png,1,2,11,22,mug\na.png,5,5,9,9,dog\n", encoding="utf-8")
    truth = check_ground_truth(data.convert(table, tmp_path))
    assert truth.categories == {1: "dog", 2: "mug"}
    assert [a["bbox"] for a in truth.annotations] == [[1, 2, 10, 20], [5, 5, 4, 4]]
    table.write_text("file,x1,y1,x2,y2,name\nb.png,1,2,11,22,mug\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no picture .*b\.png"):
        data.convert(table, tmp_path)
