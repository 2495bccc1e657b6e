# SPDX-License-Identifier: Apache-2.0
"""`python -m ovd.evaluate` on files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovd.evaluate import main
from ovd.evaluation.coco import evaluate
from ovd.evaluation.options import EvaluationOptions
from pretrain.engine.errors import UserError, run_cli
from tests.evaluation.cases import random_case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    gt, results = random_case(1, masks=True)
    ids = [c["id"] for c in gt["categories"]]
    split = {"name": "mine", "base": ids[:4], "novel": [f"thing {i}" for i in ids[4:]]}
    paths = {}
    for name, content in (("gt", gt), ("results", results), ("split", split)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return {"dir": tmp_path, "gt_content": gt, "results_content": results, **paths}


def arguments(files: dict[str, Any], **other: str) -> list[str]:
    given = {"annotations": files["gt"], "predictions": files["results"], "split": files["split"]} | other
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)]


def test_outputs__equal_the_library(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = files["dir"] / "new" / "out"
    argv = arguments(files, out=str(out))
    assert main(argv) == 0
    written = json.loads((out / "metrics.json").read_text())
    metrics = evaluate(files["gt_content"], files["results_content"])
    assert written["schema_version"] == 1
    assert written["metrics"]["bbox/AP50"] == metrics.values["bbox/AP50"]
    for key in ("bbox/AP", "bbox/AP50", "bbox/AP50_base", "bbox/AP50_novel", "bbox/AR100_novel", "bbox/AR100_novel@50"):
        assert written["metrics"][key] is not None
        assert written["metrics"][key.replace("bbox", "segm")] is not None
    assert written["command"] == ["python", "-m", "ovd.evaluate", *argv]
    assert written["split"]["name"] == "mine"
    assert len(written["split"]["hash"]) == 12
    assert len(written["dataset_sha256"]) == 64
    rows = list(csv.DictReader((out / "per_class.csv").open()))
    assert len(rows) == len(files["gt_content"]["categories"])
    assert {r["split"] for r in rows} == {"base", "novel"}
    novel = [float(r["AP50"]) for r in rows if r["split"] == "novel" and r["AP50"]]
    assert written["metrics"]["bbox/AP50_novel"] == pytest.approx(sum(novel) / len(novel), abs=1e-5)
    screen = capsys.readouterr().out
    assert f"{100 * written['metrics']['bbox/AP50_novel']:.1f}" in screen
    assert "masks" in screen


def test_outputs__nan_is_null_or_n_a(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    files["gt"].write_text(json.dumps(files["gt_content"] | {"annotations": []}))
    assert main(arguments(files, out=str(files["dir"] / "out"))) == 0
    written = json.loads((files["dir"] / "out" / "metrics.json").read_text())
    assert written["metrics"]["bbox/AP50_novel"] is None
    captured = capsys.readouterr()
    assert "n/a" in captured.out
    assert "warning: no objects" in captured.err


def test_results__may_be_empty(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    files["results"].write_text("[]")
    assert main(arguments(files)) == 0
    assert "warning: no detections" in capsys.readouterr().err


def test_compare__prints_and_stores_the_interval(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    other = files["dir"] / "other.json"
    other.write_text(json.dumps(files["results_content"][::3]))
    assert main(arguments(files, compare=str(other), out=str(files["dir"] / "out"))) == 0
    kept = json.loads((files["dir"] / "out" / "metrics.json").read_text())
    compared = kept["run"]["compare"]
    assert compared["all"]["b"] == pytest.approx(kept["metrics"]["bbox/AP50"])
    assert compared["all"]["low"] <= compared["all"]["difference"] <= compared["all"]["high"]
    assert f"{100 * compared['all']['a']:.1f} -> {100 * compared['all']['b']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "which, text, message",
    [
        ("gt", "{", r"gt\.json: not JSON: .* at line 1, column 2"),
        ("results", '[{"image_id": 1,]', r"results\.json: not JSON: .* at line 1"),
        ("results", '{"a": 1}', r"results\.json: expected a list"),
        ("results", '[{"image_id": 1}]', r"results\.json\[0\]: image_id 1 is not in the ground truth"),
        ("gt", "[]", r"gt\.json: expected an object"),
        ("split", '{"base": [12345], "novel": []}', r"split\.json: base: unknown category id 12345"),
    ],
)
def test_damaged_file__exits_with_2_and_one_line(
    files: dict[str, Any], which: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files[which].write_text(text)
    with pytest.raises(SystemExit) as stop:
        run_cli(main, arguments(files))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        main(arguments(files))


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--help"),
        (["--annotations", "x.json"], "--predictions"),
        (["--predictions", "x.json"], "--annotations"),
        (["--annotations", "nowhere.json", "--predictions", "x.json"], "nowhere.json: no such file"),
        (["--annotations", ".", "--predictions", "x.json"], "no labels that are known"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--max-dets", "0"], "must be at least 1"),
    ],
)
def test_arguments__mistakes_are_explained(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(argv)


def test_out__unwritable_folder_is_an_error(files: dict[str, Any]) -> None:
    (files["dir"] / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        main(arguments(files, out=str(files["dir"] / "file" / "out")))


def test_module__runs_from_any_folder(files: dict[str, Any]) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ovd.evaluate"]
    done = subprocess.run([*command, *arguments(files)], cwd=files["dir"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AP50" in done.stdout
    failed = subprocess.run(
        [*command, "--annotations", "no.json"], cwd=files["dir"], env=env, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


def test_second_look__is_an_alias_of_crop_refinement() -> None:
    argv = ["--weights", "vild-sticker", "--data", "stickers-val:1"]
    assert EvaluationOptions.parse([*argv, "--second-look", "3"]) == EvaluationOptions.parse(
        [*argv, "--crop-refinement", "3"]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--embeddings", "crops", "--second-look", "5"], "remove --crop-refinement"),
        (["--embeddings", "crops", "--examples", "1"], "a vocabulary file or --embeddings crops"),
        (["--vocabulary", "words.txt", "--examples", "1"], "cannot be combined with a vocabulary file"),
        (["--annotations", "gt.json"], "cannot be combined with --annotations"),
        (["--predictions", "results.json"], "not both"),
        (["--limit", "0"], "must be at least 1"),
    ],
)
def test_flags__conflicts_are_refused_before_reading(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationOptions.parse(["--weights", "vild-sticker", "--data", "stickers-val:1", *flags])
