# SPDX-License-Identifier: Apache-2.0
"""Graphs without their weights, filled: what torch would have written, and nothing else passes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zipfile
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ovd.export import export
from ovd.runtime.assemble import (
    FORMS,
    RANGES,
    Tensor,
    assemble,
    bundled_export,
    cut_tensors,
    fill_holes,
    graphs_of,
    int8_channels,
    patches_of,
    write_archive,
)
from ovd.runtime.files import read_runtime_card, write_runtime_card
from ovd.runtime.quantise import write_quantised
from ovd.weights import detector_folder
from pretrain.engine.errors import UserError
from pretrain.engine.files import sha256_of


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)


@pytest.mark.usefixtures("no_torch")
def test_assemble__the_shipped_archive_gives_what_torch_writes(exported: Path, tmp_path: Path) -> None:
    """Where this fails after a change of the weights or of the export: ``python scripts/build_graphs.py``."""
    made = export("default", tmp_path / "vild-photo")
    assert contents(made) == contents(exported)
    assert graphs_of(detector_folder("default")).stat().st_size < 750_000


@pytest.mark.usefixtures("no_torch")
def test_assemble__in_8_bits_gives_what_is_written_from_its_ranges(exported: Path, tmp_path: Path) -> None:
    """Where this fails after a change of `ovd.runtime.quantise`, likewise."""
    made = export("default", tmp_path / "vild-photo", int8=True)
    with zipfile.ZipFile(graphs_of(detector_folder("default"))) as packed:
        ranges = json.loads(packed.read(RANGES))
    other = shutil.copytree(exported, tmp_path / "other")
    write_quantised(other, ranges)
    card = read_runtime_card(made)
    assert card.precision == "int8" and "64 scenes of the validation part" in card.ranges
    write_runtime_card(other, replace(read_runtime_card(exported), precision="int8", ranges=card.ranges))
    assert contents(made) == contents(other)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


def test_graphs__removed_tensors_are_restored() -> None:
    data = b"head" + b"A" * 9 + b"middle" + b"B" * 5 + b"AB"
    patches = patches_of(b"BBBBB", b"BxxBy")
    assert patches == [(1, b"BB".hex()), (4, b"B".hex())]
    pieces = {
        b"A" * 9: Tensor("f", "a", "half"),
        b"B" * 5: Tensor("f", "b", "int8", patches),
        b"not there": Tensor("f", "c", "half"),
    }
    stripped, holes = cut_tensors(data, pieces)
    assert stripped == b"headmiddleAB" and [hole[0] for hole in holes] == [4, 19]
    stored = {"a": b"A" * 9, "b": b"BxxBy"}
    assert fill_holes(stripped, json.loads(json.dumps(holes)), lambda file, name, form: stored[name]) == data


def test_int8_weights__are_rounded_per_channel() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
    values[1] = 0
    rounded = int8_channels(values)
    for channel, stored in zip(rounded, values, strict=True):
        step = float(np.abs(stored).max()) / 127
        assert np.abs(channel * step - stored).max() <= step / 2 + 1e-6
    assert rounded.dtype == np.int8 and [int(np.abs(one).max()) for one in rounded] == [127, 0, 127]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A weights folder with an archive of an export that has each form of a tensor in it."""
    folder, made = tmp_path / "weights/small", tmp_path / "made"
    for place in (folder, made):
        place.mkdir(parents=True)
    values = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float16)
    save_file({"w": values}, folder / "model.safetensors")
    (folder / "model.json").write_text("{}")
    pieces = {bytes_of(values): Tensor("small/model.safetensors", "w", form) for form, bytes_of in FORMS.items()}
    (made / "graph.onnx").write_bytes(b"<" + b"|".join(pieces) + b">")
    for name, card in (("runtime.json", {"format": "x"}), ("int8.json", {"format": "x", "ranges": "of these"})):
        (made / name).write_text(json.dumps(card))
    files = {name: (made / name).read_bytes() for name in ("graph.onnx", "runtime.json")}
    files["int8/runtime.json"] = (made / "int8.json").read_bytes()
    write_archive(files, graphs_of(folder), {"graph.onnx": pieces}, folder.parent)
    return folder


