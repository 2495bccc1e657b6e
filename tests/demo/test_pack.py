# SPDX-License-Identifier: Apache-2.0
"""Answers of many pictures as one zip of labels."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ovd.demo.pack import MOST_PICTURES, pack
from ovd.formats.names import FORMATS
from pretrain.data.coco import check_ground_truth
from pretrain.engine.errors import UserError

BOXES = [
    {"name": "red", "score": 0.9, "box": [10, 20, 50, 70], "polygons": [[10, 20, 50, 20, 50, 70]]},
    {"name": "blue", "score": 0.4, "box": [80, 30, 150, 110], "polygons": []},
]
FOUND = [
    {"name": "good.png", "size": [160, 120], "boxes": BOXES},
    {"name": "../../good.png", "size": [160, 120], "boxes": []},
    {"name": "C:\\photos\\.hidden.jpg", "size": [300, 200], "boxes": BOXES[1:]},
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "uploads").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


@pytest.mark.parametrize("form", FORMATS)
def test_pack__every_format_and_no_leftover_files(form: str, folder: Path) -> None:
    data = pack(FOUND, form)
    archive = zipfile.ZipFile(io.BytesIO(data))
    text = "".join(archive.read(name).decode() for name in archive.namelist())
    assert "red" in text and "blue" in text
    assert all(not name.startswith(("/", "..")) and ".." not in name for name in archive.namelist())
    assert list(folder.iterdir()) == [] and pack(FOUND, form) == data


def test_pack__coco_boxes_and_unique_file_names(tmp_path: Path) -> None:
    zipfile.ZipFile(io.BytesIO(pack(FOUND, "coco"))).extractall(tmp_path / "out")
    content = json.loads(next((tmp_path / "out").rglob("*.json")).read_text())
    assert [Path(i["file_name"]).name for i in content["images"]] == ["good.png", "good_2.png", "hidden.jpg"]
    assert [a["bbox"] for a in content["annotations"]][:2] == [[10, 20, 40, 50], [80, 30, 70, 80]]
    assert sorted(check_ground_truth(content).categories.values()) == ["blue", "red"]


def test_pack__labelme_finds_the_pictures_where_the_zip_is_opened() -> None:
    archive = zipfile.ZipFile(io.BytesIO(pack(FOUND, "labelme")))
    named = {name: json.loads(archive.read(name))["imagePath"] for name in archive.namelist()}
    assert named == {"good.json": "good.png", "good_2.json": "good_2.png", "hidden.json": "hidden.jpg"}


def test_pack__pictures_without_boxes() -> None:
    assert zipfile.ZipFile(io.BytesIO(pack(FOUND[1:2], "csv"))).namelist()


@pytest.mark.parametrize("form", ["yolo", "voc", "labelme"])
@pytest.mark.parametrize("name", ["長" * 150 + ".jpg", "a." + "x" * 250, "..", ".jpg"])
def test_pack__names_of_any_length(name: str, form: str) -> None:
    one = {"name": name, "size": [99, 99], "boxes": BOXES}
    names = zipfile.ZipFile(io.BytesIO(pack([one, one], form))).namelist()
    assert len({n for n in names if n.endswith((".txt", ".xml", ".json"))}) >= 2
    assert all(len(part.encode()) <= 255 for n in names for part in n.split("/"))


@pytest.mark.parametrize(
    ("found", "form", "message"),
    [
        (FOUND, "yolov8", "no format 'yolov8'"),
        (FOUND, None, "no format"),
        (FOUND, ["yolo"], "no format"),
        ("text", "yolo", "must be a list"),
        ([], "yolo", "0 pictures"),
        (FOUND * MOST_PICTURES, "yolo", "pictures; 1 to"),
        ([{"name": "a.png", "size": [1], "boxes": []}], "yolo", "size of a.png: expected 2 numbers"),
        ([{"name": "a.png", "size": [9, float("nan")], "boxes": []}], "yolo", "size of a.png"),
        ([{"name": "a.png", "size": [0, 9], "boxes": []}], "voc", "size of a.png: expected 2 numbers above 0"),
        ([{"name": "a.png", "size": [9, 9], "boxes": {}}], "yolo", "boxes must be a list"),
        ([{"name": "a.png", "size": [9, 9], "boxes": [{"name": "x", "score": 1, "box": [0, 0, 1]}]}], "yolo", "box of"),
        ([{"name": "a.png", "size": [9, 9], "boxes": [{"score": 1, "box": [0, 0, 1, 1]}]}], "yolo", "needs a name"),
        ([{"name": "a.png", "size": [99, 99], "boxes": [BOXES[0] | {"polygons": "x"}]}], "yolo-seg", "segmentation"),
    ],
)
def test_pack__invalid_input_is_reported(found: Any, form: Any, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        pack(found, form)
    assert list(folder.iterdir()) == []
