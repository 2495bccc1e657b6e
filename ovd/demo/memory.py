# SPDX-License-Identifier: Apache-2.0
"""Less memory for the page: few heaps, and memory returned to the system when idle."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

_M_ARENA_MAX = -8  # <malloc.h>
_MADV_DONTNEED = 4  # <linux/mman.h>
ARENAS = 2


def limit_heaps() -> None:
    """Let threads share `ARENAS` heaps of glibc: one heap a thread keeps what a picture once needed. Call first."""
    if sys.platform == "linux" and (mallopt := _libc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


def freeze_loaded() -> None:
    """Exempt loaded objects from garbage collection, and release what only loading needed."""
    gc.collect()
    gc.freeze()
    trim_memory()
    drop_library_pages()


def drop_library_pages() -> int:
    """Drop the resident pages of shared libraries. Returns the number of mappings.

    torch for CUDA reads 150 MB of NVIDIA's libraries on every machine, and on a CPU never uses them again. Nothing is
    lost: only mappings that cannot be written and have no dirty page are dropped, and a page that is needed after all
    is read again from its file, mostly from the system's cache.
    """
    madvise = _libc("madvise")
    if sys.platform != "linux" or madvise is None:
        return 0
    dropped = 0
    for mapping in _mappings():
        if "w" not in mapping.rights and mapping.dirty_kb == 0 and ".so" in mapping.file:
            size = ctypes.c_size_t(mapping.end - mapping.start)
            dropped += madvise(ctypes.c_void_p(mapping.start), size, _MADV_DONTNEED) == 0
    return dropped


class _Mapping(NamedTuple):
    start: int
    end: int
    rights: str
    file: str
    dirty_kb: int  # written by this process, if only while it was loaded


def _mappings() -> list[_Mapping]:
    """What this process has mapped from files."""
    mappings: list[_Mapping] = []
    head: list[str] = []
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if not line.partition(" ")[0].endswith(":"):
                head = line.split(maxsplit=5)
            elif line.startswith("Anonymous:") and len(head) == 6 and head[5].startswith("/"):
                start, end = (int(number, 16) for number in head[0].split("-"))
                mappings.append(_Mapping(start, end, head[1], head[5].rstrip("\n"), int(line.split()[1])))
    return mappings


def trim_memory() -> None:
    """Return free memory to the system."""
    gc.collect()
    if sys.platform == "linux" and (trim := _libc("malloc_trim")) is not None:
        trim(0)


def release_idle_memory() -> None:
    """Release memory of past requests; call when none is left."""
    trim_memory()
    drop_library_pages()


def _libc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None under another C library."""
    try:
        function: Callable[..., int] = ctypes.CDLL(None)[name]
    except (AttributeError, OSError):
        return None
    return function
