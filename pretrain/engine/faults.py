# SPDX-License-Identifier: Apache-2.0
"""What the loop does about signals, non-finite steps, unreadable images and dead loader processes."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from pretrain.engine.errors import UserError

MAX_SKIPPED = 3  # consecutive non-finite steps that are skipped; the next one stops the run
BAD_IMAGES_ALLOWED = 0.01  # of the draws so far
BAD_IMAGES_IGNORED = 3  # so many prove nothing, whatever their share


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


def guilty_samples(processes: Sequence[NonFinite]) -> str:
    """Name the samples of a non-finite step.

    Args:
        processes: What each process saw.
    """
    # Prefer those whose own loss is not finite: after averaging, the gradient is alike everywhere.
    guilty = [one for one in processes if not math.isfinite(one["loss"])] or processes
    indices = [index for one in guilty for index in one["indices"]]
    draws = [draw for one in guilty for draw in one["draws"]]
    return f"loss {guilty[0]['loss']}, gradient norm {guilty[0]['grad_norm']}; samples {indices}, draws {draws}"


def too_many_bad(bad: int, drawn: int) -> bool:
    """Whether unreadable images are clearly more than 1 % of what was drawn.

    "Clearly" is two standard deviations of chance, so that a data set with fewer is not refused for bad luck early on.
    """
    allowed = BAD_IMAGES_ALLOWED * drawn
    return bad > max(BAD_IMAGES_IGNORED, allowed + 2 * math.sqrt(allowed))


def explained(error: RuntimeError, *, step: int, device: torch.device) -> Exception:
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
    return error
