# SPDX-License-Identifier: Apache-2.0
"""The concept table, the split, and the scenes and pairs made from them."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data import caption_templates as captions
from pretrain.data import render
from pretrain.data.dice import Dice
from pretrain.data.pairs import PairSource, StickerCrops
from pretrain.data.scenes import Scene, SceneSource
from pretrain.data.stickers import PAIR, Stickers, content_hash, data_root
from pretrain.engine.errors import UserError

FIELDS = ("image", "boxes", "masks", "classes", "visible", "truncated", "distractors")


@pytest.fixture(scope="module")
def stickers() -> Stickers:
    return Stickers.load()


def digest(scene: Scene) -> str:
    parts = [np.ascontiguousarray(getattr(scene, name)).tobytes() for name in FIELDS]
    return hashlib.sha256(b"".join([*parts, scene.caption.encode()])).hexdigest()


def source(stickers: Stickers, **changes) -> SceneSource:
    return SceneSource(stickers, **{"split": "train", "seed": 3, "size": (160, 200), "length": 60, **changes})


# The table and the split


def test_split__every_noun_is_base_or_novel(stickers: Stickers) -> None:
    assert stickers.base.isdisjoint(stickers.novel)
    assert stickers.base | stickers.novel == set(range(len(stickers.nouns)))
    assert list(stickers.nouns) == sorted(set(stickers.nouns))
    assert (len(stickers.nouns), len(stickers.base), len(stickers.novel)) == (552, 441, 111)


def test_split__a_fifth_of_each_supercategory_is_novel(stickers: Stickers) -> None:
    total = Counter(stickers.supercategory)
    novel = Counter(stickers.supercategory[i] for i in stickers.novel)
    for group, count in total.items():
        assert abs(novel[group] - count / 5) < 1, group


def test_split__follows_from_its_rule(stickers: Stickers) -> None:
    members: dict[str, list[str]] = {}
    for index, noun in enumerate(stickers.nouns):
        members.setdefault(stickers.supercategory[index], []).append(noun)
    validated = {stickers.nouns[i] for i in stickers.validated}
    novel = set()
    for group in members.values():
        group.sort(key=lambda noun: (noun not in validated, hashlib.sha256(noun.encode()).hexdigest()))
        novel |= set(group[2::5])
    assert novel == {stickers.nouns[i] for i in stickers.novel}


def test_split__is_that_of_the_shipped_weights(stickers: Stickers) -> None:
    assert stickers.split_hash == "4b139a68c91d52c2a8f248860ffd8e1a49991a280a49a42763568db167ec5e05"


def test_split__changed_file_is_refused(tmp_path: Path) -> None:
    for name in ("splits.json", "concepts.json"):
        shutil.copy(data_root() / name, tmp_path / name)
    split = json.loads((tmp_path / "splits.json").read_text(encoding="utf-8"))
    split["base"], split["novel"] = split["base"][1:], [split["base"][0], *split["novel"]]
    (tmp_path / "splits.json").write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(UserError, match=r"splits\.json was changed"):
        Stickers.load(tmp_path)


def test_split__hash_ignores_key_order() -> None:
    assert content_hash({"a": [1], "b": "ñ"}) == content_hash({"b": "ñ", "a": [1]})
    assert content_hash({"a": [1], "b": "ñ"}) != content_hash({"a": [2], "b": "ñ"})


def test_data_root__missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"splits\.json: no such file; set OVD_DATA"):
        Stickers.load(tmp_path)


def test_data_root__environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVD_DATA", str(tmp_path))
    assert data_root() == tmp_path


def test_validated__nouns_have_a_held_out_drawing(stickers: Stickers) -> None:
    assert set(stickers.drawable("val")) == stickers.validated
    assert set(stickers.drawable("train")) == set(range(len(stickers.nouns)))


def test_splits__styles_and_photos_are_disjoint(stickers: Stickers) -> None:
    assert set(stickers.styles["train"]).isdisjoint(stickers.styles["val"])
    train, val = ({path.name for path in stickers.photos(split)} for split in ("train", "val"))
    assert train.isdisjoint(val) and (len(train), len(val)) == (8, 4)


def test_drawings__match_the_table(stickers: Stickers) -> None:
    for style, drawings in stickers.drawings.items():
        listed = {code for codes in drawings.values() for code in codes} | set(stickers.unlabelled[style])
        assert {path.stem for path in (stickers.root / "sprites" / style).iterdir()} == listed


def test_notice__names_every_style_and_photo(stickers: Stickers) -> None:
    notice = (stickers.root / "NOTICE.md").read_text(encoding="utf-8")
    for style in stickers.drawings:
        assert f"`{style}`" in notice
    for split in ("train", "val"):
        for path in stickers.photos(split):
            assert f"`{split}/{path.name}`" in notice


def test_near_synonyms__groups_are_disjoint(stickers: Stickers) -> None:
    members = [index for group in stickers.near_synonyms for index in group]
    assert len(members) == len(set(members))
    assert all(len(group) > 1 for group in stickers.near_synonyms)
    groups = [{stickers.nouns[i] for i in group} for group in stickers.near_synonyms]
    assert any({"cup", "teacup"} <= group for group in groups)
    assert any({"mouse", "rat"} <= group for group in groups)


# Scenes


def test_scenes__are_a_function_of_split_seed_and_index(stickers: Stickers) -> None:
    first = source(stickers)
    forward = [digest(first.scene(i)) for i in range(6)]
    fresh = source(Stickers.load(), length=7)
    assert [digest(fresh.scene(i)) for i in (5, 4, 3, 2, 1, 0)] == forward[::-1]
    assert len(set(forward)) == 6


@pytest.mark.parametrize("change", [{"split": "val"}, {"seed": 4}, {"size": (168, 200)}])
def test_scenes__depend_on_split_seed_and_size(stickers: Stickers, change: dict) -> None:
    assert digest(source(stickers).scene(0)) != digest(source(stickers, **change).scene(0))


# sha256 over scenes 0..4 (seed 3, 160 x 200), computed when the generator was frozen.
GOLDEN = {"train": "4385dfa0920837dc", "val": "e55f822d2d50e40e"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes__pixels_are_frozen(stickers: Stickers, split: str) -> None:
    scenes = source(stickers, split=split)
    total = hashlib.sha256("".join(digest(scenes.scene(i)) for i in range(5)).encode()).hexdigest()
    assert total[:16] == GOLDEN[split]


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes__boxes_are_the_extent_of_masks(stickers: Stickers, split: str) -> None:
    scenes = source(stickers, split=split)
    for index in range(25):
        scene = scenes.scene(index)
        assert 1 <= len(scene.classes) <= 8
        assert not (scene.masks.sum(0) > 1).any(), "a pixel belongs to two objects"
        for mask, box, visible in zip(scene.masks, scene.boxes, scene.visible, strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert render.MIN_VISIBLE <= visible <= 1
            assert mask.sum() >= render.MIN_PIXELS


def test_scenes__mask_covers_the_changed_pixels() -> None:
    canvas = np.zeros((60, 60, 3), np.uint8)
    compositor = render.Compositor(canvas)
    square = np.full((20, 20, 4), 255, np.uint8)
    assert compositor.place(render.Patch.of(square), 10, 10)
    assert np.array_equal(compositor.mask(1), canvas[..., 0] == 255)


def test_scenes__occlusion_is_exact() -> None:
    compositor = render.Compositor(np.zeros((60, 60, 3), np.uint8))
    patch = render.Patch.of(np.full((20, 20, 4), 255, np.uint8))
    assert compositor.place(patch, 10, 10) and compositor.place(patch, 20, 10)  # the second covers half of the first
    assert compositor.visible[1] == 200 == compositor.mask(1).sum() and compositor.visible[2] == 400
    assert render.extent(compositor.mask(1)) == (10, 10, 30, 20)


def test_scenes__sticker_never_hides_another() -> None:
    compositor = render.Compositor(np.zeros((60, 60, 3), np.uint8))
    patch = render.Patch.of(np.full((20, 20, 4), 255, np.uint8))
    assert compositor.place(patch, 10, 10)
    before = compositor.canvas.copy()
    assert not compositor.place(patch, 14, 10)  # 4 of 20 rows of the first would remain
    assert np.array_equal(compositor.canvas, before) and compositor.visible[1:] == [400]


@pytest.mark.parametrize(("top", "fits"), [(-10, True), (-14, False), (-40, False), (70, False)])
def test_scenes__border_counts_as_occlusion(top: int, fits: bool) -> None:
    compositor = render.Compositor(np.zeros((60, 60, 3), np.uint8))
    assert compositor.place(render.Patch.of(np.full((20, 20, 4), 255, np.uint8)), top, 10) is fits
    if fits:
        assert compositor.visible[1] / compositor.patch_pixels[1] == 0.5 and compositor.truncated[1]


def test_scenes__base_labels_keep_every_pixel(stickers: Stickers) -> None:
    everything, base = source(stickers), source(stickers, labels="base")
    dropped = 0
    for index in range(12):
        full, part = everything.scene(index), base.scene(index)
        assert np.array_equal(full.image, part.image) and full.caption == part.caption
        assert set(part.classes.tolist()) <= stickers.base
        known = np.array([label in stickers.base for label in full.classes.tolist()], bool)
        for name in ("boxes", "masks", "classes", "visible", "truncated"):
            assert np.array_equal(getattr(full, name)[known], getattr(part, name))
        assert np.array_equal(full.distractors, part.distractors)
        dropped += int((~known).sum())
    assert dropped > 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits__open_their_own_drawings_and_photos_only(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    from pretrain.data import stickers as module

    def spy(path: Path, **options) -> np.ndarray:
        opened.append(Path(path))
        return real(path, **options)

    real = module.read_image
    monkeypatch.setattr(module, "read_image", spy)
    fresh = Stickers.load()
    scenes, pairs = source(fresh, split=split), PairSource(fresh, split=split)
    for index in range(20):
        scenes.scene(index)
        pairs.sample(index, 0)
    parts = {path.relative_to(fresh.root).parts[:2] for path in opened}
    assert {part[1] for part in parts if part[0] == "backgrounds"} == {split}
    assert {part[1] for part in parts if part[0] == "sprites"} == set(fresh.styles[split])


def test_extra_styles__leave_validation_unchanged(stickers: Stickers) -> None:
    more = Stickers.load(extra_styles=True)
    added = set(more.styles["train"]) - set(stickers.styles["train"])
    assert added == {"noto-v1", "fluent-flat", "streamline", "openclipart"}
    assert more.styles["val"] == stickers.styles["val"] and not added & set(more.styles["val"])
    assert more.drawable("train") == stickers.drawable("train") and more.split_hash == stickers.split_hash
    assert more.extra_hash and not stickers.extra_hash
    for index in range(3):
        pictures = [PairSource(data, split="val").sample(index, 0)[0] for data in (stickers, more)]
        scenes = [source(data, split="val").scene(index).image for data in (stickers, more)]
        assert np.array_equal(*pictures) and np.array_equal(*scenes)


def test_extra_styles__are_used_when_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Stickers.load(extra_styles=True)
    drawn: set[str] = set()
    real = data.sprite
    monkeypatch.setattr(data, "sprite", lambda style, code: drawn.add(style) or real(style, code))
    pairs = PairSource(data, split="train")
    guitar = next(
        index for index in range(len(pairs.classes)) if pairs.class_at(index, PAIR) == data.nouns.index("guitar")
    )
    for draw in range(60):
        pairs.sample(guitar, draw)
    assert drawn == set(data.styles["train"])


def test_extra_styles__unknown_noun_is_refused(tmp_path: Path) -> None:
    for name in ("splits.json", "concepts.json"):
        (tmp_path / name).write_bytes((data_root() / name).read_bytes())
    with pytest.raises(UserError, match=r"extra_styles\.json"):
        Stickers.load(tmp_path, extra_styles=True)
    (tmp_path / "extra_styles.json").write_text('{"styles": {"pop": {"1F4A3": {"noun": "boom", "icon": "boom"}}}}')
    with pytest.raises(UserError, match=r"pop/1F4A3 is a 'boom', which is not a class"):
        Stickers.load(tmp_path, extra_styles=True)


def test_scenes__classes_are_balanced(stickers: Stickers) -> None:
    classes = stickers.drawable("val")
    scenes = source(stickers, split="val", length=1000)
    slots = [scenes.class_at(slot, 0) for slot in range(3 * len(classes))]
    assert set(Counter(slots).values()) == {3}


def test_scenes__index_outside_is_refused(stickers: Stickers) -> None:
    for index in (-1, 60):
        with pytest.raises(IndexError):
            source(stickers).scene(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "choose train or val"),
        ({"labels": "novel"}, "choose all or base"),
        ({"size": 32}, "64 to 4096"),
        ({"size": (320, 5000)}, "64 to 4096"),
        ({"length": 0}, "at least one"),
        ({"seed": -1}, "negative"),
        ({"backgrounds": [Path("no-such-folder")]}, "no-such-folder is not a folder"),
    ],
)
def test_scenes__invalid_argument_is_explained(stickers: Stickers, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(stickers, **change)


def test_backgrounds__any_folder_of_photos(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (90, 70), (0, 255, 0)).save(tmp_path / "deep" / "green.png")  # smaller than the scene
    scene = source(stickers, split="val", backgrounds=[tmp_path]).scene(0)
    free = ~scene.masks.any(0)
    green = scene.image[free].astype(int)
    assert np.mean(green[:, 1] > green[:, 0] + 60) > 0.5


def test_backgrounds__empty_folder_is_refused(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="contains no picture"):
        source(stickers, backgrounds=[tmp_path])


def test_backgrounds__unreadable_photo_is_named(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(UserError, match=r"torn\.jpg"):
        source(stickers, split="val", backgrounds=[tmp_path]).scene(0)


def _hash_in_worker(index: int) -> str:
    return digest(source(Stickers.load()).scene(index))


def test_scenes__are_equal_in_another_process(stickers: Stickers) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(_hash_in_worker, range(3))
    assert there == [digest(source(stickers).scene(i)) for i in range(3)]


def test_scenes__are_equal_with_loader_workers(stickers: Stickers) -> None:
    from pretrain.engine.sampling import Microbatches, batches

    def run(workers: int) -> list[bytes]:
        pairs = PairSource(stickers, split="train", size=32, length=60)
        data = Microbatches(pairs, seed=1, batch_size=4, accumulate=1, rank=0, world_size=1)
        return [
            got.batch["image"].numpy().tobytes() for got in batches(data, first=0, last=3, workers=workers, pin=False)
        ]

    assert run(0) == run(1)


# Pairs and the other views


def test_pairs__depend_on_index_and_draw(stickers: Stickers) -> None:
    pairs = PairSource(stickers, split="train", size=48, seed=5)
    again = PairSource(Stickers.load(), split="train", size=48, seed=5)
    one, two = pairs.sample(11, 7), again.sample(11, 7)
    assert np.array_equal(one[0], two[0]) and one[1:] == two[1:]
    other = pairs.sample(11, 8)
    assert other[2] == one[2] and not np.array_equal(other[0], one[0])
    assert one[0].shape == (3, 48, 48) and one[0].dtype == np.uint8


def test_pairs__show_every_class_once_per_epoch(stickers: Stickers) -> None:
    pairs = PairSource(stickers, split="val", size=16)
    turn = len(stickers.validated)
    assert sorted(pairs.sample(i, 0)[2] for i in range(turn, 2 * turn)) == sorted(stickers.validated)


@functools.cache
def any_of(nouns: tuple[str, ...]) -> re.Pattern[str]:
    """The longest first, so that "polar bear" does not count as "bear"."""
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, sorted(nouns, key=len, reverse=True))) + r")(?!\w)")


def nouns_of(caption: str, nouns: tuple[str, ...]) -> set[str]:
    return set(any_of(nouns).findall(caption))


def test_caption__names_the_class_and_only_nouns(stickers: Stickers) -> None:
    pairs = PairSource(stickers, split="train", size=16, length=552)
    for index in range(150):
        _, caption, label = pairs.sample(index, 0)
        assert stickers.nouns[label] in nouns_of(caption, stickers.nouns), caption


def test_caption__of_a_scene_names_its_objects(stickers: Stickers) -> None:
    scenes = source(stickers)
    for index in range(10):
        scene = scenes.scene(index)
        assert nouns_of(scene.caption, stickers.nouns) == {stickers.nouns[i] for i in scene.classes}


def test_caption__templates_contain_no_noun(stickers: Stickers) -> None:
    for template in (*captions.SINGLE, *captions.JOINED):
        assert not nouns_of(re.sub(r"{\w+}", "·", template), stickers.nouns), template


def test_caption__words_without_article_are_nouns(stickers: Stickers) -> None:
    assert set(captions.BARE) | captions.TAKES_A | captions.TAKES_AN <= set(stickers.nouns)


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("dog", "a dog"),
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("socks", "socks"),
    ],
)
def test_caption__indefinite_articles(noun: str, phrase: str) -> None:
    assert captions.with_article(noun) == phrase


def test_caption__varies_and_names_repeated_nouns_once() -> None:
    dice = Dice(1)
    many = {captions.caption_for(["dog"], dice) for _ in range(200)}
    assert len(many) == len(captions.SINGLE)
    assert captions.caption_for(["dog", "dog", "cat"], dice).count("dog") == 1
    assert captions.caption_for([], dice) == "an empty scene"


def test_pairs__collate_to_tensors(stickers: Stickers) -> None:
    pairs = PairSource(stickers, split="val", size=16)
    batch = pairs.collate([pairs.sample(i, 0) for i in range(3)])
    assert batch["image"].shape == (3, 3, 16, 16) and batch["class_id"].tolist() == [
        pairs.sample(i, 0)[2] for i in range(3)
    ]
    assert len(batch["caption"]) == 3


def test_sticker_crops__show_every_held_out_drawing_once_per_view(stickers: Stickers) -> None:
    crops = StickerCrops(stickers, size=32, views=2)
    drawings = sum(len(codes) for codes in stickers.drawings["emojione"].values())
    assert len(crops) == 2 * drawings and set(crops.class_ids.tolist()) == stickers.validated
    image, caption, label = crops.sample(drawings + 3)
    assert caption == stickers.nouns[label] and label == crops.class_ids[drawings + 3]
    again = StickerCrops(Stickers.load(), size=32, views=2).sample(drawings + 3)[0]
    assert np.array_equal(image, again) and not np.array_equal(image, crops.sample(3)[0])
    with pytest.raises(UserError, match="openmoji"):
        StickerCrops(stickers, style="openmoji")
