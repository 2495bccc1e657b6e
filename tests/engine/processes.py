# SPDX-License-Identifier: Apache-2.0
"""Start several processes as ``torchrun`` does, and what the tests let them do.

``python -m tests.engine.processes NAME FOLDER`` is the body of one process.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pretrain.engine import distributed, faults
from pretrain.engine.errors import UserError
from pretrain.engine.loop import Stopped
from tests.engine.toy import WIDTH, Contrastive, Everything, Mean, Numbers, train
from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
EXACT = {"steps": 3, "batch_size": 8, "accumulate": 1, "name": "sgd", "lr": 0.1, "save_every": 100, "log_every": 1}


def start_ranks(arguments: Sequence[str], *, world: int) -> list[subprocess.Popen[str]]:
    """Start ``python ARGUMENTS`` once per rank, with torchrun's variables."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=os.environ
            | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(world)
    ]


def launch(name: str, folder: Path, *, world: int, module: str = "tests.engine.processes") -> None:
    """Run ``name`` of ``module`` in ``world`` processes and fail with their output if one fails."""
    finish(start_ranks(["-m", module, name, str(folder)], world=world))


def finish(started: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for processes, and fail with their output if one fails."""
    outputs = [process.communicate(timeout=250)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)


def everything(folder: Path) -> None:
    """All cases for a pair of processes, in one start: importing torch is the slow part."""
    gradients(folder)
    for task in (Mean(), Contrastive("whole"), Contrastive("local")):
        name = f"{type(task).__name__}-{getattr(task, 'form', 'mean')}"
        train(task, folder / name, Numbers(30, dtype=torch.float64), **EXACT)
    train(Mean(), folder / "accumulated", Numbers(30, dtype=torch.float64), **EXACT | {"accumulate": 2})
    resume(folder)
    nonfinite(folder)
    hanging(folder)
    unreadable(folder)
    lost(folder)


def gradients(folder: Path) -> None:
    """The averaged gradient of each form of loss, for the same global batch in any number of processes."""
    batch = Numbers(dtype=torch.float64)
    whole = batch.collate([batch.sample(n, n) for n in range(8)])
    share = len(whole) // distributed.world_size()
    mine = whole[distributed.rank() * share :][:share]
    found: dict[str, Any] = {}
    for form in ("whole", "local"):
        task = Contrastive(form)
        model = DistributedDataParallel(task)
        loss, _ = model(mine)
        loss.backward()
        found[form] = {name: p.grad for name, p in task.named_parameters()}
        found[f"{form} loss"] = distributed.all_sum([loss.item()])[0] / distributed.world_size()
    x = torch.full((2, 3), float(distributed.rank()), requires_grad=True)
    gathered = distributed.gather_with_grad(x)
    weights = torch.arange(gathered.numel(), dtype=torch.float32).view_as(gathered) * (1 + distributed.rank())
    (gathered * weights).sum().backward()
    found["gathered"], found["gathered gradient"] = gathered.detach(), x.grad
    half = distributed.gather_with_grad(x.detach().bfloat16().requires_grad_())
    found["bf16"] = half.detach()
    torch.save(found, folder / f"gradients_{distributed.world_size()}_{distributed.rank()}.pt")


def interrupted(task: Everything, out: Path, at: int, *, victim: int, **options: Any) -> None:
    """Train until process ``victim`` gets a SIGTERM in its step ``at``; all must stop."""

    def hit(call: int) -> None:
        if call == at and distributed.rank() == victim:
            os.kill(os.getpid(), signal.SIGTERM)

    task.before = hit
    try:
        train(task, out, **options)
    except Stopped as stopped:
        assert (stopped.code, stopped.step) == (143, at + 1)
    else:
        raise AssertionError("the run was not stopped")


def resume(folder: Path) -> None:
    """The same run in one piece and in two."""
    options = {"source": Numbers(noisy=True), "steps": 7, "workers": 1, "save_every": 100}
    train(Everything(), folder / "one_piece", **options)
    interrupted(Everything(), folder / "two_pieces", 3, victim=1, **options)
    distributed.seed_everything(999)
    train(Everything(), folder / "two_pieces", resume=True, **options)


def nonfinite(folder: Path) -> None:
    """A NaN that only process 1 sees must keep every process from updating."""
    source = Numbers(1000)
    task = Mean()

    def poison(module: Any, inputs: Any) -> Any:
        poison.calls += 1  # type: ignore[attr-defined]
        return (inputs[0] * float("nan"),) if poison.calls == 2 and distributed.rank() == 1 else None  # type: ignore[attr-defined]

    poison.calls = 0  # type: ignore[attr-defined]
    task.net.register_forward_pre_hook(poison)
    source.dtype = torch.float64
    train(task, folder / "nonfinite", source, steps=4)
    torch.save(task.state_dict(), folder / f"nonfinite_{distributed.rank()}.pt")


def hanging(folder: Path) -> None:
    """Process 1 stays away from step 3, longer than the others are patient; then it comes."""
    faults.PATIENCE = 0.5
    task = Everything()
    task.before = lambda call: time.sleep(2.5) if call == 2 and distributed.rank() == 1 else None
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train(task, folder / "hanging", steps=4)
    faults.PATIENCE = 300.0
    (folder / f"hanging_{distributed.rank()}.txt").write_text(said.getvalue())


def lost(folder: Path) -> None:
    """Process 1 is gone in step 3; nothing can be done together after that."""
    task = Everything()
    task.before = lambda call: os._exit(0) if call == 2 and distributed.rank() == 1 else None
    try:
        train(task, folder / "lost", steps=4)
    except UserError as error:
        (folder / "lost.txt").write_text(str(error))
    os._exit(0)


def unreadable(folder: Path) -> None:
    """Process 0 lists what all processes could not read."""
    train(Mean(), folder / "unreadable", Numbers(8, unreadable=(1, 5), dtype=torch.float64), steps=1, batch_size=8)


def main() -> None:
    """The body of one process."""
    distributed.setup()
    assert WIDTH == 6
    globals()[sys.argv[1]](Path(sys.argv[2]))
    distributed.teardown()


if __name__ == "__main__":
    main()