def test_packed_tensors__every_form_round_trips(small: Path, tmp_path: Path) -> None:
    assemble(small, tmp_path / "out")
    for name, source in (("graph.onnx", "made"), ("runtime.json", "made"), ("model.json", "weights/small")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / source / name).read_bytes()
    assert graphs_of(small).stat().st_size < 2000


def test_assemble__other_weights_and_damaged_archives_are_refused_and_leave_nothing(
    small: Path, tmp_path: Path
) -> None:
    archive, out = graphs_of(small), tmp_path / "out"
    whole = archive.read_bytes()
    save_file({"w": np.zeros((7, 5), np.float16)}, small / "model.safetensors")
    with pytest.raises(UserError, match=r"is not what small-graphs\.zip was made of; scripts/build_graphs\.py"):
        assemble(small, out)
    write_archive({"runtime.json": b"{}"}, archive, {}, small.parent)
    with pytest.raises(UserError, match="has no graphs in 8 bits"):
        assemble(small, out, int8=True)
    archive.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"small-graphs\.zip: cannot be read"):
        assemble(small, out)
    archive.unlink()
    with pytest.raises(UserError, match=r'install torch to write one: pip install "wordbox'):
        assemble(small, out)
    assert not out.exists()
    shutil.rmtree(small.parent)


def test_assemble__a_requested_export_is_written_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundled_export(small, int8=False)
    assert made == small / "onnx" and json.loads((made / "runtime.json").read_text()) == {"format": "x"}
    monkeypatch.setattr("ovd.runtime.assemble.assemble", pytest.fail)
    assert bundled_export(small, int8=False) == made
    monkeypatch.undo()
    (made / "graph.onnx").write_bytes(b"of an earlier version")
    bundled_export(small, int8=False)
    assert (made / "graph.onnx").read_bytes() == (tmp_path / "made/graph.onnx").read_bytes()
    graphs_of(small).unlink()
    assert bundled_export(small, int8=False) is None


def test_assemble__read_only_weights_use_the_cache_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORDBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != small)
    made = bundled_export(small, int8=False)
    assert made == tmp_path / "home/exports/small/onnx" and made.is_dir()
    assert not (small / "onnx").exists()


def test_assemble__nowhere_to_write_names_the_variable(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORDBOX_HOME", str(tmp_path / "file/home"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != small)
    with pytest.raises(UserError, match="set WORDBOX_HOME"):
        bundled_export(small, int8=False)


def test_assemble__custom_int8_export_is_kept(tmp_path: Path, exported: Path) -> None:
    folder = tmp_path / "weights/vild-photo"
    shutil.copytree(detector_folder("default"), folder, ignore=shutil.ignore_patterns("onnx*"))
    shutil.copytree(detector_folder("default").parent / "clip-photo", tmp_path / "weights/clip-photo")
    shutil.copy(graphs_of(detector_folder("default")), graphs_of(folder))
    mine = shutil.copytree(exported, folder / "onnx-int8")
    card = replace(read_runtime_card(exported), precision="int8", ranges="64 photos of photos")
    write_runtime_card(mine, card)
    assert bundled_export(folder, int8=True) == mine and read_runtime_card(mine) == card
    write_runtime_card(mine, replace(card, ranges=shipped_ranges()))  # the archive's, but of another version
    assert bundled_export(folder, int8=True) == mine
    assert (mine / "tower.onnx").stat().st_size < 0.75 * (exported / "tower.onnx").stat().st_size


def shipped_ranges() -> str:
    with zipfile.ZipFile(graphs_of(detector_folder("default"))) as packed:
        return str(json.loads(packed.read("int8/runtime.json"))["ranges"])
