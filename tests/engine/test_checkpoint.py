# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under kills, full disks and damage; weight files with every kind of tensor."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.engine import checkpoint
from pretrain.engine.checkpoint import (
    load_state,
    load_weights,
    newest,
    save,
    save_weights,
    step_folders,
    verify,
    write_atomically,
)
from pretrain.engine.errors import UserError


def put(root: Path, step: int, *, keep: int = 2, value: float | None = None, size: int = 40) -> checkpoint.Checkpoint:
    fill = float(step) if value is None else value
    model = {"weight": torch.full((size,), fill)}
    return save(root, step=step, model=model, state={"step": step}, meta={}, keep=keep)


def loaded_step(root: Path, warnings: list[str] | None = None) -> int | None:
    """The step of the newest usable checkpoint, having checked that its content is that step's."""
    found = newest(root, warn=([] if warnings is None else warnings).append)
    if found is None:
        return None
    model, state = load_state(found)
    assert torch.equal(model["weight"], torch.full_like(model["weight"], float(found.step)))
    assert state["step"] == found.step
    return found.step


# --- weight files


def test_weights__round_trip_types_values_and_metadata(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(2).bfloat16(),
        "long": torch.tensor([1, -2]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "also_empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 5).T,
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "trained": nn.Parameter(torch.randn(2, 2)),
    }
    save_weights(tmp_path / "deep" / "w.safetensors", tensors, {"name": "Größe", "x": ""})
    loaded, metadata = load_weights(tmp_path / "deep" / "w.safetensors")
    assert metadata == {"name": "Größe", "x": ""}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach()), name


def test_weights__tied_ones_are_stored_once(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    tensors = {"b": base, "a": base, "front": base[:500], "view": base.view(10, 100), "back": base[500:]}
    save_weights(tmp_path / "w.safetensors", tensors, {})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert metadata == {}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert loaded["front"].data_ptr() != loaded["a"].data_ptr()
    assert (tmp_path / "w.safetensors").stat().st_size < 4 * 3000 + 1000


def test_weights__same_values_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(3)
    save_weights(tmp_path / "1", {"a": a, "b": b}, {"k": "v"})
    save_weights(tmp_path / "2", {"b": b.clone(), "a": a.clone()}, {"k": "v"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 8 + b"{}", b"PK\x03\x04" + bytes(100)])
def test_load_weights__other_format_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors: not a readable safetensors file"):
        load_weights(tmp_path / "w.safetensors")


def test_load_weights__missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors: no such weight file"):
        load_weights(tmp_path / "none.safetensors")


def test_save_weights__failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail_with(OSError(28, "No space left on device")))
            with pytest.raises(UserError, match=r"cannot write .*f: No space left on device"):
                write_atomically(tmp_path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["f"]


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# --- checkpoints


def test_checkpoint__newest_is_found_and_old_ones_removed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert newest(root, warn=print) is None
    for step in (5, 10, 100, 1000):
        put(root, step, keep=2)
    assert [step for step, _ in step_folders(root)] == [100, 1000]
    assert loaded_step(root) == 1000
    assert (tmp_path / "last").resolve() == (root / "step_1000").resolve()
    assert os.readlink(tmp_path / "last") == os.path.join("checkpoints", "step_1000"), "the run folder can be moved"
    assert {path.name for path in root.iterdir()} == {"step_100", "step_1000"}


def test_checkpoint__non_tensor_values_round_trip(tmp_path: Path) -> None:
    model = {"w": torch.ones(2), "_extra_state": {"momentum": 0.5, "history": [1, 2]}}
    save(tmp_path, step=1, model=model, state={"a": (1, None, "x")}, meta={"config": {"k": 1}}, keep=1)
    back, state = load_state(verify(tmp_path / "step_1"))
    assert back["_extra_state"] == {"momentum": 0.5, "history": [1, 2]}
    assert state == {"a": (1, None, "x")}
    assert verify(tmp_path / "step_1").meta["config"] == {"k": 1}


def damage_cut(path: Path, sixteenth: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * sixteenth // 16)


def damage_flip(path: Path, sixteenth: int) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * sixteenth // 16] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", [damage_cut, damage_flip])
def test_checkpoint__damaged_newest_falls_back_with_a_warning(
    tmp_path: Path, name: str, damage: Callable[[Path, int], None]
) -> None:
    root = tmp_path / "checkpoints"
    put(root, 1)
    put(root, 2)
    good = (root / "step_2" / name).read_bytes()
    for sixteenth in range(16):
        damage(root / "step_2" / name, sixteenth)
        warnings: list[str] = []
        assert loaded_step(root, warnings) == 1
        assert len(warnings) == 1
        assert "step_2" in warnings[0]
        (root / "step_2" / name).write_bytes(good)
    assert loaded_step(root) == 2


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "state.pt"])
def test_checkpoint__every_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    path = tmp_path / "step_2" / name
    good = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 1000 if name == "meta.json" else 200):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        found = newest(tmp_path, warn=lambda _: None)
        assert found is not None and found.step == 1, f"bit {bit}"


