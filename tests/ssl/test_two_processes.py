# SPDX-License-Identifier: Apache-2.0
"""BYOL and SwAV in two processes: the same weights and queue as in one, and exact resume in both."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine import distributed
from pretrain.health import Watched
from pretrain.methods.byol import BYOL
from pretrain.methods.swav import SwAV
from pretrain.nets.standardised import without_batch_norm
from tests.engine.toy import content, differences, train
from tests.ssl.small import DIM, WIDTH, Views, as_float, backbone, head

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"byol": (8, 8), "swav": (8, 8, 4)}
OPTIONS: dict[str, Any] = {"batch_size": 16, "name": "sgd", "lr": 0.1, "log_every": 2, "keep": 10}


def make(name: str, *, batch_norm: bool) -> nn.Module:
    """With batch norm, two processes normalise halves: only without it can they equal one."""
    keep: Callable[[nn.Module], nn.Module] = (lambda m: m) if batch_norm else without_batch_norm
    parts: dict[str, Any] = {
        "backbone": keep(backbone()),
        "projector": nn.Sequential(*head(WIDTH)) if batch_norm else nn.Linear(WIDTH, DIM),
        "augment": (as_float,) * len(SIZES[name]),
    }
    if name == "byol":
        return BYOL(**parts, predictor=nn.Linear(DIM, DIM), momentum=0.9)
    torch.manual_seed(5)
    return SwAV(**parts, dim=DIM, prototypes=7, freeze_steps=2, queue_length=24, queue_start=1)


def step_folder(run: Path, step: int) -> Path:
    (found,) = [f for f in (run / "checkpoints").glob("step_*") if int(f.name.removeprefix("step_")) == step]
    return found


def body(folder: Path) -> None:
    """What each process does."""
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        train(make(name, batch_norm=False), folder / f"{name}_same", Views(sizes), steps=6, save_every=6, **OPTIONS)
        whole, parts = folder / f"{name}_whole", folder / f"{name}_parts"
        train(Watched(make(name, batch_norm=True)), whole, Views(sizes), steps=7, save_every=3, **OPTIONS)
        if distributed.is_main():
            shutil.copytree(whole, parts, symlinks=True)
            for late in (6, 7):
                shutil.rmtree(step_folder(parts, late))
        distributed.barrier()
        distributed.seed_everything(999)
        train(Watched(make(name, batch_norm=True)), parts, Views(sizes), steps=7, save_every=3, resume=True, **OPTIONS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same in one and in two processes."""
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ssl.test_two_processes", str(folders[2])],
            cwd=REPOSITORY,
            env=os.environ
            | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    body(folders[1])
    outputs = [process.communicate(timeout=250)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    return folders


@pytest.mark.parametrize("name", SIZES)
def test_two_processes_learn_what_one_learns(runs: dict[int, Path], name: str) -> None:
    one, two = (content(step_folder(runs[world] / f"{name}_same", 6))["model"] for world in (1, 2))
    assert one.keys() == two.keys()
    start = make(name, batch_norm=False).state_dict()
    assert any(not torch.allclose(one[key], start[key], atol=1e-3) for key in one), "six steps change something"
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=2e-5, msg=key)


def test_the_queue_of_two_processes_is_full_and_that_of_one(runs: dict[int, Path]) -> None:
    one, two = (content(step_folder(runs[world] / "swav_same", 6))["model"] for world in (1, 2))
    assert int(two["queue_filled"]) == 24 and int(two["queue_pointer"]) == int(one["queue_pointer"]) == 80 % 24
    assert bool((two["queue"].norm(dim=2) - 1).abs().max() < 1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_a_resumed_run_is_the_same_bit_for_bit(runs: dict[int, Path], name: str, world: int) -> None:
    whole, parts = (content(step_folder(runs[world] / f"{name}_{kind}", 7)) for kind in ("whole", "parts"))
    assert differences(whole, parts) == []
    half = content(step_folder(runs[world] / f"{name}_whole", 3))
    assert differences(half, whole) != []


if __name__ == "__main__":
    distributed.setup()
    body(Path(sys.argv[1]))
    distributed.teardown()
