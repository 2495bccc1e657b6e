# SPDX-License-Identifier: Apache-2.0
"""An export in 8 bits is smaller, finds what the other one finds, and keeps its first and last convolutions."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from ovd import cli
from ovd.detector import Detector
from ovd.export import export
from ovd.modeling.proposals.architecture import ARCHITECTURES
from ovd.modeling.proposals.classes import ClassBranch
from ovd.pictures import to_rgb
from ovd.runtime import cpu
from ovd.runtime import export as writing
from ovd.runtime.files import CARD, INT8_FOLDER, PROPOSALS, TOWER, graphs_of, read_runtime_card
from ovd.runtime.quantise import MAX_PHOTOS, _ranges, is_suited, quantise, quantised, read_photos
from ovd.runtime.session import Graph, open_session
from ovd.weights import detector_folder
from pretrain.engine.errors import UserError
from scripts.build_wheel import add_int8
from tests.runtime.conftest import PHOTOS

WORDS = "person, dog, chicken, cup, guitar, drum, car, horse, wine bottle, sofa"


@pytest.fixture(scope="module")
def small(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the shipped default with its convolutions quantised on three photos."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("int8") / "vild-photo")
    quantise(folder, read_runtime_card(folder), (), [to_rgb(photo) for photo in PHOTOS[:3]])
    return folder


def overlap(one: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of a box with others."""
    sides = np.minimum(one[2:], boxes[:, 2:]) - np.maximum(one[:2], boxes[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    areas = [np.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (one, boxes)]
    return np.asarray(shared / (areas[0] + areas[1] - shared))


def test_int8__finds_what_float32_finds(small: Path, by_onnx: Detector) -> None:
    detector, found = Detector.load(small, runtime="onnx"), []
    for photo in PHOTOS[3:]:  # not those that it was quantised on
        one, other = (each.find(photo, WORDS, threshold=level) for each, level in ((by_onnx, 0.4), (detector, 0.2)))
        for box, score, name in zip(one.xyxy, one.confidence, one.class_name, strict=True):
            same = np.array([x == name for x in other.class_name], dtype=bool)
            near = np.abs(other.confidence - score) < 0.2
            found.append(bool((same & near & (overlap(box, other.xyxy) > 0.5)).any()))
    assert len(found) >= 10 and np.mean(found) >= 0.75


def test_int8__proposals_with_hard_swish_stay_in_single_precision(exported: Path, small: Path) -> None:
    assert (small / PROPOSALS).read_bytes() == (exported / PROPOSALS).read_bytes()


@pytest.fixture(scope="module")
def nanodet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random NanoDet's graph, as it is and in 8 bits."""
    exact, small = (tmp_path_factory.mktemp(name) for name in ("exact", "small"))
    branch = ClassBranch(ARCHITECTURES["nanodet"], classes=80)
    writing._write_cells(exact / PROPOSALS, writing._Cells(branch.trunk, branch.heads))
    assert is_suited(exact / PROPOSALS)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    onnx.save(quantised(exact / PROPOSALS, _ranges(exact / PROPOSALS, [pixels])), str(small / PROPOSALS))
    return exact, small


@pytest.mark.parametrize(("file", "kept"), [(PROPOSALS, 1 + 3), (TOWER, 1 + 1)])
def test_int8__first_and_last_convolutions_keep_their_precision(
    exported: Path, small: Path, nanodet: tuple[Path, Path], file: str, kept: int
) -> None:
    exported, small = nanodet if file == PROPOSALS else (exported, small)
    before, after = (onnx.load(str(folder / file)).graph for folder in (exported, small))
    weights = {name: node.op_type for node in after.node for name in node.output}
    convolutions = [node for node in after.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in before.node)
    single = [node for node in convolutions if weights.get(node.input[1]) != "DequantizeLinear"]
    assert len(single) == kept
    assert single[0] is convolutions[0]  # nodes stand in the order of their computation
    assert (small / file).stat().st_size < 0.75 * (exported / file).stat().st_size  # of half precision


@pytest.mark.parametrize("size", [(32, 448), (96, 448), (448, 320)])
def test_int8__maps_of_the_tower_keep_size_and_place(exported: Path, small: Path, size: tuple[int, int]) -> None:
    """Its padding depends on the picture's size; computed in 8 bits, maps lost a row and a column."""
    pixels = np.random.default_rng(0).normal(size=(1, 3, *size)).astype(np.float32)
    names = ["fine", "coarse", "last"]
    exact, rounded = (Graph(folder / TOWER)(names, pixels=pixels) for folder in (exported, small))
    assert [one.shape for one in exact] == [other.shape for other in rounded]
    for one, other in zip(exact, rounded, strict=True):
        assert (one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)) > 0.9


def test_calibration_photos__are_taken_evenly_from_a_folder(tmp_path: Path) -> None:
    for number in range(MAX_PHOTOS + 36):
        cv2.imwrite(str(tmp_path / f"{number:03}.bmp"), np.full((8, 8, 3), number, np.uint8))
    seen = [int(photo[0, 0, 0]) for photo in read_photos(tmp_path)]
    assert len(seen) == MAX_PHOTOS and seen[0] == 0 and seen[-1] > 95 and len(set(seen)) == MAX_PHOTOS


def test_calibration_photos__unreadable_ones_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its photos can be read .*a.png"):
        read_photos(tmp_path)
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((8, 8, 3), np.uint8))
    assert len(read_photos(tmp_path)) == 1
    assert "1 photos left out (first: " in capsys.readouterr().err