def test_checkpoint__older_version_without_a_meta_sum_is_read(tmp_path: Path) -> None:
    meta = json.loads((put(tmp_path, 1).folder / "meta.json").read_text())
    del meta["sha256"]
    (tmp_path / "step_1" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json: is damaged"):
        verify(tmp_path / "step_1")
    (tmp_path / "step_1" / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    assert loaded_step(tmp_path) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
def test_checkpoint__missing_file_falls_back(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    (tmp_path / "step_2" / name).unlink()
    assert loaded_step(tmp_path) == 1


def test_checkpoint__all_damaged_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    for step in (1, 2):
        damage_flip(tmp_path / f"step_{step}" / "state.pt", 8)
    with pytest.raises(UserError, match="none of the 2 checkpoints can be used"):
        newest(tmp_path, warn=lambda _: None)


def test_checkpoint__newer_version_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    meta = tmp_path / "step_2" / "meta.json"
    content = {key: value for key, value in json.loads(meta.read_text()).items() if key != "sha256"}
    meta.write_bytes(checkpoint.with_sum(json.dumps(content | {"format": 3}, indent=1)))
    with pytest.raises(UserError, match="has format 3, this version of the program reads 2"):
        newest(tmp_path, warn=lambda _: None)


def test_checkpoint__state_that_could_run_code_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1)
    torch.save({"extra": {}, "x": np.random.default_rng(0)}, tmp_path / "step_1" / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt: cannot be read"):
        load_state(checkpoint.Checkpoint(tmp_path / "step_1", 1, {}))


def test_prune__damaged_later_one_never_displaces_a_good_one(tmp_path: Path) -> None:
    put(tmp_path, 10)
    put(tmp_path, 20)
    damage_flip(tmp_path / "step_20" / "model.safetensors", 8)
    put(tmp_path, 12, keep=1)  # the run went back to 10 and saved at 12
    assert [step for step, _ in step_folders(tmp_path)] == [12]
    put(tmp_path, 20, keep=1)
    damage_flip(tmp_path / "step_20" / "model.safetensors", 8)
    put(tmp_path, 20, keep=1)  # and a damaged one of the very step is replaced
    assert loaded_step(tmp_path) == 20


def test_save__existing_good_step_writes_nothing(tmp_path: Path) -> None:
    first = put(tmp_path, 3)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    assert put(tmp_path, 3).folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp


def test_save__free_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 4\.4 MiB, 1\.0 MiB are free"):
        put(tmp_path, 2, size=1 << 20)
    assert [path.name for path in tmp_path.iterdir() if path.name != "last"] == ["step_1"]
    assert loaded_step(tmp_path) == 1


class Killed(BaseException):
    """Like SIGKILL: no ``except OSError`` of the program may tidy up after it."""


def die_at(call: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """Let the ``call``-th system call that changes the disk fail, before or after taking effect by turns."""
    calls: list[str] = []

    def wrap(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                if isinstance(error, Killed) and name in ("replace", "fsync") and call % 2:
                    original(*args, **kwargs)
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "symlink_to")):
        wrap(module, name)
    return calls


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("keep", [1, 2])
def test_save__any_failing_call_leaves_a_good_checkpoint(tmp_path: Path, error: BaseException, keep: int) -> None:
    for call in range(1, 40):
        root = tmp_path / str(call) / "checkpoints"
        put(root, 1, keep=keep)
        put(root, 2, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            calls = die_at(call, patch, error)
            try:
                put(root, 3, keep=keep)
            except (Killed, UserError):
                pass
            finished = len(calls) < call
        found = loaded_step(root)
        assert found in (2, 3), f"call {call} ({calls[-1]})"
        put(root, 4, keep=keep)  # and the next save works, and removes what was left behind
        assert loaded_step(root) == 4
        assert len(list(root.iterdir())) == keep
        if finished:
            assert found == 3
            return
    raise AssertionError("the save made more calls than were tried")


def test_save__kill_while_replacing_a_damaged_one_loses_nothing(tmp_path: Path) -> None:
    for call in range(1, 20):
        root = tmp_path / str(call)
        put(root, 1)
        put(root, 2)
        damage_flip(root / "step_2" / "state.pt", 3)
        with pytest.MonkeyPatch.context() as patch:
            calls = die_at(call, patch, Killed())
            try:
                put(root, 2)
            except Killed:
                pass
        assert loaded_step(root) in (1, 2)
        if len(calls) < call:
            return


@pytest.mark.parametrize("limit", [60_000, 401_000])  # inside the model file; inside the state file
def test_save__full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, limit: int) -> None:
    put(tmp_path, 1, keep=1)
    put(tmp_path, 2, keep=1)
    model = {"weight": torch.full((100_000,), 3.0)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(UserError, match=r"step_3: the checkpoint could not be written \(File too large\)"):
            save(tmp_path, step=3, model=model, state={"step": 3, "big": model}, meta={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert loaded_step(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_meta__has_size_and_sum_of_each_file(tmp_path: Path) -> None:
    folder = put(tmp_path, 7).folder
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("model.safetensors", "state.pt"):
        assert meta["files"][name] == {
            "bytes": (folder / name).stat().st_size,
            "sha256": checkpoint.sha256_of(folder / name),
        }


def test_load_model__other_model_names_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"here does not fit .*1 missing, such as bias; 1 unexpected, such as other"):
        checkpoint.load_model(
            nn.Linear(2, 1), {"weight": torch.ones(1, 2), "other": torch.ones(1)}, untracked=(), where=Path("here")
        )
    with pytest.raises(UserError, match=r"of another shape, such as weight: \(3, 2\) instead of \(1, 2\)"):
        checkpoint.load_model(nn.Linear(2, 1), {"weight": torch.ones(3, 2)}, untracked=("bias",), where=Path("here"))
    layer = nn.Linear(2, 1)
    checkpoint.load_model(layer, {"weight": torch.ones(1, 2)}, untracked=("bias",), where=Path("here"))
    assert torch.equal(layer.weight, torch.ones(1, 2))
