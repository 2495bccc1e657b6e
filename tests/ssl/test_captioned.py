# SPDX-License-Identifier: Apache-2.0
"""Captioned photos for CLIP: tables, COCO's captions, shards; squares and captions drawn; mistakes and their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain import train
from pretrain.config import CaptionedShards, CaptionTable, CocoCaptions, PretrainConfig
from pretrain.data.image_text import CaptionedFiles, CaptionedSource, build_captioned
from pretrain.engine.config import load_config
from pretrain.engine.errors import BadImageError, ConfigError, UserError
from pretrain.nets.encoders import load_encoder
from tests.ssl.test_image_sets import encoded, shard


def gradient(path: Path, width: int, height: int) -> Path:
    """Red tells the column, green the row."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height), indexing="xy")
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("wide.png", (96, 32)), ("tall.png", (32, 96)), ("small.png", (8, 8))):
        gradient(folder / name, *size)
    return folder


def table(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("image", "caption")) -> CaptionTable:
    mark = "\t" if path.suffix == ".tsv" else ","
    path.write_text("\n".join(mark.join(row) for row in (header, *rows)) + "\n", encoding="utf-8")
    return CaptionTable(kind="caption_table", path=path)


# --- three ways to name captions


def test_caption_table__rows_are_pictures_and_several_of_one_are_its_captions(photos: Path) -> None:
    rows = [("wide.png", '"a dog, running"'), ("small.png", "a cup"), ("wide.png", "a beagle")]
    found = build_captioned(table(photos / "pairs.csv", rows))
    assert [list(found.captions(i)) for i in range(len(found))] == [["a dog, running", "a beagle"], ["a cup"]]
    assert found.image(0).shape == (32, 96, 3)
    quoted = table(
        photos / "pairs.tsv", [("wide.png", '"wow" a cat'), ("tall.png", '"never closed'), ("small.png", "x")]
    )
    assert build_captioned(quoted).captions(1) == ['"never closed'] and len(build_captioned(quoted)) == 3
    other = table(photos.parent / "pairs.tsv", [("small.png", 'a "cup", blue')], ("filepath", "title"))
    named = other.model_copy(update={"root": photos, "image": "filepath", "caption": "title"})
    assert list(build_captioned(named).captions(0)) == ['a "cup", blue']


def test_coco_captions__are_read(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = photos.parent / "captions.json"
    content = {
        "images": [{"id": 7, "file_name": "tall.png"}, {"id": 3, "file_name": "nothing.png"}],
        "annotations": [{"image_id": 7, "caption": " a tower \n"}, {"image_id": 7, "caption": "a chimney"}],
    }
    path.write_text(json.dumps(content))
    found = build_captioned(CocoCaptions(kind="coco_captions", images=photos, annotations=path))
    assert len(found) == 1 and list(found.captions(0)) == ["a tower", "a chimney"]
    assert found.image(0).shape == (96, 32, 3)
    assert "1 of 2 pictures have no caption and are left out" in capsys.readouterr().err


def test_caption_shards__give_pictures_that_have_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path / "p-0.tar", {"a.png": encoded(1), "a.txt": "ein Hündchen\n".encode(), "b.png": encoded(2)})
    shard(tmp_path / "p-1.tar", {"c.txt": b"", "c.png": encoded(3), "d.png": encoded(9), "d.txt": b"last"})
    for _ in range(2):  # the second time from the index files
        found = build_captioned(CaptionedShards(kind="captioned_shards", pattern=str(tmp_path / "p-{0..1}.tar")))
        assert [list(found.captions(i)) for i in (0, 1)] == [["ein Hündchen"], ["last"]]
        assert len(found) == 2 and int(found.image(1)[0, 0, 0]) == 9
        assert "2 of 4 pictures have no caption and are left out" in capsys.readouterr().err
    odd = {"a.png": encoded(1), "a.txt": "Café".encode("latin-1"), "b.png": encoded(2), "b.txt": b"\xef\xbb\xbfa mug"}
    written = build_captioned(CaptionedShards(kind="captioned_shards", pattern=str(shard(tmp_path / "r.tar", odd))))
    with pytest.raises(BadImageError, match=r"r\.tar/a\.png: has a caption that is not UTF-8 \(byte 3\)"):
        written.captions(0)
    assert written.captions(1) == ["a mug"]  # without the mark at its beginning that Windows writes
    empty = shard(tmp_path / "q.tar", {"a.png": encoded(1), "a.txt": b"  \n"})
    blank = build_captioned(CaptionedShards(kind="captioned_shards", pattern=str(empty)))
    with pytest.raises(BadImageError, match=r"q\.tar/a\.png: has an empty caption"):
        blank.captions(0)


