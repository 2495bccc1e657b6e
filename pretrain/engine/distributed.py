# SPDX-License-Identifier: Apache-2.0
"""One process or many: what ``torchrun`` starts, and a gather whose gradient is exact.

How losses and gradients add up (``W`` processes, each with its slice of the global batch):

* DistributedDataParallel averages parameter gradients over the processes.
* ``gather_with_grad`` sums the incoming gradient over the processes before taking its own slice. Under the
  averaging this is the exact gradient of the global loss in both usual forms: the *whole* loss computed alike on
  every process, and the loss over the *local* rows against gathered columns. Nothing is to be multiplied by ``W``.
* A loss that is a mean over local samples needs no gather at all: slices have equal size, so the average is the mean.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.errors import UserError


def rank() -> int:
    """This process's number, 0 without ``torchrun``."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def setup() -> bool:
    """Join the process group that ``torchrun`` describes in the environment; nothing to do for a single process.

    CPU tensors travel over gloo, CUDA tensors over nccl.

    Returns:
        whether this call joined, so that the caller knows to leave with ``teardown``.
    """
    if world_size() == 1 or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    return True


def teardown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """`setup`, and `teardown` at the end; inside another one it does nothing."""
    joined = setup()
    try:
        yield
    finally:
        if joined:
            teardown()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(name: str, *, threads: int | None = None) -> torch.device:
    """Turn the configured device name into a device, and let torch compute with so many threads on the CPU.

    Args:
        name: ``auto`` (this process's GPU if there is one, otherwise the CPU) or a torch device name.
        threads: of one operator, for the whole process; None: leave it to torch and OMP_NUM_THREADS.

    Raises:
        UserError: if the device does not exist on this machine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is not a device name; use auto, cpu or cuda") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device: {name!r} was requested, but torch finds no CUDA device; use device=cpu or auto")
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        device = torch.device("cuda", index)
        if index >= torch.cuda.device_count():
            raise UserError(f"device: {device} was requested, but torch finds {torch.cuda.device_count()} CUDA devices")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device: {name!r} was requested, but torch finds no Metal device; use device=cpu or auto")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device: {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def device_of(module: object) -> torch.device:
    """Where a network's parameters are; the CPU for what has none."""
    parameters = module.parameters() if isinstance(module, torch.nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def all_sum(values: list[float]) -> list[float]:
    """Sum a few numbers over the processes, element by element."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def shares(counts: Sequence[float]) -> list[float]:
    """Weights that make the average over the processes of local means the mean over all.

    Args:
        counts: of each mean of this process, over how many items it was taken; the same means in every process.

    Returns:
        for each, ``count · W / (sum of the counts of all processes)``: 1 in one process, and where nobody has any item.
    """
    totals = all_sum([float(count) for count in counts])
    return [count * world_size() / total if total else 1.0 for count, total in zip(counts, totals, strict=True)]


def all_objects(value: Any) -> list[Any]:
    """Collect one small Python object from every process, in order of rank."""
    if world_size() == 1:
        return [value]
    collected: list[Any] = [None] * world_size()
    dist.all_gather_object(collected, value)
    return collected


class _Gather(torch.autograd.Function):
    """All-gather whose backward is all-reduce(sum) and the own slice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Concatenate ``x`` of every process along the first dimension, differentiably.

    Args:
        x: (n, …), the same shape in every process.

    Returns:
        (W·n, …), the same in every process, in order of rank; ``x`` itself for a single process.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RngState(TypedDict):
    """The state of every global generator: Python's, numpy's (words, position, has_gauss, gauss), torch's."""

    python: tuple[Any, ...]
    numpy: tuple[Tensor, int, int, float]
    torch: Tensor
    cuda: list[Tensor]


def rng_state() -> RngState:
    """The state of every global generator, in types that ``torch.load(weights_only=True)`` accepts."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: RngState) -> None:
    """Put back what ``rng_state`` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the CPU's global generators afterwards, whatever the body draws."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
