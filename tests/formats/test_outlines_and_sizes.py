# SPDX-License-Identifier: Apache-2.0
"""What a data set says beside its pictures: objects without outlines, sizes that are not the pictures', gaps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd.convert import main
from ovd.formats.read import read_labels
from ovd.picture_files import PictureFiles
from pretrain.engine.errors import UserError


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three pictures of 80 × 60 in images/, with a box each; the last has an outline."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for n in range(3):
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(folder / f"images/{n}.png")
        content["images"].append({"id": n, "file_name": f"{n}.png", "width": 80, "height": 60})
        box = {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [20, 15, 40, 30], "area": 1200, "iscrowd": 0}
        content["annotations"].append(box)
    content["annotations"][2]["segmentation"] = [[20, 15, 60, 15, 40, 45]]
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def changed(coco: Path, **entry: object) -> Path:
    """The first picture's entry with other values."""
    content = json.loads(coco.read_text())
    content["images"][0] |= entry
    coco.write_text(json.dumps(content))
    return coco


def test_yolo_seg__files_contain_outlines_only(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(coco), "--to", "yolo-seg", "--out", str(tmp_path / "out")]) == 0
    assert "2 of 3 objects have no outline: yolo-seg has the corners of their boxes" in capsys.readouterr().err
    lines = [(tmp_path / f"out/labels/{n}.txt").read_text().split() for n in range(3)]
    assert [float(value) for value in lines[0][1:]] == [0.25, 0.25, 0.75, 0.25, 0.75, 0.75, 0.25, 0.75]
    assert lines[1] == lines[0] and len(lines[2]) == 7
    boxes = [one["bbox"] for one in read_labels(tmp_path / "out").content["annotations"]]
    assert np.allclose(boxes, [[20, 15, 40, 30]] * 3, atol=0.01)
    assert main([str(coco), "--to", "yolo", "--out", str(tmp_path / "boxes")]) == 0
    assert "no outline" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "damage", "said"),
    [
        ({"width": 800}, None, "1 of 3 pictures are not of the size .*first: .*0.png: 80 × 60 pixels upright, not 800"),
        ({}, b"no picture", "1 of 3 pictures cannot be read .first: .*0.png"),
        ({}, None, "^$"),
    ],
)
def test_read__pictures_that_do_not_fit_their_labels_are_reported(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: dict[str, int], damage: bytes | None,
    said: str,
) -> None:  # fmt: skip
    if damage:
        (coco.parent / "images/0.png").write_bytes(damage)
    assert main([str(changed(coco, **entry)), "--to", "yolo", "--out", str(tmp_path / "out")]) == 0
    assert re.search(said, capsys.readouterr().err.strip())


def test_read__finds_the_folder_of_pictures_though_the_first_is_missing(coco: Path, tmp_path: Path) -> None:
    (coco.parent / "images/0.png").unlink()
    (coco.parent / "2.png").write_bytes(b"")  # another file of that name beside the labels
    assert read_labels(coco).root == coco.parent / "images"
    with pytest.raises(UserError, match="1 of 3 pictures are not there .first: .*images/0.png"):
        main([str(coco), "--to", "yolo", "--out", str(tmp_path / "out")])
    assert main([str(coco), "--to", "yolo", "--out", str(tmp_path / "out"), "--pictures", "none"]) == 0


def test_write__results_do_not_go_into_the_folder_of_pictures(coco: Path) -> None:
    with pytest.raises(UserError, match="--out .*images: is the folder of the pictures; give another"):
        PictureFiles.collect([coco.parent / "images"], without=coco.parent / "images")
    assert len(PictureFiles.collect([coco.parent / "images"], without=coco.parent / "images/found")) == 3
