# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime gives torch's answers, needs no torch, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file

from ovd import cli
from ovd.detections import Detections
from ovd.detector import Detector
from ovd.inference.arrays import unit_rows
from ovd.modeling.export import read_card
from ovd.runtime import choice
from ovd.runtime.choice import Runtime
from ovd.runtime.files import (
    CARD,
    CONSE,
    EXPORT_FOLDER,
    PROPOSALS,
    REGIONS,
    SOURCES,
    TEXT,
    TOWER,
    find_export,
    graphs_of,
)
from ovd.runtime.halve import HALF_FROM
from ovd.runtime.session import open_session
from ovd.weights import detector_folder, read_model_card
from pretrain.engine.errors import UserError
from tests.detector.test_locks import sent
from tests.runtime.conftest import PHOTOS

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "person, dog, animal, chair, mug: cup, coffee cup, guitar, car, wine bottle, red lamp, gizmo, bird, table, plant, "
    "wheel, window, plate, drum, food, furniture, face, -horse"
)


def partners(asked: Detections, answered: Detections) -> Sequence[bool]:
    """Of each detection, whether the other list has it: box within half a pixel, score within .005."""
    found = []
    for box, score, name in zip(asked.xyxy, asked.confidence, asked.class_name, strict=True):
        same = np.array([other == name for other in answered.class_name], dtype=bool)
        near = np.abs(answered.xyxy - box).max(axis=1) <= 0.5
        found.append(bool((same & near & (np.abs(answered.confidence - score) <= 0.005)).any()))
    return found


def test_runtimes__give_the_same_detections(by_torch: Detector, by_onnx: Detector) -> None:
    found: list[bool] = []
    for photo in PHOTOS:
        one, other = (detector.find(photo, WORDS, threshold=0.02) for detector in (by_torch, by_onnx))
        assert one.notices == other.notices and one.names == other.names
        np.testing.assert_allclose(other.best, one.best, atol=0.005)
        found += [*partners(one, other), *partners(other, one)]
    assert len(found) > 60 and np.mean(found) >= 0.99


def test_runtimes__crops_thresholds_and_regions_are_the_same(by_torch: Detector, by_onnx: Detector) -> None:
    scene = np.asarray(Image.open(PHOTOS[0]).convert("RGB"))
    examples = {"bird": [(20, 40, 220, 300)], "-wall": [(0, 0, 90, 60)]}
    answers = [detector.find(scene, "grass", examples=examples) for detector in (by_torch, by_onnx)]
    assert answers[0].threshold == answers[1].threshold and len(answers[0]) == len(answers[1]) > 0
    np.testing.assert_allclose(answers[1].confidence, answers[0].confidence, atol=1e-3)
    one, other = (detector.embed(scene).regions for detector in (by_torch, by_onnx))
    np.testing.assert_allclose(other.boxes, one.boxes, atol=0.05)
    assert one.image is not None and other.image is not None
    assert float((one.image * other.image).sum(axis=1).min()) > 0.9999


