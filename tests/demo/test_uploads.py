# SPDX-License-Identifier: Apache-2.0
"""What uploads may take on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ovd.demo.uploads import Uploads


def put(folder: Path, name: str, size: int, age: int) -> Path:
    file = folder / name / "picture.jpg"
    file.parent.mkdir()
    file.write_bytes(bytes(size))
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_uploads__oldest_are_deleted_first(tmp_path: Path) -> None:
    old, middle, new = (put(tmp_path, name, 100, age) for name, age in (("a", 30), ("b", 20), ("c", 10)))
    uploads = Uploads(tmp_path, most_bytes=350)
    assert uploads.reserve(50) and old.exists()
    assert uploads.reserve(100)
    assert not old.exists() and not old.parent.exists() and not middle.exists() and new.exists()


def test_uploads__limit_covers_concurrent_ones(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, most_bytes=350)
    assert [uploads.reserve(100) for _ in range(5)] == [True, True, True, False, False]
    uploads.release(100)
    assert uploads.reserve(100)


def test_uploads__reserved_bytes_are_counted_once(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, most_bytes=1000)
    for i in range(50):
        assert uploads.reserve(100)
        put(tmp_path, f"{i}", 100, 100 - i)
        uploads.release(100)
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.jpg")) <= 1000
    left = sorted(int(f.parent.name) for f in tmp_path.rglob("*.jpg"))
    assert left[-1] == 49 and len(left) >= 7


def test_uploads__number_of_files_is_limited(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, most_bytes=10**6, most_files=10)
    for i in range(30):
        assert uploads.reserve(1)
        put(tmp_path, f"{i}", 1, 100 - i)
        uploads.release(1)
        assert len(list(tmp_path.rglob("*.jpg"))) <= 10


def test_uploads__leave_half_of_the_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(tmp_path)
    usage = type("Usage", (), {"free": 1000, "total": free.f_blocks, "used": 0})
    monkeypatch.setattr("ovd.demo.uploads.shutil.disk_usage", lambda _: usage)
    uploads = Uploads(tmp_path)
    assert uploads.reserve(400) and not uploads.reserve(400)


def test_uploads__late_fragments_are_removed_once_no_request_is_under_way(tmp_path: Path) -> None:
    """A thread may create the file of a lost upload after its request has ended."""
    uploads, whole = Uploads(tmp_path), put(tmp_path, "whole", 100, 1)
    assert uploads.reserve(100)
    uploads.release(100, whole=False)
    fragment = tmp_path / "tmp1"
    fragment.write_bytes(b"x")
    assert uploads.reserve(100)  # another request, whose fragment this may be
    uploads.remove_fragments()
    assert fragment.exists()
    uploads.release(100)
    assert not fragment.exists() and whole.exists()


def test_uploads__only_files_inside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "uploads"
    inside.mkdir()
    file = put(inside, "a", 1, 1)
    (tmp_path / "secret").write_text("x")
    (inside / "link").symlink_to(tmp_path / "secret")
    uploads = Uploads(inside)
    assert uploads.find(str(file)) == file.resolve()
    for path in ("/etc/passwd", "../secret", str(inside / "link"), str(inside), str(inside / "gone"), "\0", "x" * 5000):
        assert uploads.find(path) is None
