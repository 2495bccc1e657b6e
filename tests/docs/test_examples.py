# SPDX-License-Identifier: Apache-2.0
"""The scripts of `examples/` run as they stand, and say what they are meant to say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pretrain.engine.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples__are_20_to_60_lines() -> None:
    assert len(SCRIPTS) >= 5
    assert all(20 <= len(script.read_text(encoding="utf-8").splitlines()) <= 60 for script in SCRIPTS)


def test_find_words__finds_what_the_picture_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("find_words").main([]) == 0
    first, other = capsys.readouterr().out.split("other words, same regions:")
    assert re.search(r"^horse +0\.\d\d  from", first, re.MULTILINE)
    assert "animal" in other


def test_search_by_crop__ranks_its_own_picture_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("search_by_crop").main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "horses.jpg" in lines[0]


def test_classes_on_folder__writes_coco_results(tmp_path: Path) -> None:
    module = load("classes_on_folder")
    out = tmp_path / "results.json"
    assert module.main([str(module.PHOTOS), "dog, horse, car", str(out)]) == 0
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results and all({"image_id", "category_id", "bbox", "score"} <= entry.keys() for entry in results)


def test_pretrain_backbone__exports_to_detectron2(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for n in range(8):
        Image.fromarray(rng.integers(0, 255, (72, 72, 3), dtype=np.uint8)).save(photos / f"{n}.png")
    assert load("pretrain_backbone").main([str(photos), str(tmp_path / "run"), "--steps", "2"]) == 0
    assert {"model.safetensors", "detectron2.yaml"} <= {p.name for p in (tmp_path / "run" / "detectron2").iterdir()}


def test_evaluate_results__by_base_and_novel(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("evaluate_results").main([]) == 0
    # IoU .5 passes the first of COCO's ten thresholds, so the zebra's AP is a tenth.
    assert "AP on novel categories: 0.100" in capsys.readouterr().out


NUMBER = re.escape("could not convert string to float: 'a'")
PHOTO = "ovd/demo/examples/photos/horses.jpg"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("find_words", ["gone.jpg", "dog"], "^gone.jpg: does not exist"),
        ("find_words", ["ovd", "dog"], "^ovd: is a folder, not a picture"),
        ("classes_on_folder", ["gone/", "dog"], "^gone: no such file or folder"),
        ("classes_on_folder", ["configs", "dog"], "^configs contains no picture"),
        ("search_by_crop", ["gone/"], "^gone: no such file or folder"),
        ("search_by_crop", ["examples/photos", "1"], "no such file or folder"),
        ("search_by_crop", [str(Path(PHOTO).parent), PHOTO, "1", "2", "3"], "the four corners"),
        ("search_by_crop", [str(Path(PHOTO).parent), PHOTO, "1", "2", "3", "a"], f"x1 y1 x2 y2 must be .*{NUMBER}"),
        ("search_by_crop", [str(Path(PHOTO).parent), "gone.jpg", "1", "2", "30", "40"], "^gone.jpg: does not exist"),
        ("evaluate_results", ["gt.json"], "give annotations, results, and"),
        ("evaluate_results", ["gone.json", "r.json", "dog", "cat"], "^gone.json: no such file"),
    ],
)
def test_examples__wrong_arguments_are_one_line(
    script: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(UserError, match=said) as refused:
        load(script).main(arguments)
    assert "\n" not in str(refused.value)
