# SPDX-License-Identifier: Apache-2.0
"""Reading of JSON files: the content, or one sentence that names the file, what is wrong and what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json


def test_content_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"größe": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"größe": [1, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": }', r"not JSON: Expecting value at line 2, column 7"),
        (b"", r"not JSON: Expecting value at line 1, column 1"),
        (b"\x1f\x8b\x08", r"not a text file in UTF-8 \(byte 1\)\. Is it packed"),
        (b"[" * 100_000, r"not JSON: .*recursion"),
    ],
    ids=["broken", "empty", "packed", "nested"],
)
def test_what_is_no_json_is_named_with_its_place(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_files_and_folders_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card\.json: no such file; export it again\.$"):
        read_json(tmp_path / "card.json", hint="export it again")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)\.$"):
        read_json(tmp_path)