# --- what a sample is


def test_caption_sample__is_a_random_square_of_the_short_side_and_one_caption(photos: Path) -> None:
    images = CaptionedFiles([photos / "wide.png", photos / "tall.png"], [["a", "b", "c"], ["d"]])
    source = CaptionedSource(images, size=16, seed=0)
    drawn = [source.sample(0, draw) for draw in range(40)]
    for pixels, _, index in drawn:
        assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8 and index == 0
        assert int(pixels[1].max()) - int(pixels[1].min()) > 220, "all rows"
        assert 60 < int(pixels[0].max()) - int(pixels[0].min()) < 90, "a third of the columns"
    lefts = [int(pixels[0].min()) for pixels, _, _ in drawn]
    assert min(lefts) < 20 and max(lefts) > 150, "from one end to the other"
    assert {text for _, text, _ in drawn} == {"a", "b", "c"}
    tall = source.sample(1, 0)
    assert int(tall[0][0].max()) - int(tall[0][0].min()) > 220 and tall[1] == "d"


def test_caption_sample__repeats_by_seed_index_and_draw(photos: Path) -> None:
    images = CaptionedFiles([photos / "wide.png"], [["a", "b", "c"]])
    once, again, other = (CaptionedSource(images, size=16, seed=seed) for seed in (0, 0, 1))
    same = [np.array_equal(once.sample(0, d)[0], again.sample(0, d)[0]) for d in range(8)]
    assert all(same) and [once.sample(0, d)[1] for d in range(8)] == [again.sample(0, d)[1] for d in range(8)]
    assert not all(np.array_equal(once.sample(0, d)[0], other.sample(0, d)[0]) for d in range(8))


# --- mistakes


