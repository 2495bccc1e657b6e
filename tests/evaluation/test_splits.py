# SPDX-License-Identifier: Apache-2.0
"""Splits: the built-in ones, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ovd.data.splits import COCO_NAMES, Split, lvis_split
from pretrain.engine.errors import UserError

NAMES = {1: "cup", 2: "dog", 30: "tennis racket"}


def test_ovcoco__has_48_base_and_17_novel_categories() -> None:
    split = Split.load("ovcoco")
    assert (len(split.base), len(split.novel), len(split.ids), len(COCO_NAMES)) == (48, 17, 65, 80)
    novel = "airplane bus cat dog cow elephant umbrella tie snowboard skateboard cup knife cake couch keyboard sink"
    assert [split.names[i] for i in split.novel] == [*novel.split(), "scissors"]
    left_out = {COCO_NAMES[i] for i in COCO_NAMES if split.group_of(i) == "outside"}
    assert sorted(left_out) == [
        "baseball bat", "baseball glove", "cell phone", "dining table", "fire hydrant", "hair drier", "hot dog",
        "parking meter", "potted plant", "sports ball", "stop sign", "teddy bear", "tennis racket", "traffic light",
        "wine glass",
    ]  # fmt: skip


def test_split_hash__covers_ids_names_and_groups() -> None:
    one = Split(name="a", base=(1,), novel=(2,), names=NAMES)
    assert one.hash == Split(name="b", base=(1,), novel=(2,), names={1: "cup", 2: "dog"}).hash
    assert len(one.hash) == 12
    others = [
        Split(name="a", base=(2,), novel=(1,), names=NAMES),
        Split(name="a", base=(1,), novel=(30,), names=NAMES),
        Split(name="a", base=(1,), novel=(2,), names=NAMES | {2: "cat"}),
    ]
    assert len({one.hash, *(o.hash for o in others)}) == 4


def test_split_hash__of_ovcoco_is_frozen() -> None:
    assert Split.load("ovcoco").hash == "537d5dba8c12"


def test_split_file__names_equal_ids(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"base": ["Cup", "tennis_racket"], "novel": ["dog"]}))
    (tmp_path / "ids.json").write_text(json.dumps({"name": "x", "base": [30, 1], "novel": [2]}))
    by_name = Split.load(tmp_path / "names.json", categories=NAMES)
    by_id = Split.load(tmp_path / "ids.json", categories=NAMES)
    assert (by_name.base, by_name.novel, by_name.hash) == ((1, 30), (2,), by_id.hash)
    assert by_name.name == "names"


def test_split_file__round_trip_needs_no_data_set(tmp_path: Path) -> None:
    split = Split.load("ovcoco")
    split.save(tmp_path / "s.json")
    assert Split.load(tmp_path / "s.json") == split


def test_split_file__edited_content_with_old_hash_is_refused(tmp_path: Path) -> None:
    content = Split.load("ovcoco").to_dict()
    content["novel"].remove(87)
    with pytest.raises(UserError, match="hash"):
        Split.from_dict(content)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"base": [1], "novel": [1, 2]}, r"in base and in novel: 1 \(cup\)"),
        ({"base": [1, 1], "novel": []}, "1 more than once"),
        ({"base": ["cup", 1], "novel": []}, "1 more than once"),
        ({"base": [1], "novel": [99]}, "unknown category id 99"),
        ({"base": ["cupp"], "novel": []}, "unknown category name 'cupp'. Did you mean 'cup'"),
        ({"base": [True], "novel": []}, "True is neither"),
        ({"base": [1.5], "novel": []}, "1.5 is neither"),
        ({"base": [], "novel": []}, "both empty"),
        ({"base": [1]}, "'novel' must be a list"),
        ({"base": 1, "novel": []}, "'base' must be a list"),
        ({"base": [1], "novel": [], "nvoel": []}, "unknown key 'nvoel'"),
        ({"base": [1], "novel": [], "names": ["cup"]}, "'names' must map"),
        ({"base": [1], "novel": [], "names": {"one": "cup"}}, "'names' must map"),
        ([1, 2], "expected an object"),
    ],
)
def test_split_file__wrong_content_is_named(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Split.from_dict(content, categories=NAMES, where="mine.json")


@pytest.mark.parametrize("text", ["{", "", "\x00", "[" * 100_000])
def test_split_file__must_be_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        Split.load(tmp_path / "bad.json")


def test_split_file__missing_one_lists_the_built_in_splits() -> None:
    with pytest.raises(UserError, match="ovcoco, lvis, stickers"):
        Split.load("ovcocoo")


def test_split__renumbered_ids_are_refused() -> None:
    contiguous = dict(enumerate(COCO_NAMES.values(), start=1))
    with pytest.raises(UserError, match="does not define|renumbered"):
        Split.load("ovcoco").check_categories(contiguous, where="gt.json")
    shifted = {i: COCO_NAMES.get(i + 1, "none") for i in COCO_NAMES}
    with pytest.raises(UserError, match="1 is 'person' in the split but 'bicycle' there"):
        Split.load("ovcoco").check_categories(shifted, where="gt.json")


def test_lvis_split__rare_is_novel() -> None:
    categories = [{"id": n, "name": f"c{n}", "frequency": f} for n, f in enumerate("fcrrcf", start=1)]
    split = lvis_split(categories)
    assert (split.base, split.novel) == ((1, 2, 5, 6), (3, 4))
    with pytest.raises(UserError, match="'frequency' must be f, c or r"):
        lvis_split([{"id": 1, "name": "c"}])


def test_stickers_split__category_ids_start_at_1() -> None:
    from pretrain.data.stickers import Stickers

    data, split = Stickers.load(), Split.load("stickers")
    assert split.novel == tuple(sorted(i + 1 for i in data.novel))
    assert {i - 1 for i in split.ids} == set(range(len(data.nouns)))
    assert split.names[1] == data.nouns[0]
