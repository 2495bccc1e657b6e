# SPDX-License-Identifier: Apache-2.0
"""Typed words of every keyboard, page and file become the same names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovd.inference.known_words import WordList
from ovd.vocabulary import Vocabulary
from ovd.words import cleaned
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("flower，car", ("flower", "car")),
        ("花、车", ("花", "车")),
        ("花；车", ("花", "车")),
        ("زهرة، سيارة", ("زهرة", "سيارة")),
        ("زهرة؛ سيارة", ("زهرة", "سيارة")),
        ("a\u2028b\x85c\vd", ("a", "b", "c", "d")),
        ('["flower", "car"]', ("flower", "car")),
        (' [\n"flower"]\n', ("flower",)),
        ('{"1": "car", "0": "flower"}', ("flower", "car")),
        ('{"names": ["flower", "car"]}', ("flower", "car")),
        ("\ufeffdog, cat", ("dog", "cat")),
        ("\u200b, dog", ("dog",)),
    ],
)
def test_words__separators_of_other_scripts(text: str, names: tuple[str, ...]) -> None:
    assert Vocabulary.parse(text).names == names


def test_words__full_width_colon_and_minus() -> None:
    typed = Vocabulary.parse("mug：cup，coffee mug；－poster")
    assert typed.classes == Vocabulary.parse("mug: cup, coffee mug; -poster").classes
    assert typed.hash == Vocabulary.parse("mug: cup, coffee mug; -poster").hash
    assert Vocabulary.parse(["mug：cup，coffee mug", "−poster"]).classes == typed.classes


@pytest.mark.parametrize(
    "word",
    [
        "flower\u200b",
        "flower\u200e",
        "\u202aflower\u202c",
        "flow\xader",
        "ｆｌｏｗｅｒ",
        "\ufeffflower",
        "flower\ufe0f",
        "\u2060flower",
    ],
)
def test_words__invisible_characters_are_ignored(word: str) -> None:
    assert cleaned(word) == "flower"
    both = Vocabulary.parse(f"flower, {word}")
    assert both.names == ("flower",) and "counted once" in both.notices[0]


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f469\u200d\U0001f33e",  # farmer: woman, joiner, ear of rice
        "❤\ufe0f",  # red heart
        "1\ufe0f\u20e3",  # keycap
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # flag of England
        "می\u200cخواهم",  # Persian
        "क्\u200dष",  # Devanagari
    ],
)
def test_words__meaningful_joiners_are_kept(text: str) -> None:
    assert cleaned(text) == text


def test_words__trailing_joiners_are_dropped() -> None:
    assert cleaned("می\u200c") == "می" and cleaned("dog\u200d cat") == "dog cat" and cleaned("\u200d") == ""


# --- files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.yaml", "train: images/train\nnc: 2\nnames:\n  - flower\n  - car\n"),
        ("data.yml", "names: {1: car, 0: flower}\n"),
        ("words.yaml", "- flower\n- car\n"),
        ("words.json", '["flower", "car"]'),
        ("id2label.json", '{"10": "car", "9": "flower"}'),
        ("coco.json", '{"categories": [{"id": 3, "name": "flower"}, {"id": 9, "name": "car"}]}'),
        ("words.txt", "\ufeffflower\r\ncar\r\n"),
    ],
)
def test_words__lists_of_other_tools_are_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    vocabulary = Vocabulary.load(tmp_path / name)
    assert vocabulary.names == ("flower", "car") and not vocabulary.negatives


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", '[["flower"], ["car"]]', "must contain strings only"),
        ("data.yaml", "train: images/train\n", "not a list of class names"),
        ("data.yaml", "names: [dog, [no]]\n", "must contain strings only"),
        ("data.yaml", "names: [dog\n", "not a vocabulary file"),
        ("coco.json", '{"categories": [1.5, null]}', "must contain strings only"),
        ("words.json", "{", "not a vocabulary file"),
        ("words.json", "null", "not a list of class names"),
        ("words.json", '{"dog": 1}', "not a list of class names"),
        ("words.json", '{"format": "ovd-vocabulary-1", "classes": [{"name": " "}]}', "no name empty"),
    ],
)
def test_words__other_files_are_refused_by_name(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: .*{message}") as caught:
        Vocabulary.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_words__malformed_bracket_list_is_refused() -> None:
    with pytest.raises(UserError, match="must be a JSON list"):
        Vocabulary.parse("[dog, cat]")
    with pytest.raises(UserError, match="in braces must be numbered"):
        Vocabulary.parse('{"dog": "cat"}')


@pytest.mark.parametrize("name", ["-5 sign", "–20", "---", '"quoted"', "x" * 120, "a: b", "a, b"])
def test_words__data_set_names_survive_save_and_load(name: str, tmp_path: Path) -> None:
    before = Vocabulary.of(["ok", name])
    before.save(tmp_path / "v.json")
    after = Vocabulary.load(tmp_path / "v.json")
    assert after == before and after.hash == before.hash
    assert json.loads((tmp_path / "v.json").read_text())["classes"][1]["name"] == name


@pytest.mark.parametrize(
    "text",
    [
        "• dog\n• cat",
        "* dog\n* cat",
        "1. dog\n2. cat",
        "1) dog\n2) cat\n",
        "0: dog\n1: cat",
        "◦ dog\n\n◦ cat",
        "dog՝ cat",
    ],
)
def test_words__bullets_and_numbers_of_a_list_are_no_names(text: str) -> None:
    assert Vocabulary.parse(text).names == ("dog", "cat")


@pytest.mark.parametrize("text", ["7 up", "3.5 inch disk, cat", "1. FC badge", "mug: cup", "C++ book, C# book"])
def test_words__names_with_numbers_and_marks_stay(text: str) -> None:
    vocabulary = Vocabulary.parse(text)
    assert vocabulary.names == tuple(name.strip() for name in text.partition(":")[0].split(","))
    assert not vocabulary.notices


@pytest.mark.parametrize("text", ["# animals\ndog\ncat", "dog\n// animals\ncat"])
def test_words__comments_are_left_out_with_a_notice(text: str) -> None:
    vocabulary = Vocabulary.parse(text)
    assert vocabulary.names == ("dog", "cat") and "Left out as comments" in vocabulary.notices[0]


@pytest.mark.parametrize(
    "text",
    [
        "dog . cat . mug .", "a dog. a cat.", "dog | cat", "dog\tcat", "犬。猫", "(dog, cat)", "('dog', 'cat')",
        '"dog, cat"', '["dog", "cat"', "names: [dog, cat]", "mug: (cup, glass)",
    ],
)  # fmt: skip
def test_words__what_separates_elsewhere_gets_a_notice(text: str) -> None:
    """They were one class, or classes with half a bracket, that nothing in a picture looks like."""
    assert any("Searched as one name" in notice for notice in Vocabulary.parse(text).notices)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,name\n1,dog\n2,cat\n"),
        ("a.CSV", "id;name\n1;dog\n"),
        ("a.tsv", "1\tdog\n2\tcat\n"),
        ("a.pbtxt", "item {\n  id: 1\n  name: 'dog'\n}\n"),
    ],
)
def test_words__tables_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: is a (table|label map)"):
        Vocabulary.load(tmp_path / name)
    (tmp_path / "one.csv").write_text("dog,cat,mug\n")
    assert Vocabulary.load(tmp_path / "one.csv").names == ("dog", "cat", "mug")


def test_words__known_ones_are_known_as_other_programs_write_them() -> None:
    known = WordList(words=("fire hydrant", "person"), lexicon=read_lexicon())
    for typed in (
        "fire_hydrant",
        "Fire_Hydrant",
        "fire hydrant.",
        "«fire hydrant»",
        "(fire hydrant)",
        "a fire_hydrant。",
    ):
        assert known.is_one(typed) and known.index_of(typed) == 0, typed
    assert not known.is_one("???") and not known.is_one("_")
