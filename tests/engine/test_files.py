# SPDX-License-Identifier: Apache-2.0
"""Reading of JSON files: the content, or one sentence that names the file, what is wrong and what it should be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.engine.errors import UserError
from pretrain.engine.files import (
    fitting_name,
    read_json,
    require_writable,
    whole_folder,
    write_atomically,
    write_problem,
)


def test_read_json__utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"größe": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"größe": [1, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": }', r"not JSON: Expecting value at line 2, column 7"),
        (b"", r"not JSON: Expecting value at line 1, column 1"),
        (b"\x1f\x8b\x08", r"not a text file in UTF-8 \(byte 1\)\. Is it packed"),
        (b"[" * 100_000, r"not JSON: .*recursion"),
        (b'[{"a": 1, "b": {"c": 1}, "a": 1}]', r"broken\.json: the key 'a' stands twice in one object"),
    ],
    ids=["broken", "empty", "packed", "nested", "repeated"],
)
def test_read_json__error_has_line_and_column(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_files__say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card\.json: no such file; export it again\.$"):
        read_json(tmp_path / "card.json", hint="export it again")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)\.$"):
        read_json(tmp_path)


@pytest.mark.parametrize("stem", ["a", "x" * 300, "长" * 100, os.fsdecode(b"caf\xe9" * 80)])
def test_fitting_name__truncates_and_stays_unique(stem: str) -> None:
    name = fitting_name(stem, ".jpg")
    assert len(os.fsencode(name)) <= 255 and name.endswith(".jpg")
    assert (name == stem + ".jpg") == (len(os.fsencode(stem)) <= 251)
    assert name != fitting_name(stem + "y", ".jpg")


def test_write__takes_the_longest_file_names(tmp_path: Path) -> None:
    path = tmp_path / ("长" * 84 + ".jp")  # 255 bytes
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1


def test_write__an_unwritable_folder_is_reported_before_the_work(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        require_writable(tmp_path / "file")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), UserError("no"), KeyError("defect")]
)
def test_replace_folder__leaves_it_whole_or_as_it_was(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "export"
    with whole_folder(target) as fresh:
        (fresh / "a").write_text("first")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, whole_folder(target) as fresh:
        (fresh / "a").write_text("half")
        raise error
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"cannot write {target}: No space left on device; free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (target / "a").read_text() == "first"
    with whole_folder(target) as fresh:
        (fresh / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]


def test_replace_folder__ctrl_c_between_the_renames_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "export"
    with whole_folder(target) as fresh:
        (fresh / "a").write_text("first")
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if to == target and path.suffix == ".new":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), whole_folder(target) as fresh:
            (fresh / "a").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (target / "a").read_text() == "first"


@pytest.mark.parametrize("other", [None, {"a": "of an earlier version"}])
def test_write_folder__first_of_two_writers_wins(tmp_path: Path, other: dict[str, str] | None) -> None:
    """The second must not take away what the first has begun to use."""
    target = tmp_path / "export"
    for name, text in (other or {}).items():
        target.mkdir(exist_ok=True)
        (target / name).write_text(text)
    with whole_folder(target) as first, whole_folder(target) as second:
        assert first != second
        for fresh in (first, second):
            (fresh / "classes").mkdir()
            (fresh / "classes/a").write_text("the same")
        inner = second.stat().st_ino
    assert target.stat().st_ino == inner and (target / "classes/a").read_text() == "the same"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_replace_folder__processes_write_and_read_it_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pretrain.engine.files import whole_folder
target = Path(sys.argv[1])
for _ in range(50):
    with whole_folder(target) as fresh:
        (fresh / "a").write_text("the same")
    assert (target / "a").read_text() == "the same"
"""
    command = [sys.executable, "-c", code, str(tmp_path / "export")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    problems = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], problems
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_unwritable_folder__is_named_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied")
    assert write_problem(refused, tmp_path / "new/found") == "Permission denied"  # this user's own, but read-only
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    text = f"{tmp_path} belongs to user {owner}, and this command runs as user {owner + 1}"
    assert write_problem(refused, tmp_path / "new/found") == f"Permission denied; {text}"
    assert write_problem(OSError(errno.ENOSPC, "No space left on device"), tmp_path) == "No space left on device"