def test_caption_table__mistakes_are_named_with_the_line_or_the_column(photos: Path, tmp_path: Path) -> None:
    def build(rows: list[tuple[str, str]], **header: Any) -> None:
        build_captioned(table(photos / "pairs.csv", rows, **header))

    with pytest.raises(UserError, match=r"no column 'caption', but 'image', 'text'; name the columns .*data\.caption"):
        build([("wide.png", "a dog")], header=("image", "text"))
    with pytest.raises(UserError, match=r"pairs\.csv, line 3: a row needs a path and a caption"):
        build([("wide.png", "a dog"), ("tall.png", "")])
    with pytest.raises(UserError, match=r"1 of its 1 pictures are not there, such as .*/gone\.png; is .* the folder"):
        build([("gone.png", "a dog")])
    with pytest.raises(UserError, match="a header and no rows"):
        build([])
    with pytest.raises(UserError, match=r"data\.path .*none\.csv does not exist"):
        build_captioned(CaptionTable(kind="caption_table", path=tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"pairs\.csv, line 2: more fields .* stands in double quotes"):
        build([("wide.png", "a cat, asleep on a mat")])
    (photos / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is empty; it needs a header"):
        build_captioned(CaptionTable(kind="caption_table", path=photos / "empty.csv"))
    swapped = table(photos / "pairs.csv", [("wide.png", "a dog " * 60)])
    with pytest.raises(UserError, match=r"column 'caption' \(data\.image\): 1 of its 1 pictures are not there"):
        build_captioned(swapped.model_copy(update={"image": "caption", "caption": "image"}))
    (tmp_path / "bytes.csv").write_bytes(b"image,caption\n\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a table in UTF-8"):
        build_captioned(CaptionTable(kind="caption_table", path=tmp_path / "bytes.csv"))


def test_caption_files__other_json_and_other_folders_are_named(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"

    def build(content: Any) -> None:
        path.write_text(json.dumps(content))
        build_captioned(CocoCaptions(kind="coco_captions", images=photos, annotations=path))

    images = [{"id": 1, "file_name": "gone.png"}]
    with pytest.raises(UserError, match=r"annotations\[0\]: no caption; data\.annotations is captions_train2017\.json"):
        build({"images": images, "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]})
    with pytest.raises(UserError, match=r"annotations\[0\]: caption is not a string"):
        build({"images": images, "annotations": [{"image_id": 1, "caption": None}]})
    with pytest.raises(UserError, match=r"annotations\[0\]: image_id '1' is written as a string; .* has 1"):
        build({"images": images, "annotations": [{"image_id": "1", "caption": "a dog"}]})
    with pytest.raises(UserError, match=r"images\[1\]: image id 1 occurs twice"):
        build({"images": images * 2, "annotations": []})
    with pytest.raises(UserError, match="expected an object with images, annotations; found a list"):
        build(images)
    with pytest.raises(UserError, match="has no captions"):
        build({"images": images, "annotations": []})
    with pytest.raises(UserError, match=r"instances\.json: 1 of its 1 pictures are not there, such as .*/gone\.png"):
        build({"images": images, "annotations": [{"image_id": 1, "caption": "a dog"}]})
    with pytest.raises(UserError, match=r"none of 1 pictures has a caption \(KEY\.txt"):
        build_captioned(
            CaptionedShards(kind="captioned_shards", pattern=str(shard(tmp_path / "x.tar", {"a.png": encoded(1)})))
        )


def test_captions__of_a_table_name_no_nouns_to_compare() -> None:
    with pytest.raises(
        ConfigError, match=r"nothing says which captions of caption_table name the same; set it to false"
    ):
        load_config(PretrainConfig, "pretrain/clip_start.yaml", ["data={kind: caption_table, path: x.csv}"])


# --- the whole way


def test_clip__the_papers_configuration_learns_from_photos_with_captions(photos: Path, tmp_path: Path) -> None:
    """The recipe of configs/paper with towers of a few channels: watched, trained in pieces, exported."""
    pairs = table(photos / "pairs.csv", [(f"{n}.png", f"a {n} thing") for n in ("wide", "tall", "small")])
    small = [
        "method.encoder.embed_dim=8", "method.encoder.image.width=32", "method.encoder.image.layers=1",
        "method.encoder.image.heads=2", "method.encoder.image.image_size=32", "method.encoder.text.width=16",
        "method.encoder.text.layers=1", "method.encoder.text.heads=2", "method.chunk=2",
    ]  # fmt: skip
    loop = ["loop.steps=3", "loop.batch_size=3", "loop.workers=0", "loop.log_every=1", "optim.warmup_steps=1"]
    data = [f"data={{kind: caption_table, path: {pairs.path}}}", f"out={tmp_path / 'run'}"]
    assert train.main(["--config", "paper/clip.yaml", *small, *loop, *data]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {"health/rank", "health/spread", "health/cosine", "health/caption_margin", "logit_scale"} <= set(lines[-1])
    assert load_encoder(tmp_path / "run" / "exported").image_size == 32
    with pytest.raises(UserError, match="4 is more than the 3 pictures of data, so that a picture would be its own"):
        train.main(["--config", "paper/clip.yaml", *small, *loop, *data, "loop.batch_size=4", "--overwrite"])
