# SPDX-License-Identifier: Apache-2.0
"""The training pictures and the evaluation must mean the same by a category id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovd.data.catalog import CocoImages
from ovd.data.splits import Split
from pretrain.engine.errors import UserError


def write(folder: Path, names: dict[int, str]) -> Path:
    annotations = [
        {"id": n, "image_id": 1, "category_id": i, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
        for n, i in enumerate(names, start=1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 20, "height": 20}],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in names.items()],
    }
    (folder / "1.png").touch()
    path = folder / "gt.json"
    path.write_text(json.dumps(content))
    return path


def test_training_split__ids_with_other_names_are_refused(tmp_path: Path) -> None:
    cells = write(tmp_path, {1: "white cell", 2: "red cell"})
    split = Split(name="pets", base=(1,), novel=(2,), names={1: "cat", 2: "dog"})
    with pytest.raises(UserError, match="1 is 'cat' in the split but 'white cell' there"):
        CocoImages(images=tmp_path, annotations=cells, split=split, labels="base")


def test_training_split__names_and_novel_follow_its_ids(tmp_path: Path) -> None:
    path = write(tmp_path, {9: "dog", 4: "cat", 7: "cow"})
    split = Split(name="pets", base=(9,), novel=(4,), names={9: "dog", 4: "cat"})
    images = CocoImages(images=tmp_path, annotations=path, split=split, labels="all")
    assert images.names == ("cat", "dog")
    assert images.novel == {0}
