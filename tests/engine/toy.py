# SPDX-License-Identifier: Apache-2.0
"""Small tasks and sources with every kind of state that a real method has, so that forgetting one shows."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.engine.checkpoint import load_state, verify
from pretrain.engine.config import LoopConfig, OptimConfig
from pretrain.engine.distributed import gather_with_grad
from pretrain.engine.errors import BadImageError
from pretrain.engine.loop import FitReport, fit
from pretrain.engine.task import Task

WIDTH = 6


class Numbers:
    """Samples are a function of (index, draw). ``noisy`` also draws from the global generators."""

    def __init__(self, length: int = 50, *, noisy: bool = False, unreadable: tuple[int, ...] = (), dtype: Any = None):
        self.length, self.noisy, self.unreadable, self.dtype = length, noisy, unreadable, dtype
        self.before: Callable[[int, int], None] = _nothing

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, draw: int) -> Tensor:
        self.before(index, draw)
        if index in self.unreadable:
            raise BadImageError(f"images/{index}.png", "truncated")
        value = torch.from_numpy(np.random.default_rng([index, draw]).normal(size=WIDTH))
        if self.noisy:
            value = value + random.random() + np.random.rand() + torch.rand(()).double()
        return value.to(self.dtype or torch.float32)

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)


def _nothing(index: int, draw: int) -> None:
    """The default of ``Numbers.before``."""


class Everything(Task):
    """Batch norm, dropout, a queue with a pointer, an EMA copy, a frozen part, three kinds of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(7, 3))  # 7: no batch size divides it
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.teacher = nn.Linear(WIDTH, 3).requires_grad_(False)
        self.untracked = ("teacher.",)
        self.calls = 0
        self.before: Callable[[int], None] = _no_call

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        self.before(self.calls)
        self.calls += 1
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        out = self.net(batch + 0.01 * noise)
        with torch.no_grad():
            target = self.slow(batch) + self.teacher(batch)
            rows = (int(self.pointer) + torch.arange(len(batch))) % len(self.queue)
        loss = (out.float() - target).pow(2).mean() + 0.1 * (out.float() @ self.queue.clone().T).exp().mean()
        with torch.no_grad():
            self.queue[rows] = out.float()
            self.pointer.copy_((self.pointer + len(batch)) % len(self.queue))
        return loss, {"noise": noise, "spread": out.detach().std()}

    def after_step(self, step: int, total: int) -> None:
        keep = 1 - 0.1 * (1 + step / total)
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def _no_call(call: int) -> None:
    """The default of ``before``."""


class Mean(Task):
    """A loss that is a mean over samples: without gathering, slices of a batch average to the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.net(batch).squeeze(1) - batch.sum(1)).pow(2).mean(), {}


class Contrastive(Task):
    """Symmetric InfoNCE between two towers, in both distributed forms: ``whole`` loss, or ``local`` rows."""

    def __init__(self, form: str = "whole") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form = form
        self.left, self.right = nn.Linear(WIDTH, 4).double(), nn.Linear(WIDTH, 4).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        left = nn.functional.normalize(self.left(batch), dim=1)
        right = nn.functional.normalize(self.right(batch.square()), dim=1)
        all_left, all_right = gather_with_grad(left), gather_with_grad(right)
        if self.form == "whole":
            left, right, first = all_left, all_right, 0
        else:
            first = int(os.environ.get("RANK", "0")) * len(batch)
        target = first + torch.arange(len(left))
        scale = self.scale.exp()
        loss = nn.functional.cross_entropy(scale * left @ all_right.T, target)
        loss = loss + nn.functional.cross_entropy(scale * right @ all_left.T, target)
        return loss / 2, {"scale": self.scale.detach()}


def train(task: Task, out: Path, source: Any = None, **options: Any) -> FitReport:
    """``fit`` with small defaults; keys of either config, and fit's own flags, as keywords."""
    flags = {name: options.pop(name) for name in ("resume", "overwrite", "check", "free_keys") if name in options}
    optim_keys = {name: options.pop(name) for name in list(options) if name in OptimConfig.model_fields}
    loop_keys = {"steps": 8, "batch_size": 4, "log_every": 3, "save_every": 4, "workers": 0, "device": "cpu"} | options
    loop, optim = LoopConfig(**loop_keys), OptimConfig(**({"lr": 0.05, "warmup_steps": 2} | optim_keys))
    record = {"out": str(out), "loop": loop.model_dump(), "optim": optim.model_dump()}
    source = Numbers() if source is None else source
    return fit(task, source, loop=loop, optim=optim, out=out, record=record, **flags)


def content(folder: Path) -> dict[str, Any]:
    """Everything a checkpoint holds, for ``differences``."""
    model, state = load_state(verify(folder))
    for one in state["ranks"]:  # measured times are not part of the promise
        one["window"] = {name: value for name, value in one["window"].items() if not name.endswith("_time")}
    return {"model": model, "state": state}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two nested values are not the same bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}/{key}" for key in a.keys() ^ b.keys()]
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for n, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{n}")]
    return [] if type(a) is type(b) and a == b else [where]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
