# SPDX-License-Identifier: Apache-2.0
"""The samples of a step: a pure function of (seed, step), so there is no sampler state to save.

Samples are numbered by *draw*: step ``s`` with global batch ``B`` uses draws ``s·B … s·B + B − 1``. Every
``len(source)`` draws make an epoch, in which each index occurs once. Each draw seeds its own augmentation, so neither
the number of workers nor of processes, nor an interruption, changes what a draw yields.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pretrain.engine.distributed import preserved_rng
from pretrain.engine.errors import BadImageError, UserError

MAX_REPLACEMENTS = 100  # neighbours tried for one unreadable image before we call the whole folder unreadable
_ROUNDS = 6
_MASK = 2**64 - 1


class Source(Protocol):
    """Source of training samples."""

    def __len__(self) -> int: ...

    def sample(self, index: int, draw: int) -> Any:
        """Sample ``index``; ``draw`` seeds its augmentation. Pure. ``BadImageError`` if it cannot be read."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch."""


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a well-mixed bijection of 64-bit numbers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, draw); unrelated for different numbers."""
    value = 0
    for part in parts:
        value = _mix(value ^ (part & _MASK))
    return value >> 1


class Order:
    """A shuffled order per epoch, without a list: a Feistel network permutes the positions.

    Args:
        length: number of samples in the source.
        seed: orders of different seeds are unrelated.
    """

    def __init__(self, *, length: int, seed: int) -> None:
        if length < 1:
            raise UserError("the data set has no samples; check the data keys of the config")
        self.length, self.seed = length, seed
        self._half_bits = max(1, ((length - 1).bit_length() + 1) // 2)

    def index(self, draw: int) -> int:
        """The sample index of a draw, in ``[0, length)``."""
        epoch, position = divmod(draw, self.length)
        key = derive_seed(self.seed, epoch)
        while True:  # walk the cycle until the value is in range; the domain is less than 4 × length
            position = self._permute(position, key)
            if position < self.length:
                return position

    def _permute(self, value: int, key: int) -> int:
        low_mask = (1 << self._half_bits) - 1
        high, low = value >> self._half_bits, value & low_mask
        for number in range(_ROUNDS):
            high, low = low, high ^ (_mix(key ^ (number << 56) ^ low) & low_mask)
        return (high << self._half_bits) | low


class Fetched(NamedTuple):
    """A micro-batch and where it came from. ``bad`` lists (index, path, reason) of replaced images."""

    batch: Any
    draws: list[int]
    indices: list[int]
    bad: list[tuple[int, str, str]]
    error: str | None


class Microbatches(Dataset[Fetched]):
    """Micro-batch ``k`` of this process, for every ``k = step · accumulate + part``.

    Args:
        source: where samples come from.
        seed: of order and augmentation.
        batch_size: samples per optimiser step over all processes.
        accumulate: parts into which a step is divided.
        rank: this process.
        world_size: processes; each takes an equal, contiguous share of every part.

    Raises:
        UserError: if the batch does not divide evenly.
    """

    def __init__(
        self, source: Source, *, seed: int, batch_size: int, accumulate: int, rank: int, world_size: int
    ) -> None:
        if batch_size % (accumulate * world_size):
            raise UserError(
                f"loop.batch_size: {batch_size} is not divisible by accumulate × processes = {accumulate} × "
                f"{world_size}; use a multiple of {accumulate * world_size}"
            )
        self.source, self.seed = source, seed
        self.order = Order(length=len(source), seed=seed)
        self.passes = accumulate
        self.part = batch_size // accumulate
        self.share = self.part // world_size
        self.rank = rank

    def shrink(self, samples: int) -> int:
        """Make steps of at most so many samples, or one per process; returns of how many."""
        processes = self.part // self.share
        self.passes = min(self.passes, max(1, samples // self.part))
        self.share = max(1, min(self.part, samples) // processes)
        self.part = self.share * processes
        return self.part * self.passes

    def draws(self, number: int) -> list[int]:
        """The draws of micro-batch ``number`` in this process."""
        first = number * self.part + self.rank * self.share
        return list(range(first, first + self.share))

    def __getitem__(self, number: int) -> Fetched:
        if get_worker_info() is not None:
            return self._fetch(number)
        with preserved_rng():  # without workers, loading must not disturb the generators that the model uses
            return self._fetch(number)

    def _fetch(self, number: int) -> Fetched:
        draws = self.draws(number)
        indices: list[int] = []
        bad: list[tuple[int, str, str]] = []
        samples = []
        try:
            for draw in draws:
                index, sample = self._sample(draw, bad)
                indices.append(index)
                samples.append(sample)
            return Fetched(self.source.collate(samples), draws, indices, bad, None)
        except UserError as error:  # crosses the process boundary as text: torch would wrap it in a traceback
            return Fetched(None, draws, indices, bad, str(error))

    def _sample(self, draw: int, bad: list[tuple[int, str, str]]) -> tuple[int, Any]:
        first = self.order.index(draw)
        tries = min(len(self.source), MAX_REPLACEMENTS)
        for offset in range(tries):
            index = (first + offset) % len(self.source)
            # A source should use no global generator; one that does is still reproducible.
            _seed_cpu(derive_seed(self.seed, draw, offset))
            try:
                return index, self.source.sample(index, draw)
            except BadImageError as error:
                bad.append((index, str(error.path), str(error)))
        raise UserError(f"{tries} images in a row cannot be read, the last: {bad[-1][2]}; check the data folder")


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _start_worker(_: int) -> None:
    """Workers leave signals to the trainer, which finishes its step and then ends them; and use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)

    def patient(signum: int, frame: Any) -> None:  # the first SIGTERM may be meant for the whole process group
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, patient)


def batches(data: Microbatches, *, first: int, last: int, workers: int, pin: bool) -> Generator[Fetched, None, None]:
    """Yield micro-batches ``first … last − 1`` in order; ``close()`` ends the loader processes.

    Args:
        data: the micro-batches.
        first: number of the first one; a resumed run simply starts here.
        last: one past the last.
        workers: loader processes; 0 loads in this process. The result does not depend on it.
        pin: whether to copy to page-locked memory for a GPU.
    """
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        timeout=600 if workers else 0,
        pin_memory=pin,
        generator=torch.Generator(),  # of its own: the loader must not draw from the model's
    )
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    try:
        yield from iterator
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # A worker that dies while a batch is being handed over closes its socket; torch notices only a moment later.
        if not workers or str(error).startswith("Caught"):  # of the source itself
            raise
        raise RuntimeError(f"a DataLoader worker died while it handed a batch over ({error!r})") from error
    finally:
        # An error must not leave workers behind: they wait for a second SIGTERM, and the interpreter waits for them.
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # one that hangs in a sample
            worker.join()


@runtime_checkable
class Movable(Protocol):
    """A batch that moves itself."""

    def to(self, device: torch.device) -> object:
        """The same on a device."""
        ...


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, and what is `Movable`, inside lists, tuples and dicts."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # the only mark of a named tuple
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if isinstance(value, Movable) else value
