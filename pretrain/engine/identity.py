# SPDX-License-Identifier: Apache-2.0
"""Digests of the data that a run learns from, so that a resumed run can refuse other data.

Small data are hashed in full; of large data names, sizes, modification times and a sample of the content. Reading
100,000 time stamps takes a second, reading 100,000 pictures an hour.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from pretrain.engine.files import sha256_of

WHOLE = 1 << 28  # bytes of all files together up to which they are hashed whole; about a second
HASHED_FILES = 256  # files of larger data whose content is hashed
PIECE = 1 << 16  # bytes of each: from its beginning, its middle and its end
TIMES = " (times of change)"
"""Behind a name: what may differ between two copies of the same data. A resumed run warns of it."""


@runtime_checkable
class Identified(Protocol):
    """A sample source or set of pictures with digests of its data."""

    def identity(self) -> Mapping[str, str]:
        """Name of each part, such as "pictures" → a digest of it."""


def identity_of(source: object) -> dict[str, str]:
    """The digests of a source that has them; empty for others."""
    return dict(source.identity()) if isinstance(source, Identified) else {}


def text_identity(*parts: object) -> str:
    """A digest of values with a stable ``repr``."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def file_identity(paths: Sequence[Path]) -> str:
    """A digest of the content of files that are read whole anyway, such as annotations."""
    return text_identity(*(sha256_of(path) for path in paths))


def files_identity(kind: str, root: Path, names: Sequence[str]) -> dict[str, str]:
    """Digests of many files, in their order.

    Args:
        kind: of the files, such as "pictures".
        root: folder that the names are relative to; where it lies does not matter.
        names: one per file; a file that is missing counts as such.

    Returns:
        ``{kind: digest}``, and the times of change under a name of their own where the content was not read whole.
    """
    digest, times = hashlib.sha256(), hashlib.sha256()
    sizes = []
    for name in names:
        try:
            status = os.stat(root / name)
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:
            size, changed = -1, -1
        sizes.append(size)
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        times.update(f"{changed}\n".encode())
    whole = sum(size for size in sizes if size > 0) <= WHOLE
    count = len(names) if whole else min(HASHED_FILES, len(names))
    for number in range(count):
        index = number * len(names) // count
        if sizes[index] > 0:
            digest.update(_content(root / names[index], sizes[index], whole=whole))
    return {kind: digest.hexdigest()} | ({} if whole else {kind + TIMES: times.hexdigest()})


def _content(path: Path, size: int, *, whole: bool) -> bytes:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            if whole or size <= 3 * PIECE:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                for start in (0, (size - PIECE) // 2, size - PIECE):
                    file.seek(start)
                    digest.update(file.read(PIECE))
    except OSError as error:  # whoever needs it says so
        digest.update(f"cannot be read: {type(error).__name__}".encode())
    return digest.digest()
