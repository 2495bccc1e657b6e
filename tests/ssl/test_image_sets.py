# SPDX-License-Identifier: Apache-2.0
"""Pictures from folders, CIFAR-10, tar shards and Sticker Scenes, and what is said when they are not there."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from pretrain.config_views import (
    CifarData,
    FolderData,
    ImagesConfig,
    ShardData,
    StickerScenes,
    StickerSingles,
    ViewConfig,
)
from pretrain.data.crops import ViewSource
from pretrain.data.images import CIFAR_RECORD, build_images
from pretrain.data.pairs import StickerCrops
from pretrain.data.scenes import SceneSource
from pretrain.data.shards import MAX_PADDING, ShardSet, expand_braces
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.sampling import Microbatches


def encoded(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 255 - value)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- folders ---------------------------------------------------------------------------------------------------------


def test_image_folder__is_searched_to_any_depth_in_the_order_of_the_paths(tmp_path: Path) -> None:
    for name, value in (("b/deep/2.PNG", 20), ("a.png", 10), ("c/3.jpeg", 30)):
        write(tmp_path / name, encoded(value, "JPEG" if "jpeg" in name else "PNG"))
    write(tmp_path / "notes.txt", b"no picture")
    images = build_images(FolderData(root=tmp_path))
    assert len(images) == 3
    assert [abs(int(images.image(i)[0, 0, 0]) - v) < 3 for i, v in enumerate((10, 20, 30))] == [True] * 3
    assert images.image(0).shape == (8, 12, 3) and images.image(0).dtype == np.uint8
    assert [images.label(i) for i in range(3)] == [-1] * 3


def test_image_folder__in_imagenets_layout_the_first_folder_is_the_class(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ant/x/2.png", "ant/1.png"):
        write(tmp_path / name, encoded(5))
    images: Any = build_images(FolderData(root=tmp_path, classes=True))
    assert images.classes == ("ant", "zebra")
    assert [images.label(i) for i in range(3)] == [0, 0, 1]
    write(tmp_path / "loose.png", encoded(5))
    with pytest.raises(UserError, match=r"loose\.png is in no class folder.*classes: false"):
        build_images(FolderData(root=tmp_path, classes=True))


def test_image_folder__an_empty_or_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no picture"):
        build_images(FolderData(root=tmp_path))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build_images(FolderData(root=tmp_path / "nowhere"))


def test_image_folder__an_unreadable_file_is_named_and_its_neighbour_used(tmp_path: Path) -> None:
    write(tmp_path / "0.png", b"not a picture")
    write(tmp_path / "1.png", encoded(50))
    images = build_images(FolderData(root=tmp_path))
    with pytest.raises(BadImageError) as caught:
        images.image(0)
    assert caught.value.path == tmp_path / "0.png"
    source = ViewSource(images, [ViewConfig(size=8)], 0)
    fetched = Microbatches(source, seed=0, batch_size=2, accumulate=1, rank=0, world_size=1)[0]
    assert fetched.batch["index"].tolist() == [1, 1]
    assert [(index, Path(path).name) for index, path, _ in fetched.bad] == [(0, "0.png")]


# --- CIFAR -----------------------------------------------------------------------------------------------------------


def cifar(folder: Path, per_file: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6 * per_file, CIFAR_RECORD), dtype=np.uint8)
    rows[:, 0] %= 10
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write(folder / f"{name}.bin", rows[k * per_file : (k + 1) * per_file].tobytes())
    return rows


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar__the_binary_version_is_read_plane_by_plane(tmp_path: Path, inside: str) -> None:
    rows = cifar(tmp_path / inside)
    train, test = (build_images(CifarData(kind="cifar", root=tmp_path, split=s)) for s in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (15, 3)
    assert train.label(7) == rows[7, 0] and test.label(2) == rows[17, 0]
    picture = train.image(7)
    assert picture.shape == (32, 32, 3)
    assert picture[3, 5].tolist() == [rows[7, 1 + plane * 1024 + 3 * 32 + 5] for plane in range(3)]


def test_cifar__pickles_are_not_read_and_the_binary_version_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-py" / "data_batch_1", b"\x80\x04].")
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(UserError, match=r"pickle.*cifar-10-binary\.tar\.gz"):
            build_images(CifarData(kind="cifar", root=root))


def test_cifar__missing_cut_off_and_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_batch_1\.bin is missing"):
        build_images(CifarData(kind="cifar", root=tmp_path))
    cifar(tmp_path)
    write(tmp_path / "data_batch_3.bin", b"x" * 5000)
    with pytest.raises(UserError, match=r"data_batch_3\.bin has 5000 bytes"):
        build_images(CifarData(kind="cifar", root=tmp_path))
    write(tmp_path / "data_batch_3.bin", bytes([77]) * CIFAR_RECORD)
    with pytest.raises(UserError, match="labels above 9"):
        build_images(CifarData(kind="cifar", root=tmp_path))


# --- shards ----------------------------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> str:
    shard(tmp_path / "s-00.tar", {"a.png": encoded(1), "a.cls": b"4", "b.png": encoded(2), "b.json": b"{}"})
    shard(tmp_path / "s-01.tar", {"d/c.cls": b"9\n", "d/c.png": encoded(3), "d/c.txt": b"a caption"})
    return str(tmp_path / "s-{00..01}.tar")


def test_shards__hold_pictures_with_the_class_of_the_same_key(shards: str) -> None:
    images = build_images(ShardData(kind="shards", pattern=shards))
    assert [int(images.image(i)[0, 0, 0]) for i in range(len(images))] == [1, 2, 3]
    assert [images.label(i) for i in range(3)] == [4, -1, 9]
    wild = build_images(ShardData(kind="shards", pattern=shards.replace("{00..01}", "*")))
    assert len(wild) == 3


def test_shard_index__is_made_once_and_again_when_the_shard_changes(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ShardSet(shards)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", never)
        again = ShardSet(shards)
    assert [again.label(i) for i in range(3)] == [4, -1, 9] and int(again.image(2)[0, 0, 0]) == 3
    path = shard(tmp_path / "s-00.tar", {"new.png": encoded(200)})
    os.utime(path, ns=(1, 1))
    changed = ShardSet(shards)
    assert len(changed) == 2 and int(changed.image(0)[0, 0, 0]) == 200
    (tmp_path / "s-00.tar.index.json").write_text("[]", encoding="utf-8")
    assert len(ShardSet(shards)) == 2


def test_shard_index__a_read_only_folder_needs_none(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(ShardSet(shards)) == 3
    assert not list(tmp_path.glob("*.json"))


def test_shards__a_damaged_member_is_named_with_its_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"ok.png": encoded(1), "bad.png": b"nothing"})
    images = ShardSet(str(path))
    with pytest.raises(BadImageError) as caught:
        images.image(1)
    assert caught.value.path == path / "bad.png"
    assert "ok" not in str(caught.value)


def test_shards__missing_compressed_empty_or_wrongly_labelled_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s-1\.tar does not exist"):
        ShardSet(str(tmp_path / "s-{1..2}.tar"))
    with pytest.raises(UserError, match="matches no file"):
        ShardSet(str(tmp_path / "*.tar"))
    plain = shard(tmp_path / "x.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match="no picture"):
        ShardSet(str(plain))
    write(tmp_path / "x.tar.gz", gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match=r"x\.tar\.gz cannot be read as an uncompressed tar"):
        ShardSet(str(tmp_path / "x.tar.gz"))
    named = shard(tmp_path / "y.tar", {"a.png": encoded(1), "a.cls": b"dog"})
    with pytest.raises(UserError, match=r"a\.cls holds b'dog'"):
        ShardSet(str(named))


def test_shards__further_pictures_of_a_sample_and_hidden_files_are_no_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {
        "a.png": encoded(1),
        "a.mask.png": encoded(9),
        "._a.png": b"Mac OS",
        "b.x.png": encoded(2),
        "c.txt": b"c",
    }
    shard(tmp_path / "s.tar", members)
    for _ in range(2):  # from the shard, and from its index
        images = ShardSet(str(tmp_path / "s.tar"))
        assert [images.name(i).rpartition("/")[2] for i in range(len(images))] == ["a.png", "b.x.png"]
        message = capsys.readouterr().err
        assert "1 further pictures of a sample are left out, such as" in message and "a.mask.png" in message
        assert "1 captions have no picture, such as" in message and "c.txt" in message


def test_shards__a_file_that_is_there_twice_counts_once_as_tar_unpacks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path / "s.tar", {"a.png": encoded(1), "a.cls": b"4"})
    with tarfile.open(path, "a") as tar:
        for name, content in (("a.png", encoded(200)), ("a.cls", b"5")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = ShardSet(str(path))
    assert len(images) == 1 and images.label(0) == 5 and images.image(0).flat[0] == 200
    assert "2 files are there twice, and the later one counts, such as" in capsys.readouterr().err


def test_shards__those_that_go_on_after_their_end_are_refused(tmp_path: Path) -> None:
    one, other = shard(tmp_path / "a.tar", {"a.png": encoded(1)}), shard(tmp_path / "b.tar", {"b.png": encoded(2)})
    joined, half, padded = (tmp_path / name for name in ("joined.tar", "half.tar", "padded.tar"))
    joined.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match=r"joined\.tar: goes on after its end"):
        ShardSet(str(joined))
    half.write_bytes(one.read_bytes() + bytes(2 * MAX_PADDING))
    with pytest.raises(UserError, match=r"half\.tar: ends in .* bytes of zeros"):
        ShardSet(str(half))
    padded.write_bytes(one.read_bytes() + bytes(MAX_PADDING // 2))
    assert len(ShardSet(str(padded))) == 1


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ],
)
def test_shard_pattern__braces_are_expanded_as_a_shell_does(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{0..99999999}.tar"])
def test_shard_pattern__senseless_ranges_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="must run upwards"):
        expand_braces(pattern)


# --- stickers --------------------------------------------------------------------------------------------------------


def test_scenes__are_pictures_without_labels() -> None:
    images = build_images(StickerScenes(kind="sticker_scenes", length=5, size=96, seed=3))
    assert len(images) == 5 and images.label(2) == -1
    expected = SceneSource(Stickers.load(), split="train", seed=3, size=96, length=5).scene(2).image
    assert np.array_equal(images.image(2), expected)


def test_singles__are_every_drawing_of_the_splits_styles_with_its_class() -> None:
    stickers = Stickers.load()
    train: Any = build_images(StickerSingles(kind="sticker_singles", size=32))
    held_out: Any = build_images(StickerSingles(kind="sticker_singles", split="val", size=32))
    drawings = {style: sum(len(codes) for codes in found.values()) for style, found in stickers.drawings.items()}
    assert len(train) == sum(drawings[style] for style in stickers.styles["train"])
    assert len(held_out) == sum(drawings[style] for style in stickers.styles["val"])
    assert not set(stickers.styles["train"]) & set(stickers.styles["val"])
    names = {train.label(i) for i in range(len(train))}
    assert {held_out.label(i) for i in range(len(held_out))} <= names <= set(range(len(stickers.nouns)))
    assert train.image(700).shape == (32, 32, 3)
    assert np.array_equal(train.image(700), train.image(700))


def test_singles__held_out_ones_are_those_of_the_zero_shot_test() -> None:
    crops = StickerCrops(Stickers.load(), size=32)
    held_out = build_images(StickerSingles(kind="sticker_singles", split="val", size=32))
    for index in (0, 99):
        picture, _, label = crops.sample(index)
        assert np.array_equal(held_out.image(index), picture.transpose(1, 2, 0)) and held_out.label(index) == label


def test_singles__training_photos_vary_by_style() -> None:
    stickers = Stickers.load()
    train: Any = build_images(StickerSingles(kind="sticker_singles", size=32))
    assert {path.parent.name for style in train._styles for path in style.backgrounds.paths} == {"train"}
    corners = []  # the sticker fills at most 95 %, so a corner shows the photo
    for style in range(len(stickers.styles["train"])):
        first = 0 if style == 0 else int(train._ends[style - 1])
        corners.append(np.concatenate([train.image(first)[0, 0], train.image(first)[-1, -1]]).tolist())
    assert len({tuple(corner) for corner in corners}) == len(corners)


def test_image_set__the_kind_of_a_section_chooses_it() -> None:
    found: Any = TypeAdapter(ImagesConfig).validate_python({"kind": "sticker_singles", "split": "val"})
    assert isinstance(found, StickerSingles)
