# SPDX-License-Identifier: Apache-2.0
"""The manifest of shipped weights: only the measured bytes are ever handed out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ovd.weights import CHECKOUT, add_weights, added_root, find_weights, main, problems, read_manifest, weights_folder
from pretrain.engine.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with two entries, one of them the default, and the environment pointing to it."""
    for name in ("vild-photo", "clip-sticker"):
        source = tmp_path / "made" / name
        (source / "sub").mkdir(parents=True)
        (source / "model.safetensors").write_bytes(name.encode() * 100)
        (source / "sub" / "vocabulary.json").write_text("[]")
        (source / "card.md").write_text("# card")
        add_weights(source, name, tmp_path / "weights")
    monkeypatch.setenv("OVD_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_add__is_found_by_name_and_by_alias(root: Path) -> None:
    assert list(read_manifest()) == ["clip-sticker", "vild-photo"]
    assert weights_folder("clip-sticker") == root / "clip-sticker"
    assert weights_folder() == weights_folder("default") == root / "vild-photo"
    assert find_weights("default").card == root / "vild-photo" / "card.md"
    assert find_weights("default").sha256 != find_weights("clip-sticker").sha256


def test_words__of_a_detector_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text('{"classes": ["dog", "t\u00e9l\u00e9"]}', encoding="utf-8")
    assert main(["words", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "dog\nt\u00e9l\u00e9\n"
    (tmp_path / "model.json").write_text(
        '{"classes": ["dog"], "bank": ["dog", "lamp"]}'
    )  # as a detector of photographs
    assert main(["words", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "dog\nlamp\n"
    (tmp_path / "model.json").write_text('{"classes": ["dog"], "own": [{"names": ["my mug"]}, {"names": ["dog"]}]}')
    assert main(["words", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "my mug\ndog\n"  # fine-tuned ones first
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="no detector with words"):
        main(["words", str(tmp_path)])


def test_manifest__paths_are_relative(root: Path) -> None:
    text = (root / "manifest.json").read_text()
    assert str(root) not in text
    assert {entry["folder"] for entry in json.loads(text)} == {"clip-sticker", "vild-photo"}


def test_verify__a_flipped_bit_is_refused_and_the_file_named(root: Path) -> None:
    path = root / "vild-photo" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: its SHA-256 is not the manifest's"):
        weights_folder("default")
    assert weights_folder("clip-sticker")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "999 bytes, the manifest says 1,000"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes, the manifest says|cannot be read"),
    ],
    ids=["missing", "cut short", "a folder"],
)
def test_verify__missing_and_cut_files_are_refused(root: Path, damage, message: str) -> None:
    damage(root / "vild-photo" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        weights_folder("default")


def test_weights__unknown_name_lists_the_known(root: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'vild-photo'.*default, clip-sticker, vild-photo"):
        weights_folder("vild-foto")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "not readable as JSON"),
        ("{}", "must be a list"),
        ('[{"name": "x"}]', "entry 0 is malformed"),
        (
            '[{"name": "x", "folder": "../other", "files": {"a": {"bytes": 1, "sha256": ""}}}]',
            "leaves the weights folder",
        ),
        (
            '[{"name": "x", "folder": "x", "files": {"/etc/a": {"bytes": 1, "sha256": ""}}}]',
            "leaves the weights folder",
        ),
        ('[{"name": "x", "folder": "x", "files": {}}]', "lists no files"),
        ('[{"name": "x", "folder": "x", "files": {"a": {"sha256": ""}}}]', "entry 0 is malformed"),
    ],
)
def test_manifest__a_malformed_one_is_refused(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_manifest__a_missing_one_says_how_to_get_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="git checkout -- weights"):  # make weights would rebuild only the stickers'
        weights_folder("default", tmp_path)


def test_find__default_detector_by_its_own_name_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    for name in ("default", "vild-photo"):
        with pytest.raises(UserError, match="the default weights, vild-photo, are not in .*git checkout -- weights"):
            weights_folder(name, tmp_path)


def test_add__in_a_checkout_of_somebody_else_writes_to_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OVD_WEIGHTS", raising=False)
    monkeypatch.setenv("WORDBOX_HOME", str(tmp_path))
    assert added_root() == CHECKOUT / "weights"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert added_root() == tmp_path / "weights"


def test_add__again_replaces_folder_and_entry(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "second"
    source.mkdir()
    (source / "other.safetensors").write_bytes(b"1")
    before = find_weights("vild-photo").sha256
    add_weights(source, "vild-photo", root)
    assert [path.name for path in (root / "vild-photo").iterdir()] == ["other.safetensors"]
    assert find_weights("vild-photo").sha256 != before
    assert problems(find_weights("vild-photo")) == []
    assert [path.name for path in root.iterdir() if path.name.endswith(".new")] == []


def test_add__a_folder_already_in_place_is_only_hashed(root: Path) -> None:
    path = root / "vild-photo" / "model.safetensors"
    path.write_bytes(b"retrained")
    add_weights(root / "vild-photo", "vild-photo", root)
    assert weights_folder("default") == root / "vild-photo"
    assert path.read_bytes() == b"retrained"


@pytest.mark.parametrize("bad", ["model.pt", "model.pkl", "code.py", "noending"])
def test_add__takes_only_data_files(tmp_path: Path, bad: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"1")
    (source / bad).write_bytes(b"1")
    with pytest.raises(UserError, match=bad):
        add_weights(source, "x", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "default", "é"])
def test_add__bad_names_are_refused(root: Path, name: str) -> None:
    with pytest.raises(UserError):
        add_weights(root / "vild-photo", name, root)


def test_verify__the_command_exits_1_and_names_the_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    (root / "clip-sticker" / "model.safetensors").write_bytes(b"")
    assert main(["verify", "vild-photo"]) == 0
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "clip-sticker: WRONG" in out and "model.safetensors" in out and "vild-photo: ok" in out


def test_weights_command__reports_a_user_error_without_traceback(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ovd.weights", "verify", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no weights named 'nothing'")
    assert "Traceback" not in done.stderr


def test_docs__figures_equal_the_shipped_cards() -> None:
    """Weights shipped anew leave stale figures behind in prose."""
    repository = Path(__file__).resolve().parents[2]

    def text(name: str) -> str:
        return " ".join((repository / name).read_text(encoding="utf-8").split())

    readme, photographs, results = (
        text(name) for name in ("README.md", "docs/reports/photographs.md", "docs/reports/results.md")
    )
    card = json.loads((repository / "weights/vild-photo/card.json").read_text(encoding="utf-8"))
    ap50 = f"{100 * card['metrics']['box AP50, 80 words']:.1f}"
    assert f"AP50 is {ap50}" in readme
    assert re.search(rf"shipped \| {ap50} \|", photographs)
    right, shown = re.findall(r"(\d+)% of the", card["text"])
    assert f"{right} of 100 shown boxes are right and {shown} of 100 objects are shown" in readme
    stickers = json.loads((repository / "weights/vild-sticker/card.json").read_text(encoding="utf-8"))
    base, novel = (f"{100 * stickers['metrics'][f'box AP50, {group}']:.1f}" for group in ("base", "novel"))
    assert re.search(rf"shipped \| [\d.]+ \| {base} \| {novel} \|", results)


def test_add__several_at_once_are_all_listed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    names = [f"mine-{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: add_weights(source, name, tmp_path / "weights"), names))
    assert sorted(read_manifest(tmp_path / "weights")) == sorted(names)


def test_add__folders_under_one_name_at_once_leave_a_whole_entry(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"source{number}").mkdir()
        (tmp_path / f"source{number}/model.safetensors").write_bytes(b"weights" * number)
        (tmp_path / f"source{number}/only-{number}.json").write_text("{}")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: add_weights(tmp_path / f"source{number}", "mine", tmp_path / "weights"), range(6)))
    entry = read_manifest(tmp_path / "weights")["mine"]
    assert problems(entry) == [] and len(entry.files) == 2
