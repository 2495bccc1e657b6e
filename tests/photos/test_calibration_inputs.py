# SPDX-License-Identifier: Apache-2.0
"""Labels that nothing can be fitted to are refused, and the detector stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ovd import calibrate
from ovd.evaluation.reliability import Reliability, report_fit
from pretrain.engine.errors import UserError
from pretrain.engine.files import require_writable_file


def write_labels(folder: Path, words: list[str | None]) -> Path:
    """A COCO file of one box, or none, in each of so many photos of noise."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    names = sorted({word for word in words if word is not None}) or ["dog"]
    coco: dict[str, Any] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": n + 1, "name": name} for n, name in enumerate(names)]
    for n, word in enumerate(words):
        cv2.imwrite(str(folder / f"images/{n}.png"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coco["images"].append({"id": n, "file_name": f"{n}.png", "width": 64, "height": 48})
        if word is not None:
            box = {"bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}  # where nothing is found
            coco["annotations"].append({"id": n, "image_id": n, "category_id": names.index(word) + 1, **box})
    (folder / "labels.json").write_text(json.dumps(coco))
    return folder / "labels.json"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "labels.json: no photo to train on"),
        ([None] * 41, "labels.json: 0 photos with boxes; at least 40 are needed, half to fit on"),
        (["dog"], "labels.json: 1 photo with boxes; at least 40"),
        (["dog", "cat"] * 19, "labels.json: 38 photos with boxes; at least 40"),
        (["dog"] * 40, "no photo lacks a word of the labels.*two unrelated classes"),
        (["dog", "cat"] * 20, "fewer than 3 are right.*finetune.yaml"),
    ],
)
def test_calibrate__labels_too_few_to_fit_are_refused(
    trained: Path, tmp_path: Path, words: list[str | None], problem: str
) -> None:
    weights = Path(shutil.copytree(trained / "run/exported", tmp_path / "weights"))
    before = {file: file.read_bytes() for file in weights.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=problem) as refusal:
        calibrate.main(["--weights", str(weights), "--data", str(write_labels(tmp_path, words))])
    assert "\n" not in str(refusal.value)
    assert {file: file.read_bytes() for file in weights.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("flag", ["--report", "--plot"])
def test_calibrate__output_files_are_tried_before_computing(trained: Path, tmp_path: Path, flag: str) -> None:
    given = ["--weights", str(trained / "run/exported"), "--data", str(write_labels(tmp_path, []))]
    with pytest.raises(UserError, match=f"{flag} {tmp_path}: is a folder; name a file in it"):
        calibrate.main([*given, flag, str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        calibrate.main([*given, flag, str(tmp_path / "file/report.json")])


def test_require_writable_file__leaves_the_file_unchanged(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    require_writable_file(tmp_path / "old.json", flag="--out")
    require_writable_file(tmp_path / "new/one.json", flag="--out")
    assert (tmp_path / "old.json").read_text() == "old" and list((tmp_path / "new").iterdir()) == []


def test_report__nan_is_null(tmp_path: Path) -> None:
    edges, nothing = np.linspace(0, 1, 3), np.full(2, np.nan)
    curve = Reliability(edges=edges, count=np.zeros(2), confidence=nothing, accuracy=nothing)
    content = {"other_half": {"ece": float("nan"), "photos": 3.0}, "own": [{"slope": float("nan")}]}
    report_fit(content, curve, title="", caption="", plot=None, file=tmp_path / "report.json")
    expected = {"other_half": {"ece": None, "photos": 3.0}, "own": [{"slope": None}]}
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail) == expected
