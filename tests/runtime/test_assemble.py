# SPDX-License-Identifier: Apache-2.0
"""Graphs without their weights, filled: what torch would have written, and nothing else passes."""

from __future__ import annotations

import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ovd.export import export
from ovd.runtime.assemble import FORMS, assemble, bfloat16_rounded, cut, filled, graphs_of, write_archive
from ovd.weights import detector_folder
from pretrain.engine.errors import UserError


def test_the_shipped_archive_gives_what_torch_writes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails after a change of the weights or of the export: ``python scripts/build_graphs.py``."""
    find = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    made = export("default", tmp_path / "vild-photo")
    assert {file.name for file in made.iterdir()} == {file.name for file in exported.iterdir()}
    differing = [file.name for file in made.iterdir() if file.read_bytes() != (exported / file.name).read_bytes()]
    assert differing == []
    assert graphs_of(detector_folder("default")).stat().st_size < 500_000


def test_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float16)
    values[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 0  # halfway between two: to the even one
    np.testing.assert_array_equal(bfloat16_rounded(values), torch.from_numpy(values).bfloat16().float().numpy())


def test_what_is_cut_is_filled_again() -> None:
    data = b"head" + b"A" * 9 + b"middle" + b"B" * 5 + b"AB"
    pieces = {b"A" * 9: ("f", "a", "half"), b"B" * 5: ("f", "b", "half"), b"not there": ("f", "c", "half")}
    rest, holes = cut(data, pieces)
    assert rest == b"headmiddleAB" and [hole[0] for hole in holes] == [4, 19]
    by_name = {tensor: piece for piece, tensor in pieces.items()}
    assert filled(rest, holes, lambda *tensor: by_name[tensor]) == data


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A weights folder with an archive of an export that has each form of a tensor in it."""
    folder, made = tmp_path / "weights/small", tmp_path / "made"
    for place in (folder, made):
        place.mkdir(parents=True)
    values = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float16)
    save_file({"w": values}, folder / "model.safetensors")
    (folder / "model.json").write_text("{}")
    pieces = {bytes_of(values): ("small/model.safetensors", "w", form) for form, bytes_of in FORMS.items()}
    (made / "graph.onnx").write_bytes(b"<" + b"|".join(pieces) + b">")
    (made / "runtime.json").write_text('{"format": "x"}')
    write_archive(made, graphs_of(folder), {"graph.onnx": pieces}, folder.parent)
    return folder


def test_every_form_of_a_tensor_comes_back(small: Path, tmp_path: Path) -> None:
    assemble(small, tmp_path / "out")
    for name, source in (("graph.onnx", "made"), ("runtime.json", "made"), ("model.json", "weights/small")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / source / name).read_bytes()
    assert graphs_of(small).stat().st_size < 2000


def test_other_weights_and_damaged_archives_are_refused_and_leave_nothing(small: Path, tmp_path: Path) -> None:
    archive, out = graphs_of(small), tmp_path / "out"
    whole = archive.read_bytes()
    save_file({"w": np.zeros((7, 5), np.float16)}, small / "model.safetensors")
    with pytest.raises(UserError, match=r"is not what small-graphs\.zip was made of; scripts/build_graphs\.py"):
        assemble(small, out)
    archive.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"small-graphs\.zip: cannot be read"):
        assemble(small, out)
    archive.unlink()
    with pytest.raises(UserError, match=r'to write one, install it: pip install "wordbox'):
        assemble(small, out)
    assert not out.exists()
    shutil.rmtree(small.parent)
