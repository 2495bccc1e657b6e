# SPDX-License-Identifier: Apache-2.0
"""Handling of signals, non-finite steps, unreadable images and dead loader processes in the loop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from pretrain.engine.errors import UserError, shorten, warn

MAX_SKIPPED = 3  # consecutive non-finite steps that are skipped; the next one stops the run
PATIENCE = 300.0  # seconds in one part of a step before a process says where it is, once for each part
LOST = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "ncclRemoteError",
)
BAD_IMAGES_ALLOWED = 0.01  # of the draws so far
BAD_IMAGES_IGNORED = 3  # so few prove nothing, whatever their share


class Stopped(SystemExit):
    """The run was asked to stop and has saved. The exit status is 143 after SIGTERM, 130 after SIGINT."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(128 + signum)
        self.step = step


class Signals:
    """While in use, SIGTERM and SIGINT are noted, for the loop to stop after its step; a second one ends at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        os.write(2, b"stopping after this step; once more to leave at once\n")  # print is not safe in a handler


class NonFinite(TypedDict):
    """One process's part of a step whose loss or gradient is not finite."""

    rank: int
    loss: float
    grad_norm: float
    indices: list[int]
    draws: list[int]


def non_finite_samples(processes: Sequence[NonFinite]) -> str:
    """Name the samples of a non-finite step.

    Args:
        processes: what each process saw.
    """
    # Prefer those whose own loss is not finite: after averaging, the gradient is alike everywhere.
    failing = [process for process in processes if not math.isfinite(process["loss"])] or processes
    indices = [index for process in failing for index in process["indices"]]
    draws = [draw for process in failing for draw in process["draws"]]
    return f"loss {failing[0]['loss']}, gradient norm {failing[0]['grad_norm']}; samples {indices}, draws {draws}"


def too_many_bad(bad: int, drawn: int) -> bool:
    """Whether unreadable images are clearly more than 1 % of what was drawn.

    "Clearly" is two standard deviations of chance, so that a data set with fewer is not refused for bad luck early on.
    """
    allowed = BAD_IMAGES_ALLOWED * drawn
    return bad > max(BAD_IMAGES_IGNORED, allowed + 2 * math.sqrt(allowed))


class Watchdog:
    """Reports which part of a step a process is in when it has been there for long.

    A process that leaves out a collective which the others enter lets all of them wait, without a word. Here each says
    its rank, its step and the part of the step: the odd one out is the one to look at.

    Args:
        rank: this process.
        active: False for a single process.
    """

    def __init__(self, rank: int, *, active: bool) -> None:
        self.rank, self.active = rank, active
        self._position = (0, "start", time.monotonic())
        self._stopped = threading.Event()

    def at(self, step: int, part: str) -> None:
        """Note that this process begins a part of a step."""
        self._position = (step, part, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self.active:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        reported: tuple[int, str, float] | None = None
        while not self._stopped.wait(PATIENCE / 4):
            position = self._position
            waited = time.monotonic() - position[2]
            if waited > PATIENCE and position is not reported:
                reported = position
                warn(
                    f"process {self.rank} (pid {os.getpid()}) has been in step {position[0]} ({position[1]}) "
                    f"for {waited:.0f} s. It waits for others, or they for it: look at the process that names another "
                    "step or part, or none"
                )


def explained(error: RuntimeError, *, step: int, device: torch.device, rank: int = 0) -> Exception:
    """Turn the failures that a user can mend into a message; others stay as they are."""
    text = str(error)
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"out of memory on {device}: raise loop.accumulate or lower loop.batch_size ({first})")
    if "DataLoader" in text and ("worker" in text or "timed out" in text) and not text.startswith("Caught"):
        return UserError(
            f"a data loading process died or hung after step {step} ({first}). The usual causes are memory and "
            "/dev/shm (in a container: --shm-size); lower loop.workers "
            "(0 loads in this process) and continue with --resume"
        )
    if any(sign in text for sign in LOST):
        return UserError(
            f"process {rank} lost the others after step {step} ({shorten(first, 200)}). One of them ended or "
            "hangs: its log says why; continue with --resume"
        )
    return error
