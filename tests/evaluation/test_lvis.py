# SPDX-License-Identifier: Apache-2.0
"""LVIS's protocol: what is not labelled is not judged, means by frequency; digits of the lvis package where it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovd.data.catalog import CocoImages
from ovd.data.lvis import Federated, is_lvis, split_of
from ovd.evaluate import main
from ovd.evaluation.coco import evaluate
from ovd.evaluation.lvis import evaluate_lvis
from pretrain.data.coco import picture_file
from pretrain.engine.errors import UserError

CATEGORIES = [
    {"id": 1, "name": "cup", "frequency": "f", "synonyms": ["cup"]},
    {"id": 2, "name": "crab_(animal)", "frequency": "c", "synonyms": ["crab"]},
    {"id": 3, "name": "unicycle", "frequency": "r", "synonyms": ["unicycle"]},
]


def picture(i: int, *, negative: tuple[int, ...] = (), incomplete: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "id": i, "height": 100, "width": 100, "coco_url": f"http://host/val2017/{i:012d}.jpg",
        "neg_category_ids": list(negative), "not_exhaustive_category_ids": list(incomplete),
    }  # fmt: skip


def thing(i: int, image: int, category: int, x: float, side: float = 20.0) -> dict[str, Any]:
    outline = [x, 10, x + side, 10, x + side, 10 + side, x, 10 + side]
    return {
        "id": i, "image_id": image, "category_id": category, "bbox": [x, 10, side, side], "area": side * side,
        "segmentation": [outline],
    }  # fmt: skip


def seen(image: int, category: int, x: float, score: float, side: float = 20.0) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, 10, side, side], "score": score}


def small() -> dict[str, Any]:
    return {
        "images": [picture(1), picture(2, negative=(3,)), picture(3, incomplete=(1,))],
        "annotations": [thing(1, 1, 1, 10), thing(2, 3, 1, 10), thing(3, 1, 3, 60)],
        "categories": CATEGORIES,
    }


HITS = [seen(1, 1, 10, 0.5), seen(3, 1, 10, 0.5), seen(1, 3, 60, 0.5)]


def test_lvis__perfect_detections_have_ap_1() -> None:
    values = evaluate_lvis(small(), HITS).values
    assert [values[f"bbox/AP{f}"] for f in "rf"] == pytest.approx([1, 1])
    assert math.isnan(values["bbox/APc"])
    assert (values["bbox/AP_novel"], values["bbox/AP_base"]) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("false_alarm", "category", "counts"),
    [
        (seen(2, 1, 50, 0.9), "f", False),  # nobody looked for cups in picture 2
        (seen(2, 3, 50, 0.9), "r", True),  # there is no unicycle in picture 2
        (seen(3, 1, 50, 0.9), "f", False),  # not every cup of picture 3 is labelled
        (seen(1, 1, 50, 0.9), "f", True),  # picture 1 shows one cup
    ],
)
def test_lvis__only_verified_negatives_cost_precision(false_alarm: dict[str, Any], category: str, counts: bool) -> None:
    value = evaluate_lvis(small(), [*HITS, false_alarm]).values[f"bbox/AP{category}"]
    assert value == pytest.approx(1 if not counts else 1 / 2 if category == "r" else 2 / 3)
    coco = evaluate(small(), [*HITS, false_alarm], split_of("lvis", small(), where="x")).values
    assert coco["bbox/AP_novel" if category == "r" else "bbox/AP_base"] < 1, "COCO's protocol punishes all four"


def test_lvis__keeps_300_detections_per_image() -> None:
    crowd = [seen(1, 2, 50, 0.9) for _ in range(300)]
    assert evaluate_lvis(small(), [*HITS, *crowd[:299]]).values["bbox/APr"] == pytest.approx(0.0)
    assert evaluate_lvis(small(), [*HITS, *crowd[:298]]).values["bbox/APr"] == pytest.approx(1.0)


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for i in range(1, 13):
        present = [c for c in (1, 2, 3) if rng.random() < 0.5]
        absent = [c for c in (1, 2, 3) if c not in present and rng.random() < 0.5]
        images.append(picture(i, negative=tuple(absent), incomplete=tuple(c for c in present if rng.random() < 0.4)))
        for category in present:
            for _ in range(rng.integers(1, 4)):
                x, side = float(rng.uniform(0, 40)), float(rng.choice([12, 25, 50]))
                annotations.append(thing(len(annotations) + 1, i, category, x, side))
                if rng.random() < 0.8:
                    results.append(seen(i, category, x + float(rng.normal(0, side / 12)), float(rng.random()), side))
        for _ in range(4):
            results.append(seen(i, int(rng.integers(1, 4)), float(rng.uniform(0, 40)), float(rng.random()), 25.0))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, results


@pytest.mark.parametrize("seed", range(4))
def test_lvis__equals_the_lvis_package(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvis = pytest.importorskip("lvis", reason="pip install --no-deps lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # the package is older than numpy 2
    gt, results = random_case(seed)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(gt))
    found = lvis.LVISResults(lvis.LVIS(str(path)), [dict(r) for r in results])
    oracle = lvis.LVISEval(lvis.LVIS(str(path)), found, "bbox")
    oracle.run()
    ours = evaluate_lvis(gt, results).values
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        theirs = oracle.results[name]
        assert ours[f"bbox/{name}"] == pytest.approx(theirs if theirs > -1 else math.nan, abs=1e-12, nan_ok=True), name


def test_lvis__format_and_picture_paths_are_recognised() -> None:
    assert is_lvis(small()) and not is_lvis({"images": [{"id": 1}], "annotations": [], "categories": []})
    assert picture_file(small()["images"][0]) == "val2017/000000000001.jpg"
    assert picture_file({"id": 1, "file_name": "a.png", "coco_url": "http://host/b/c.jpg"}) == "a.png"
    with pytest.raises(UserError, match="image 7 has neither"):
        picture_file({"id": 7})


def test_lvis__file_without_federated_fields_is_refused() -> None:
    gt = small()
    del gt["images"][1]["not_exhaustive_category_ids"]
    with pytest.raises(UserError, match=r"images\[1\] has no list 'not_exhaustive_category_ids'"):
        Federated.of(gt)
    gt = small()
    gt["categories"] = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]
    with pytest.raises(UserError, match="'frequency' must be f, c or r"):
        evaluate_lvis(gt, HITS)


def test_lvis__command_chooses_the_protocol_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gt.json").write_text(json.dumps(small()))
    (tmp_path / "dt.json").write_text(json.dumps([*HITS, seen(2, 1, 50, 0.9)]))
    files = ["--annotations", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "dt.json"), "--split", "lvis"]
    for protocol, expected in (("auto", 1.0), ("coco", 2 / 3)):
        assert main([*files, "--protocol", protocol, "--out", str(tmp_path / protocol)]) == 0
        line = "AP by frequency: rare 100.0, common n/a, frequent 100.0"
        assert (line in capsys.readouterr().out) == (protocol == "auto")
        metrics = json.loads((tmp_path / protocol / "metrics.json").read_text())["metrics"]
        assert metrics["bbox/AP_base"] == pytest.approx(expected)
        assert ("bbox/APr" in metrics) == (protocol == "auto")
    with pytest.raises(UserError, match="--compare"):
        main([*files, "--compare", str(tmp_path / "dt.json")])


def test_lvis__training_hides_rare_labels(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "val2017").mkdir()
    for number in (1, 3):
        Image.new("RGB", (100, 100), "red").save(tmp_path / "val2017" / f"{number:012}.jpg")
    (tmp_path / "gt.json").write_text(json.dumps(small()))
    split = split_of("lvis", small(), where="gt.json")
    images = CocoImages(images=tmp_path, annotations=tmp_path / "gt.json", split=split, labels="base")
    assert images.names == ("cup", "crab_(animal)", "unicycle") and images.novel == {2}
    assert images.image_ids == [1, 3]
    assert images.load(0).classes.tolist() == [0]
