# SPDX-License-Identifier: Apache-2.0
"""The script that makes the data set again from packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from pretrain.data.stickers import data_root
from pretrain.engine.errors import UserError


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "make_stickers.py"
    spec = importlib.util.spec_from_file_location("make_stickers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_split__follows_from_the_shipped_table(script: ModuleType) -> None:
    rows = json.loads((data_root() / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    assert script.make_splits(rows) == json.loads((data_root() / "splits.json").read_text(encoding="utf-8"))


def test_split__does_not_depend_on_table_order(script: ModuleType) -> None:
    rows = json.loads((data_root() / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    assert script.make_splits(rows[::-1])["sha256"] == script.make_splits(rows)["sha256"]


def test_notice__names_the_icon_of_every_vector_drawing(script: ModuleType) -> None:
    icons = json.loads((data_root() / "sources.json").read_text(encoding="utf-8"))["icons"]
    for style, names in icons.items():
        assert set(names) == {path.stem for path in (data_root() / "sprites" / style).iterdir()}


def test_extra_styles__drawings_are_in_the_table(script: ModuleType) -> None:
    styles = json.loads((data_root() / "extra_styles.json").read_text(encoding="utf-8"))["styles"]
    nouns = set(json.loads((data_root() / "splits.json").read_text(encoding="utf-8"))["nouns"])
    assert set(styles) == {*script.EXTRA_PACKAGES, script.CLIPART}
    for style, table in styles.items():
        assert set(table) == {path.stem for path in (data_root() / "sprites" / style).iterdir()}
        assert {entry["noun"] for entry in table.values()} <= nouns


def test_clip_art__missing_one_is_named(script: ModuleType, tmp_path: Path) -> None:
    styles = {"openclipart": {"dog-1": {"noun": "dog", "icon": "animals/dog.svg"}}}
    with pytest.raises(UserError, match=r"animals/dog\.svg is missing"):
        script.build_extra(styles, tmp_path, tmp_path, tmp_path / "out")


def test_icons__alias_is_drawn_as_its_icon(script: ModuleType) -> None:
    icons = {
        "width": 36,
        "height": 30,
        "icons": {"dog": {"body": "<path/>", "height": 40}},
        "aliases": {"puppy": {"parent": "hound"}, "hound": {"parent": "dog"}},
    }
    svg = script.icon_svg(icons, "puppy")
    assert 'viewBox="0 0 36 40"' in svg and "<path/>" in svg


def test_photos__found_at_any_depth_and_reduced(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.new("RGB", (2560, 1000)).save(tmp_path / "in" / "deep" / "sunset.png")
    script.build_photos(tmp_path / "in", [("val", "sunset.jpg")], tmp_path / "out")
    with Image.open(tmp_path / "out" / "backgrounds" / "val" / "sunset.jpg") as image:
        assert image.size == (1280, 500) and image.format == "JPEG"
    with pytest.raises(UserError, match=r"brick\.jpg or brick\.png"):
        script.build_photos(tmp_path / "in", [("train", "skimage_brick.jpg")], tmp_path / "out")


def test_output__non_empty_folder_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    here = str(tmp_path)
    arguments = ["--node-modules", here, "--photos", here, "--clipart", here, "--out", here]
    with pytest.raises(UserError, match="not an empty folder"):
        script.main(arguments)