@pytest.mark.parametrize("size", [(9, 400), (33, 20), (700, 64)])
def test_runtimes__take_pictures_of_any_shape(by_torch: Detector, by_onnx: Detector, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    one, other = (detector.embed(picture).regions for detector in (by_torch, by_onnx))
    assert len(one) == len(other)
    np.testing.assert_allclose(np.sort(other.objectness), np.sort(one.objectness), atol=1e-3)


def test_onnx__detector_and_regions_can_be_sent_to_another_process(exported: Path) -> None:
    detector = Detector.load(exported, runtime="onnx")
    expected = detector.find(PHOTOS[0], "espresso, cup")
    for other in (
        sent(detector).find(PHOTOS[0], "espresso, cup"),
        sent(detector.embed(PHOTOS[0])).classify("espresso, cup"),
    ):
        assert other.class_name == expected.class_name
        np.testing.assert_array_equal(other.confidence, expected.confidence)


def test_export__has_the_same_weights(exported: Path, by_onnx: Detector) -> None:
    assert read_model_card(exported)["sha256"] == read_model_card(detector_folder("default"))["sha256"]
    assert by_onnx.card["settings"] == read_model_card(detector_folder("default"))["settings"]


@pytest.mark.parametrize("file", [PROPOSALS, TOWER, REGIONS, CONSE, TEXT])
def test_export__graphs_hold_the_stored_weights_exactly(exported: Path, file: str) -> None:
    folder = detector_folder("default")
    stored = set()
    tensors = [folder / name for name in SOURCES if name.endswith(".safetensors")]
    for name in (*tensors, folder.parent / "clip-photo/model.safetensors"):
        stored |= {values.tobytes() for values in load_file(name).values()}
        stored |= {values.T.tobytes() for values in load_file(name).values()}
    graph = onnx.load(str(exported / file)).graph
    # Single precision: numbers that the exporter made, such as shapes and folded means, are small.
    large = [numpy_helper.to_array(one) for one in graph.initializer if np.prod(one.dims) >= HALF_FROM]
    assert len(large) >= 4
    assert [values.shape for values in large if values.tobytes() not in stored] == []


def test_export__crops_are_embedded_as_by_torch(by_torch: Detector, by_onnx: Detector) -> None:
    side = by_onnx.text.encoder.image_size
    crops = np.random.default_rng(0).integers(0, 256, (3, 3, side, side), dtype=np.uint8)
    one, other = (unit_rows(detector.text.encoder.crop_rows(crops)) for detector in (by_torch, by_onnx))
    np.testing.assert_allclose(other, one, atol=1e-4)


WITHOUT = """
import sys
for name in ("torch", "torchvision", "detectron2", "open_clip", "timm", "scipy", "onnx"):
    sys.modules[name] = None  # as if it were not installed
from ovd.cli import run
run()
"""


def without_torch(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command in a process where nothing of torch can be imported."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", WITHOUT, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_session__threads_do_not_spin_after_a_run(exported: Path) -> None:
    """Else the threads of one network take the processor from the next one."""
    options = open_session(exported / "text.onnx").get_session_options()  # type: ignore[attr-defined]
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_onnxruntime__stores_no_identifier_of_the_machine(exported: Path, tmp_path: Path) -> None:
    """Its telemetry would write one, and a database of events, when the library is loaded."""
    code = "import sys, pathlib, ovd.runtime.session as s; s.open_session(pathlib.Path(sys.argv[1]))"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_")) and name != "CI"}
    env |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(exported / "text.onnx")], env=env, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_torch__predict_runs(exported: Path, by_onnx: Detector, tmp_path: Path) -> None:
    words, out = "chicken, mug: cup, -person", tmp_path / "out"
    done = without_torch(
        "predict", str(PHOTOS[0]), "--classes", words, "--weights", str(exported), "--out", str(out), "--format", "yolo"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())
    found = by_onnx.find(PHOTOS[0], words)
    assert [row["score"] for row in rows] == pytest.approx(found.confidence.tolist(), abs=1e-4)
    assert (out / "drawn").is_dir() and len(rows) == len(found) > 0


def test_without_torch__a_folder_is_labelled(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    done = without_torch(
        "label", str(PHOTOS[0].parent), "--classes", "chicken, dog", "--weights", str(exported), "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert (out / "data.yaml").is_file()


def test_without_torch__the_page_is_built(exported: Path) -> None:
    code = (
        "from ovd import Detector\nfrom ovd.demo.answer import Answerer\nfrom ovd.demo.page import build_page\n"
        f"answerer = Answerer(detector=Detector.load({str(exported)!r}))\nbuild_page(answerer)\n"
        f"print(len(answerer.answer({str(PHOTOS[0])!r}, 'chicken')['detections']))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    source = WITHOUT.replace("from ovd.cli import run\nrun()\n", code)
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) > 0, done.stderr


def test_without_torch__a_command_that_needs_it_names_the_line_that_installs_it() -> None:
    done = without_torch("evaluate", "--weights", "vild-sticker", "--data", "stickers")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and 'pip install "wordbox[train]"' in done.stderr


@pytest.mark.parametrize(
    ("weights", "runtime", "device", "said"),
    [
        ("vild-sticker", "onnx", "auto", r"model.arch mask_rcnn\) cannot be exported to ONNX.*wordbox\[train\]"),
        ("default", "onnx", "cuda", "runs on a CPU, not on cuda"),
        ("default", "onnx-int8", "cuda", "runtime onnx-int8 runs on a CPU, not on cuda"),
        ("vild-sticker", "onnx-int8", "auto", r"model.arch mask_rcnn\) cannot be exported to ONNX"),
        ("default", "fast", "auto", "runtime 'fast' is unknown: auto, onnx, onnx-int8 or torch"),
    ],
)
def test_runtime__unsupported_options_are_one_line(weights: str, runtime: Runtime, device: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Detector.load(weights, runtime=runtime, device=device)
    assert "\n" not in str(caught.value)


def test_without_torch__weights_without_an_export_name_the_command_that_writes_one(tmp_path: Path) -> None:
    folder = shutil.copytree(
        detector_folder("default"), tmp_path / "mine", ignore=shutil.ignore_patterns(EXPORT_FOLDER)
    )
    with pytest.raises(UserError, match="no export for ONNX Runtime; write one: wordbox export"):
        Detector.load(folder, runtime="onnx")


@pytest.mark.parametrize(
    ("weights", "runtime", "device", "said"),
    [
        ("vild-sticker", "auto", "auto", r'vild-sticker has no export.*pip install "wordbox\[train\]"'),
        ("default", "torch", "auto", r'^runtime torch needs torch, .*pip install "wordbox\[train\]"'),
        ("default", "auto", "cuda", r'^device cuda needs torch, .*pip install "wordbox\[train\]"'),
    ],
)
def test_without_torch__the_next_step_is_named(
    weights: str, runtime: Runtime, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(choice, "find_export", lambda folder: None)
    with pytest.raises(UserError, match=said):
        Detector.load(weights, runtime=runtime, device=device)


def test_auto__without_torch_assembles_the_shipped_export(by_onnx: Detector, tmp_path: Path) -> None:
    """Nobody has written an export, and nobody needs to: the person gets boxes."""
    default = detector_folder("default")
    folder = shutil.copytree(default, tmp_path / "weights/vild-photo", ignore=shutil.ignore_patterns("onnx*"))
    shutil.copytree(default.parent / "clip-photo", folder.parent / "clip-photo")
    shutil.copy(graphs_of(default), graphs_of(folder))
    out = tmp_path / "out"
    done = without_torch("predict", str(PHOTOS[0]), "--classes", "chicken", "--weights", str(folder), "--out", str(out))
    assert done.returncode == 0, done.stderr
    scores = [row["score"] for row in json.loads((out / "results.json").read_text())]
    assert scores == pytest.approx(by_onnx.find(PHOTOS[0], "chicken").confidence.tolist(), abs=1e-4) and scores


def test_without_torch__auto_names_the_command_for_weights_that_need_an_export(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(detector_folder("default"), tmp_path / "mine", ignore=shutil.ignore_patterns("onnx*"))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mine: torch is not installed.*wordbox export --format onnx --weights .*mine"):
        Detector.load(folder)
    assert not (folder / EXPORT_FOLDER).exists()
    card = shutil.copytree(exported, folder / EXPORT_FOLDER) / CARD
    assert len(Detector.load(folder).find(PHOTOS[0], "chicken")) > 0
    card.write_text(json.dumps(json.loads(card.read_text()) | {"sources": {}}))
    with pytest.raises(UserError, match="exported from other weights than those beside it"):
        Detector.load(folder)


def beside(folder: Path, exported: Path) -> Path:
    """A detector's folder with the export in it."""
    shutil.copytree(detector_folder("default"), folder, ignore=shutil.ignore_patterns(EXPORT_FOLDER))
    shutil.copytree(exported, folder / EXPORT_FOLDER)
    return folder


def test_export__beside_its_weights_uses_their_calibration(exported: Path, tmp_path: Path) -> None:
    folder = beside(tmp_path / "mine", exported)
    assert find_export(folder) == folder / EXPORT_FOLDER
    card = json.loads((folder / "model.json").read_text())
    card["calibration"] |= {"threshold": 0.61, "prompt_free_threshold": 0.72}
    (folder / "model.json").write_text(json.dumps(card))
    runtimes: tuple[Runtime, ...] = ("onnx", "torch")
    for runtime in runtimes:
        detector = Detector.load(folder, runtime=runtime, device="cpu")
        assert detector.threshold == 0.61
        assert detector.threshold_for(detector.query("everything")) == 0.72


def test_export__of_other_weights_is_not_run(exported: Path, tmp_path: Path) -> None:
    folder = beside(tmp_path / "mine", exported)
    record = json.loads((folder / EXPORT_FOLDER / CARD).read_text())
    record["sources"][SOURCES[0]] = "0" * 64
    (folder / EXPORT_FOLDER / CARD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="exported from other weights than those beside it"):
        Detector.load(folder, runtime="onnx")


@pytest.mark.parametrize(("part", "value"), [("quality", False), ("conse_side", 0)])
def test_export__lacks_what_the_calibration_is_for(exported: Path, tmp_path: Path, part: str, value: object) -> None:
    """An export of an earlier version, whose model.json was replaced."""
    folder = shutil.copytree(exported, tmp_path / "earlier")
    record = json.loads((folder / CARD).read_text()) | {part: value}
    (folder / CARD).write_text(json.dumps(record))
    key = f"open_{part.removesuffix('_side')}"
    with pytest.raises(
        UserError, match=rf"lacks what calibration\.{key} of its model\.json is for; export the weights"
    ):
        Detector.load(folder, runtime="onnx")


def test_export__a_damaged_graph_is_named(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "damaged")
    (folder / "tower.onnx").write_bytes(b"no graph")
    detector = Detector.load(folder, runtime="onnx")
    with pytest.raises(UserError, match=r"tower\.onnx: ONNX Runtime cannot load it"):
        detector.find(PHOTOS[0], "dog")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--weights", "vild-sticker"], "has no export to ONNX"),
        (["--output", "FULL"], "is not an export"),
    ],
)
def test_export__unsupported_weights_are_refused(argv: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=said):
        cli.main(["export", *(str(tmp_path) if part == "FULL" else part for part in argv)])
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("bfloat16", "gpu", "device", "taken"),
    [
        (False, None, "auto", True),
        (True, None, "auto", False),
        (False, "smi", "auto", False),
        (False, "smi", "cpu", True),
        (False, None, "cuda", False),
    ],
)
def test_auto__takes_the_faster_runtime(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool,
    gpu: str | None,
    device: str,
    taken: bool,
) -> None:
    folder = beside(tmp_path / "mine", exported)
    monkeypatch.setattr(choice, "computes_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(choice.shutil, "which", lambda name: gpu)
    card = read_card(folder)
    assert (choice.export_for(folder, card, runtime="auto", device=device) is not None) is taken
    assert choice.export_for(exported, card, runtime="auto", device="auto") == exported
