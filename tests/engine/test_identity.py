# SPDX-License-Identifier: Apache-2.0
"""A resumed run finds the data it began with, or says what is another one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.engine import identity
from pretrain.engine.errors import UserError
from pretrain.engine.identity import TIMES, files_identity, identity_of
from tests.engine.toy import Everything, Numbers, train

NAMES = [f"{number}.png" for number in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(bytes([number]) * 1000)
    return root


def change_pixel(path: Path) -> None:
    """Another content of the same length and the same time of change."""
    status = path.stat()
    path.write_bytes(b"x" + path.read_bytes()[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: change_pixel(root / "3.png"),
        lambda root: (root / "3.png").write_bytes(b"longer" * 1000),
        lambda root: (root / "3.png").unlink(),
        lambda root: os.replace(root / "3.png", root / "4.png"),
    ],
    ids=["content", "size", "missing", "swapped"],
)
def test_identity__small_data_by_content(folder: Path, change: Callable[[Path], None]) -> None:
    before = files_identity("pictures", folder, NAMES)
    assert before == files_identity("pictures", folder, NAMES) and list(before) == ["pictures"]
    assert before == files_identity("pictures", Path(shutil.copytree(folder, folder.with_name("moved"))), NAMES)
    assert before != files_identity("pictures", folder, NAMES[::-1])
    change(folder)
    assert files_identity("pictures", folder, NAMES) != before


def test_identity__large_data_by_names_sizes_and_a_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 100)
    monkeypatch.setattr(identity, "HASHED_FILES", 3)
    before = files_identity("pictures", folder, NAMES)
    assert list(before) == ["pictures", "pictures" + TIMES]
    os.utime(folder / "1.png", ns=(1, 1))  # now may still be the clock tick in which it was written
    touched = files_identity("pictures", folder, NAMES)
    assert touched["pictures"] == before["pictures"] and touched != before
    for name in NAMES:
        change_pixel(folder / name)
    assert files_identity("pictures", folder, NAMES)["pictures"] != before["pictures"]


def test_identity__large_file_by_both_ends_and_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 100)
    monkeypatch.setattr(identity, "PIECE", 10)
    content = bytearray(1000)
    (tmp_path / "a.tar").write_bytes(content)
    before = files_identity("shards", tmp_path, ["a.tar"])["shards"]
    for place in (5, 500, 995):
        changed = content.copy()
        changed[place] = 1
        (tmp_path / "a.tar").write_bytes(changed)
        assert files_identity("shards", tmp_path, ["a.tar"])["shards"] != before, place


class WithIdentity(Numbers):
    """Numbers that say what they are made from."""

    digests: dict[str, str]

    def identity(self) -> dict[str, str]:
        return self.digests


def with_identity(**digests: str) -> WithIdentity:
    source = WithIdentity()
    source.digests = {name.replace("_", " "): value for name, value in digests.items()}
    return source


def test_identity__a_resumed_run_refuses_other_data_by_name_and_takes_the_same(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "run", with_identity(pictures="1", annotations="2"), steps=4)
    for other in (with_identity(pictures="1", annotations="3"), with_identity(pictures="1")):
        with pytest.raises(
            UserError, match=r"cannot resume, the annotations have changed \(2 at the start, (3|None) now\)"
        ):
            train(Everything(), tmp_path / "run", other, steps=8, resume=True, free_keys=("loop.steps",))
    again = with_identity(pictures="1", annotations="2")
    assert train(Everything(), tmp_path / "run", again, steps=8, resume=True, free_keys=("loop.steps",)).step == 8


def test_identity__copied_data_are_taken_with_a_warning(tmp_path: Path) -> None:
    source, copy = WithIdentity(), WithIdentity()
    source.digests, copy.digests = (
        {"pictures": "1", "pictures" + TIMES: "2"},
        {"pictures": "1", "pictures" + TIMES: "3"},
    )
    train(Everything(), tmp_path / "run", source, steps=4)
    train(Everything(), tmp_path / "run", copy, steps=8, resume=True, free_keys=("loop.steps",))
    assert "the files of the pictures were copied or touched" in (tmp_path / "run" / "train.log").read_text()


def test_identity__source_without_one_is_compared_by_length() -> None:
    assert identity_of(Numbers()) == {}
