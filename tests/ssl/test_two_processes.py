# SPDX-License-Identifier: Apache-2.0
"""BYOL and SwAV in two processes: the same weights and queue as in one, and exact resume in both; MoCo's shuffle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine import distributed
from pretrain.health import Monitored
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo
from pretrain.methods.swav import SwAV
from pretrain.nets.standardised import without_batch_norm
from tests.engine.processes import finish, start_ranks
from tests.engine.toy import content, differences, train
from tests.ssl.small import DIM, WIDTH, Views, as_float, backbone, head

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


def write_keys(folder: Path) -> None:
    """MoCo's keys of this process's pictures, with and without batch statistics, and the queue after them."""
    torch.manual_seed(7)
    mine = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)[distributed.rank()]  # other ones in each process
    found = {}
    for kind, keep in (("plain", without_batch_norm), ("normed", lambda m: m)):
        torch.manual_seed(1)
        task = MoCo(
            backbone=keep(backbone()), projector=nn.Linear(WIDTH, DIM), augment=(as_float,) * 2, dim=DIM, queue=12
        ).train()
        view = as_float(mine)
        torch.manual_seed(100 + distributed.rank())  # processes draw other orders: the first one's must count
        found[kind] = task._keys(view)
        with torch.no_grad():
            direct = torch.nn.functional.normalize(task.key_projector(task.key_backbone(view)), dim=1)
        found[f"{kind} direct"] = direct
        if kind == "plain":
            task._enqueue(distributed.gather_with_grad(found[kind]))
            found["queue"], found["pointer"] = task.queue, task.queue_pointer
    torch.save(found, folder / f"keys_{distributed.rank()}.pt")


def body(folder: Path) -> None:
    """What each process does."""
    write_keys(folder)
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        train(make(name, batch_norm=False), folder / f"{name}_same", Views(sizes), steps=6, save_every=6, **OPTIONS)
        whole, parts = folder / f"{name}_whole", folder / f"{name}_parts"
        train(Monitored(make(name, batch_norm=True)), whole, Views(sizes), steps=7, save_every=3, **OPTIONS)
        if distributed.is_main():
            shutil.copytree(whole, parts, symlinks=True)
            for late in (6, 7):
                shutil.rmtree(step_folder(parts, late))
        distributed.barrier()
        distributed.seed_everything(999)
        train(
            Monitored(make(name, batch_norm=True)), parts, Views(sizes), steps=7, save_every=3, resume=True, **OPTIONS
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same in one and in two processes."""
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    started = start_ranks(["-m", "tests.ssl.test_two_processes", str(folders[2])], world=2)
    body(folders[1])
    finish(started)
    return folders


@pytest.mark.parametrize("name", SIZES)
def test_two_processes__equal_one(runs: dict[int, Path], name: str) -> None:
    one, two = (content(step_folder(runs[world] / f"{name}_same", 6))["model"] for world in (1, 2))
    assert one.keys() == two.keys()
    start = make(name, batch_norm=False).state_dict()
    assert any(not torch.allclose(one[key], start[key], atol=1e-3) for key in one), "six steps change something"
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=2e-5, msg=key)


def test_two_processes__fill_the_same_queue_as_one(runs: dict[int, Path]) -> None:
    one, two = (content(step_folder(runs[world] / "swav_same", 6))["model"] for world in (1, 2))
    assert int(two["queue_filled"]) == 24 and int(two["queue_pointer"]) == int(one["queue_pointer"]) == 80 % 24
    assert bool((two["queue"].norm(dim=2) - 1).abs().max() < 1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_two_processes__a_resumed_run_is_bit_exact(runs: dict[int, Path], name: str, world: int) -> None:
    whole, parts = (content(step_folder(runs[world] / f"{name}_{kind}", 7)) for kind in ("whole", "parts"))
    assert differences(whole, parts) == []
    half = content(step_folder(runs[world] / f"{name}_whole", 3))
    assert differences(half, whole) != []


def test_two_processes__moco_shuffles_pictures_between_them_and_puts_their_keys_back(runs: dict[int, Path]) -> None:
    first, second = (torch.load(runs[2] / f"keys_{n}.pt", weights_only=True) for n in (0, 1))
    for one in (first, second):
        # A key is that of its own picture, wherever it was computed ...
        torch.testing.assert_close(one["plain"], one["plain direct"], rtol=1e-4, atol=1e-5)
        # ... and it was computed beside other pictures than its query, whose statistics batch norm would betray.
        assert not torch.allclose(one["normed"], one["normed direct"], atol=1e-3)
    assert torch.equal(first["queue"], second["queue"]) and int(first["pointer"]) == int(second["pointer"]) == 8
    torch.testing.assert_close(first["queue"][:8], torch.cat([first["plain"], second["plain"]]))


if __name__ == "__main__":
    distributed.setup()
    body(Path(sys.argv[1]))
    distributed.teardown()