def test_calibration_photos__few_are_reported_and_without_torch_nothing_else_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "export_onnx", lambda *_, **__: None)
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((8, 8, 3), np.uint8))
    export("default", tmp_path / "out", int8=True, photos=tmp_path)
    assert "1 photo, where 20 or more show which values occur" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--calibrate-on needs torch.*pip install "wordbox\[train\]"'):
        export("default", tmp_path / "out", int8=True, photos=tmp_path)
    assert not (tmp_path / "out").exists()


def test_export_int8__takes_photos_and_writes_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    def write(
        source: Path, encoder: object, target: Path, *, photos: Sequence[NDArray[np.uint8]], photos_are: str
    ) -> None:
        options.update(target=target, photos=photos, photos_are=photos_are)
        raise UserError("far enough")

    monkeypatch.setattr(writing, "export_onnx", write)
    mine = ["--int8", "--calibrate-on", str(PHOTOS[0].parent)]
    for argv, folder, count in ((mine, INT8_FOLDER, len(PHOTOS)), ([], "onnx", 0)):
        with pytest.raises(UserError, match="far enough"):
            cli.main(["export", *argv])
        assert options["target"] == detector_folder("default") / folder
        assert len(options["photos"]) == count and f"{count} photos of" in options["photos_are"]


def test_export_int8__without_photos_takes_the_shipped_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "export_onnx", pytest.fail)
    assert cli.main(["export", "--int8", "--output", str(tmp_path / "small")]) == 0
    card = read_runtime_card(tmp_path / "small")
    assert card.precision == "int8" and "validation part" in card.ranges


def test_onnx_int8__runs_where_nothing_was_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights/vild-photo"
    shutil.copytree(detector_folder("default"), folder, ignore=shutil.ignore_patterns("onnx*"))
    shutil.copytree(detector_folder("default").parent / "clip-photo", folder.parent / "clip-photo")
    shutil.copy(graphs_of(detector_folder("default")), graphs_of(folder))
    for flags, said in (("avx512_vnni", 0), ("avx2", 1), (None, 0)):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        caplog.clear()
        detector = Detector.load(folder, runtime="onnx-int8")
        assert len([r for r in caplog.records if "VNNI" in r.message]) == said
    assert read_runtime_card(folder / INT8_FOLDER).precision == "int8"
    assert len(detector.find(PHOTOS[0], WORDS)) > 0


def test_int8__sums_stay_exact_where_they_could_saturate(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI, sums of two products end at 16 bits, if ONNX Runtime is not told otherwise."""
    answers = []
    for flags, is_set in (("avx512_vnni", False), ("avx2", True)):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        options = open_session(small / TOWER).get_session_options()  # type: ignore[attr-defined]
        with nullcontext() if is_set else pytest.raises(RuntimeError, match="does not have configuration"):
            assert options.get_session_config_entry("session.x64quantprecision") == "1"
        answers.append(Detector.load(small, runtime="onnx").embed(PHOTOS[0]).regions)
    np.testing.assert_array_equal(answers[0].boxes, answers[1].boxes)
    np.testing.assert_allclose(answers[0].image, answers[1].image, atol=1e-5)


def test_wheel__int8_stores_only_differences(exported: Path, tmp_path: Path) -> None:
    whole, folder = export("default", tmp_path / "small", int8=True), shutil.copytree(exported, tmp_path / "wheel")
    add_int8(folder, whole)
    assert {file.name for file in (folder / INT8_FOLDER).iterdir()} == {TOWER, CARD}
    one, other = (Detector.load(place, runtime="onnx-int8").find(PHOTOS[0], WORDS) for place in (whole, folder))
    assert len(one) > 0
    np.testing.assert_array_equal(one.xyxy, other.xyxy)
    single = Detector.load(folder).find(PHOTOS[0], WORDS)
    assert single.confidence.tolist() != one.confidence.tolist()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--calibrate-on", "HERE"], "--calibrate-on is for --int8"),
        (["--int8", "--calibrate-on", "HERE"], "contains no picture"),
        (["--int8", "--calibrate-on", "HERE/nowhere"], "is not a folder"),
        (["--int8", "--weights", "vild-sticker"], "has no export to ONNX"),
    ],
)
def test_export_int8__wrong_combinations_are_one_line(argv: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        cli.main(["export", "--output", str(tmp_path / "out"), *(x.replace("HERE", str(tmp_path)) for x in argv)])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
