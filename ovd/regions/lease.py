# SPDX-License-Identifier: Apache-2.0
"""Lease files: a lock between processes, of one host or several, that share a folder.

It is created exclusively and names its owner. A lease whose owner is dead, or silent for too long, may be taken over.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ovd.regions.layout import read_text


@contextmanager
def lease(file: Path, seconds: float) -> Iterator[Callable[[], None] | None]:
    """Hold a lease file; yields a heartbeat, or None when another live process holds it."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    token = json.dumps({**owner, "key": uuid.uuid4().hex})
    if not _create_lease(file, token) and not (_take_over(file, seconds) and _create_lease(file, token)):
        yield None
        return
    last = time.monotonic()

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > min(seconds / 10, 10.0):
            last = time.monotonic()
            if file.exists():
                os.utime(file)

    try:
        yield heartbeat
    finally:
        if read_text(file) == token:  # it may have been taken over by now
            file.unlink(missing_ok=True)


def _create_lease(file: Path, token: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as stream:
        stream.write(token)
    return True


def _take_over(file: Path, seconds: float) -> bool:
    """Remove a lease whose owner is dead or silent. True when it is gone."""
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return True
    if age < seconds and not _owner_is_dead(read_text(file)):
        return False
    removed = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        os.rename(file, removed)  # of several processes only one succeeds
    except FileNotFoundError:
        return False
    removed.unlink(missing_ok=True)
    return True


def _owner_is_dead(text: str | None) -> bool:
    try:
        owner = json.loads(text or "")
        host, pid, started = str(owner["host"]), int(owner["pid"]), str(owner["started"])
    except (ValueError, KeyError, TypeError):
        return False  # just being written
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) != started  # the number was given to another process


def _started(pid: int) -> str:
    """When a process started, in kernel ticks; empty where /proc does not say."""
    text = read_text(Path(f"/proc/{pid}/stat"))
    return text.rpartition(")")[2].split()[19] if text else ""
