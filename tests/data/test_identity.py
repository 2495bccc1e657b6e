# SPDX-License-Identifier: Apache-2.0
"""Every kind of data says when a picture, a label or a caption is another one."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd.config import DataConfig
from ovd.data import photo_words
from ovd.data.boxes import BoxedImages
from ovd.training.inputs import labelled_images
from pretrain.config import CaptionTable, CocoCaptions
from pretrain.config_photos import PhotoWords
from pretrain.config_views import FolderData, ShardData, ViewConfig
from pretrain.data.crops import ViewSource
from pretrain.data.image_text import CaptionedSource, build_captioned
from pretrain.data.images import build_images
from pretrain.data.lexicon import read_lexicon
from pretrain.data.photos import PhotoWordSource, read_photo_words
from pretrain.data.stickers import Stickers, data_root
from pretrain.engine.identity import identity_of


def put_picture(path: Path, value: int) -> None:
    Image.fromarray(np.full((40, 50, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in (1, 2):
        put_picture(tmp_path / f"{number}.png", number)
    truth: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 50, "height": 40} for n in (1, 2)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
            for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(truth))
    captions = [{"id": n, "image_id": n, "caption": f"a cat {n}"} for n in (1, 2)]
    (tmp_path / "captions.json").write_text(json.dumps(truth | {"annotations": captions}))
    (tmp_path / "table.csv").write_text("filepath,title\n1.png,a cat 1\n2.png,a cat 2\n")
    pack(tmp_path)
    return tmp_path


def pack(root: Path) -> None:
    with tarfile.open(root / "0.tar", "w") as shard:
        for number in (1, 2):
            shard.add(root / f"{number}.png", f"{number}.png")


def folder(root: Path) -> object:
    return ViewSource(build_images(FolderData(kind="folder", root=root)), [ViewConfig(size=8)], 0)


def shards(root: Path) -> object:
    return build_images(ShardData(kind="shards", pattern=str(root / "0.tar")))


def table(root: Path) -> object:
    config = CaptionTable(kind="caption_table", path=root / "table.csv", image="filepath", caption="title")
    return CaptionedSource(build_captioned(config), size=8, seed=0)


def coco_captions(root: Path) -> object:
    return CaptionedSource(
        build_captioned(CocoCaptions(kind="coco_captions", images=root, annotations=root / "captions.json")),
        size=8,
        seed=0,
    )


def labelled(root: Path) -> object:
    data = DataConfig(kind="coco", labels="all", images=str(root), annotations=str(root / "boxes.json"), split="all")
    return labelled_images(data)


def labelled_in_text(root: Path) -> object:
    if not (root / "set").is_dir():
        (root / "set").mkdir()
        for number in (1, 2):
            (root / f"set/{number}.png").symlink_to(root / f"{number}.png")
            (root / f"set/{number}.txt").write_text("0 .3 .3 .4 .5\n")
        (root / "set/data.yaml").write_text("train: .\nnames: [cat]\n")
    return labelled_images(DataConfig(kind="yolo", labels="all", annotations=str(root / "set"), split="all"))


def named_boxes(root: Path) -> object:
    return photo_words.PhotoLabels(
        folder=root, annotations=[root / "boxes.json"], labels=None, lexicon=read_lexicon(), part=None, min_score=0.1
    )


def boxed(root: Path) -> object:
    return BoxedImages(folder=root, annotations=[root / "boxes.json"], part=None, confident=0.5, doubtful=0.1)


def change_picture(root: Path) -> None:
    put_picture(root / "2.png", 9)  # of the same length
    pack(root)


def change(file: str, old: str, new: str) -> Callable[[Path], None]:
    def body(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return body


def words(root: Path) -> object:
    config = PhotoWords(kind="photo_words", images=root, annotations=(root / "boxes.json",), part="all")
    return PhotoWordSource(read_photo_words(config), size=8, seed=0, config=config)


CASES = [
    (folder, change_picture, {"pictures"}),
    (shards, change_picture, {"shards"}),
    (table, change_picture, {"pictures"}),
    (table, change("table.csv", "cat 2", "dog 2"), {"captions"}),
    (coco_captions, change("captions.json", "cat 2", "dog 2"), {"captions"}),
    (labelled, change_picture, {"pictures"}),
    (labelled, change("boxes.json", "[5, 5, 20, 20]", "[5, 5, 20, 21]"), {"annotations"}),
    (labelled_in_text, change_picture, {"pictures"}),
    (labelled_in_text, change("set/2.txt", ".4 .5", ".4 .4"), {"annotations"}),
    (labelled_in_text, change("set/data.yaml", "cat", "dog"), {"annotations"}),
    (words, change_picture, {"photos"}),
    (words, change("boxes.json", "[5, 5, 20, 20]", "[5, 5, 20, 21]"), {"words and boxes"}),
    (named_boxes, change_picture, {"photos"}),
    (named_boxes, change("boxes.json", "[5, 5, 20, 20]", "[5, 5, 20, 21]"), {"words and boxes"}),
    (named_boxes, change("boxes.json", '"cat"', '"dog"'), {"words and boxes"}),
    (boxed, change_picture, {"pictures"}),
    (boxed, change("boxes.json", "[5, 5, 20, 20]", "[5, 5, 20, 21]"), {"annotations"}),
]


@pytest.mark.parametrize(("build", "alter", "differing"), CASES)
def test_identity__changed_part_is_named(
    root: Path, build: Callable[[Path], object], alter: Callable[[Path], None], differing: set[str]
) -> None:
    before = identity_of(build(root))
    assert before and before == identity_of(build(root))
    alter(root)
    after = identity_of(build(root))
    assert {name for name in before if before[name] != after[name]} == differing


def test_identity__drawings_are_hashed_by_content() -> None:
    assert identity_of(Stickers.load()).keys() == {"drawings and photos", "tables"}
    assert identity_of(Stickers.load()) != identity_of(Stickers.load(data_root(), extra_styles=True))
