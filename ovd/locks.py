# SPDX-License-Identifier: Apache-2.0
"""A lock around computation that survives pickling and forking."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType


class ComputeLock:
    """A re-entrant lock; a copy, an unpickled one and a forked child get a new one.

    A forked child inherits locks as they were, held by threads that it does not have, and an OpenMP whose team is gone:
    the first operator that uses it would hang. So the child gets a free lock, and computes with one thread.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> ComputeLock:
        if self._process != os.getpid():
            self._renew()
            if (torch := sys.modules.get("torch")) is not None:
                torch.set_num_threads(1)
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ComputeLock], tuple[()]]:
        return ComputeLock, ()
