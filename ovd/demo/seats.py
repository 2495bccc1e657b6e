# SPDX-License-Identifier: Apache-2.0
"""A fixed number of seats, taken in the order in which threads come for them."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Seats:
    """A semaphore that serves whoever waits longest; a context manager.

    `threading.Semaphore` promises no order: a thread that comes while a seat is given back can take it before one that
    has waited for minutes. Here a seat that is given back belongs to the first in the line at once.

    Args:
        count: seats.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._line: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Threads without a seat."""
        return len(self._line)

    def __enter__(self) -> None:
        with self._lock:
            if self._free:  # then nobody waits
                self._free -= 1
                return
            turn = threading.Event()
            self._line.append(turn)
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._line:
                self._line.popleft().set()
            else:
                self._free += 1
