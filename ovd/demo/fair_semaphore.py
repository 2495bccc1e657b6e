# SPDX-License-Identifier: Apache-2.0
"""A semaphore that is acquired in the order in which threads ask for it."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairSemaphore:
    """First come, first served; a context manager.

    `threading.Semaphore` promises no order: a thread that asks just after a release can overtake one that has waited
    for minutes. Here a release hands over to the thread that has waited longest.

    Args:
        count: threads that hold it at a time.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Threads that wait for it."""
        return len(self._queue)

    def __enter__(self) -> None:
        with self._lock:
            if self._free:  # then nobody waits
                self._free -= 1
                return
            turn = threading.Event()
            self._queue.append(turn)
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1
