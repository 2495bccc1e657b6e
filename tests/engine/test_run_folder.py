# SPDX-License-Identifier: Apache-2.0
"""The run folder: one training at a time, nothing stale after --overwrite, nothing lost by --resume."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ovd.config import TrainConfig
from pretrain.config import PretrainConfig
from pretrain.engine import run_folder
from pretrain.engine.checkpoint import load_weights, newest
from pretrain.engine.config import changed_keys, keys_at_default, load_config, plain
from pretrain.engine.errors import ConfigError, UserError
from pretrain.engine.run_folder import FolderLock, exported_folder, find_start, prepare
from tests.engine.processes import REPOSITORY
from tests.engine.toy import Mean, Numbers, train

HOLDER = """
import sys
from pathlib import Path
from pretrain.engine.run_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take() is None
print("held", flush=True)
sys.stdin.read()
"""


def test_lock__refuses_a_second_training_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for how in ("resume", "overwrite"):
            with pytest.raises(UserError, match=f"another training writes here .process {other.pid} on "):
                train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, **{how: True})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, check=True)  # writes nothing, so it may
        other.kill()
    assert train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, resume=True).step == 4


def test_lock__ends_with_its_run(tmp_path: Path) -> None:
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=2, warmup_steps=0)
    code = HOLDER.replace("sys.stdin.read()", "")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr


def test_run_folder__that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal = FolderLock(tmp_path / "file" / "run").take()
    assert refusal is not None and "choose another folder for out" in refusal


def test_overwrite__removes_the_old_export_and_resuming_keeps_it(tmp_path: Path) -> None:
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, save_every=2)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, save_every=2, resume=True)
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == b"old"
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=4, save_every=2, overwrite=True)
    assert not (tmp_path / "exported").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_export__is_whole_or_absent_and_no_other_training_writes_beside_it(tmp_path: Path) -> None:
    (tmp_path / ".exported.0123.new").mkdir()  # of one that was killed
    for error in (KeyboardInterrupt, UserError):
        with pytest.raises(error), exported_folder(tmp_path) as exporting:
            (exporting / "model.safetensors").write_bytes(b"half")
            raise error("stop")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with exported_folder(tmp_path) as exporting:
        (exporting / "model.safetensors").write_bytes(b"whole")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another training writes here"), exported_folder(tmp_path):
            pass
        other.kill()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "exported"]
    assert (tmp_path / "exported/model.safetensors").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("model", "name"), [(TrainConfig, "vild.yaml"), (PretrainConfig, "pretrain/clip.yaml")], ids=["ovd", "pretrain"]
)
def test_recorded_config__is_read_back_to_the_same_configuration(tmp_path: Path, model: type, name: str) -> None:
    config = load_config(model, REPOSITORY / "configs" / name)
    prepare(tmp_path, plain(config), device=torch.device("cpu"), overwrite=False)
    assert load_config(model, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("model", "name"), [(TrainConfig, "vild.yaml"), (PretrainConfig, "pretrain/clip.yaml")], ids=["ovd", "pretrain"]
)
def test_warm_up__longer_than_the_run_is_refused(model: type, name: str) -> None:
    path = REPOSITORY / "configs" / name
    with pytest.raises(ConfigError, match="optim.warmup_steps 7 must be less than loop.steps 7"):
        load_config(model, path, ["loop.steps=7", "optim.warmup_steps=7"])
    assert load_config(model, path, ["loop.steps=7", "optim.warmup_steps=6"]).loop.steps == 7


def test_resume__new_keys_must_have_their_default(tmp_path: Path) -> None:
    train(Mean(), tmp_path, Numbers(dtype=torch.float64), steps=2, warmup_steps=0)
    recorded = newest(tmp_path / "checkpoints", warn=print).meta["config"]  # type: ignore[union-attr]
    now = {**recorded, "method": {"chunk": 64}}
    options = {"free_keys": {"out"}, "resume": True, "overwrite": False, "warn": print}
    found = find_start(tmp_path, now, at_default={"method.chunk"}, **options)  # type: ignore[arg-type]
    assert found is not None and found.meta["config"] == recorded
    with pytest.raises(UserError, match=r"cannot resume, the config has changed in method\.chunk"):
        find_start(tmp_path, now, **options)  # type: ignore[arg-type]
    changed = {**recorded, "loop": {**recorded["loop"], "seed": 7}}
    with pytest.raises(UserError, match=r"changed in loop\.seed"):  # a recorded value is compared, default or not
        find_start(tmp_path, changed, at_default={"loop.seed"}, **options)  # type: ignore[arg-type]


def test_resume__clip_run_older_than_chunk() -> None:
    path = REPOSITORY / "configs" / "pretrain" / "clip.yaml"
    config = load_config(PretrainConfig, path)
    recorded = plain(config)
    assert recorded["method"].pop("chunk") is None
    assert changed_keys(recorded, plain(config), at_default=keys_at_default(config)) == []
    chunked = load_config(PretrainConfig, path, ["method.chunk=32"])
    assert changed_keys(recorded, plain(chunked), at_default=keys_at_default(chunked)) == ["method.chunk"]


@pytest.mark.parametrize("aliases", ['{"b": "absent"}', "[1]", "{", '{"b": ["a"]}'])
def test_aliases__senseless_metadata_is_a_user_error(tmp_path: Path, aliases: str) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"aliases": aliases})
    with pytest.raises(UserError, match=r"w\.safetensors: its metadata 'aliases' is not a table of names"):
        load_weights(path)


def test_overwrite__a_training_that_ended_while_another_began_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is looked at again when it is locked: the second training saw an empty one."""

    def late(out: Path) -> AbstractContextManager[str | None]:
        monkeypatch.setattr(run_folder, "locked", locked)
        train(Mean(), tmp_path / "run", Numbers(dtype=torch.float64), steps=4)
        return locked(out)

    locked = run_folder.locked
    monkeypatch.setattr(run_folder, "locked", late)
    with pytest.raises(UserError, match="is not empty; give --resume"):
        train(Mean(), tmp_path / "run", Numbers(dtype=torch.float64), steps=2)
    latest = newest(tmp_path / "run/checkpoints", warn=print)
    assert latest is not None and latest.step == 4
