# SPDX-License-Identifier: Apache-2.0
"""A quota of disk space for all uploads together: the oldest are removed for new ones."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

BYTES = 700_000_000  # the largest pictures of all who may wait
FILES = 2000
SHARE = 0.5  # of the free disk, where that is less


@dataclass(frozen=True)
class _Upload:
    path: Path
    size: int
    time: float


class Uploads:
    """The folder of uploads, and the space that is reserved for requests under way.

    Args:
        folder: Gradio's folder for uploads.
        most_bytes: all files and all reservations together.
        most_files: number of files.
    """

    def __init__(self, folder: Path, *, most_bytes: int = BYTES, most_files: int = FILES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.most_files = most_files
        self._reserved = 0
        self._requests = 0
        self._has_fragments = False
        self._at_most = 0  # upper bound of bytes and files: those last counted, and those reserved since
        self._files_at_most = 0
        self.recount()

    def reserve(self, size: int) -> bool:
        """Reserve space for a request; False: there is none, even without all older uploads."""
        limit = self._limit()
        if self._reserved + size > limit:
            return False
        if self._at_most + size > limit or self._files_at_most + 1 > self.most_files:
            self.recount()
            if self._at_most + size > limit or self._files_at_most + 1 > self.most_files:
                self._remove_oldest(limit - self._reserved - size, self.most_files - self._requests - 1)
        self._reserved += size
        self._requests += 1
        self._at_most += size
        self._files_at_most += 1
        return True

    def release(self, size: int, *, whole: bool = True) -> None:
        """End a reservation. An upload that was not whole leaves fragments."""
        self._reserved -= size
        self._requests -= 1
        if self._has_fragments or not whole:
            self.remove_fragments()

    def remove_fragments(self) -> None:
        """Remove fragments of uploads that were not whole, now or once no request is under way."""
        self._has_fragments = True
        if not self._requests:
            self._has_fragments = False
            for file in self.folder.iterdir():  # whole uploads lie in folders of their own
                if file.is_file() and not file.is_symlink():
                    file.unlink(missing_ok=True)
            self.recount()

    def recount(self) -> None:
        """Count the files in the folder."""
        files = self._files()
        self._at_most = sum(f.size for f in files) + self._reserved
        self._files_at_most = len(files) + self._requests

    def find(self, path: str) -> Path | None:
        """The upload of that path, or None: no such file, or one outside the folder."""
        try:
            upload = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return None
        return upload if upload.is_file() and upload.is_relative_to(self.folder.resolve()) else None

    def _limit(self) -> int:
        free = shutil.disk_usage(self.folder).free + self._at_most - self._reserved
        return min(self.most_bytes, int(free * SHARE))

    def _files(self) -> list[_Upload]:
        files = []
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = Path(parent, name)
                try:
                    state = path.stat(follow_symlinks=False)
                except OSError:  # removed meanwhile
                    continue
                files.append(_Upload(path, state.st_size, state.st_mtime))
        return sorted(files, key=lambda f: f.time)

    def _remove_oldest(self, most_bytes: int, most_files: int) -> None:
        """Remove files until so much is left, a quarter more so that the next request need not look again."""
        files = self._files()
        size, count = sum(f.size for f in files), len(files)
        for file in files:
            if size <= most_bytes * 3 // 4 and count <= most_files * 3 // 4:
                break
            file.path.unlink(missing_ok=True)
            if file.path.parent != self.folder and not any(file.path.parent.iterdir()):
                file.path.parent.rmdir()
            size -= file.size
            count -= 1
        self.recount()
