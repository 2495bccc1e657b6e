# SPDX-License-Identifier: Apache-2.0
"""What can be typed, what it means, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovd.vocabulary import TEMPLATES_63, TEMPLATES_STICKER, Vocabulary, VocabularyClass, article_for, fill_template
from pretrain.engine.errors import UserError
from tests.fuzz.damage import FUZZ


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("dog, cat, zebra", ["dog", "cat", "zebra"]),
        ("dog; cat; zebra", ["dog", "cat", "zebra"]),
        ("dog\ncat\r\nzebra\n", ["dog", "cat", "zebra"]),
        ("  dog ,, cat ;\n\n; zebra,", ["dog", "cat", "zebra"]),
        ("hot   dog,\ttraffic\tlight", ["hot dog", "traffic light"]),
        ('"dog", “cat”', ["dog", "cat"]),
        ("椅子, стул", ["椅子", "стул"]),
        ("x-ray, merry-go-round", ["x-ray", "merry-go-round"]),
    ],
)
def test_parse__commas_semicolons_and_lines_separate_classes(text: str, names: list[str]) -> None:
    assert list(Vocabulary.parse(text).names) == names


@pytest.mark.parametrize(
    "text", ["dog; mug: cup, coffee mug", "dog, mug: cup, coffee mug", "dog\nmug: cup, coffee mug"]
)
def test_parse__synonyms_end_with_line_or_semicolon(text: str) -> None:
    vocabulary = Vocabulary.parse(text + "; cat")
    expected = (VocabularyClass("dog"), VocabularyClass("mug", ("cup", "coffee mug")), VocabularyClass("cat"))
    assert vocabulary.classes == expected


def test_parse__list_item_is_one_class() -> None:
    vocabulary = Vocabulary.parse(["dog", "mug: cup, coffee mug", "-poster", "salt, and pepper"])
    assert vocabulary.classes == (
        VocabularyClass("dog"),
        VocabularyClass("mug", ("cup", "coffee mug")),
        VocabularyClass("poster", negative=True),
        VocabularyClass("salt, and pepper"),
    )


@pytest.mark.parametrize("minus", ["-", "- ", "\u2212", "\u2013"])
def test_parse__minus_makes_a_negative(minus: str) -> None:
    vocabulary = Vocabulary.parse(f"dog, {minus}poster: placard")
    assert vocabulary.names == ("dog",)
    assert vocabulary.negatives == (VocabularyClass("poster", ("placard",), negative=True),)


def test_parse__repeated_names_are_merged_with_a_notice() -> None:
    vocabulary = Vocabulary.parse("Dog: hound\ncat\ndog: puppy, HOUND")
    assert vocabulary.classes == (VocabularyClass("Dog", ("hound", "puppy")), VocabularyClass("cat"))
    assert len(vocabulary.notices) == 1 and "dog" in vocabulary.notices[0]


def test_parse__word_with_and_without_minus_stays_a_class() -> None:
    vocabulary = Vocabulary.parse("dog, -dog")
    assert vocabulary.names == ("dog",) and not vocabulary.negatives
    assert "minus is ignored" in vocabulary.notices[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Type at least one class name, e.g. mug"),
        (" ,;\n ", "Type at least one class name, e.g. mug"),
        ([], "Type at least one class name, e.g. mug"),
        ("-poster, -wall", "Every word starts with a minus"),
        ("mug: cup, bowl: dish", "two colons"),
        (": cup", "no class name in front of the colon"),
        ("x" * 101, "101 characters; at most 100"),
        ([f"class {i}" for i in range(10_001)], "10,001 class names; at most 10,000"),
        ("mug: " + ",".join(f"s{i}" for i in range(51)), "51 synonyms; at most 50"),
        ({"mug": ["cup"]}, "classes are a list, not a dict; synonyms follow a colon"),
    ],
)
def test_vocabulary__invalid_names_are_explained(text: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Vocabulary.parse(text)


def test_vocabulary__limits_are_inclusive() -> None:
    assert len(Vocabulary.parse([f"class {i}" for i in range(10_000)]).names) == 10_000
    assert Vocabulary.parse("x" * 100).names == ("x" * 100,)


@settings(FUZZ, max_examples=200)
@given(st.text(max_size=200))
def test_parse__any_text_gives_clean_names_or_a_user_error(text: str) -> None:
    try:
        vocabulary = Vocabulary.parse(text)
    except UserError:
        return
    folded = [name.casefold() for name in vocabulary.names]
    assert len(set(folded)) == len(folded) > 0
    for name in vocabulary.names:
        assert name == " ".join(name.split()) and 0 < len(name) <= 100


def test_templates__vild_has_the_papers_63() -> None:
    assert len(TEMPLATES_63) == len(set(TEMPLATES_63)) == 63
    prompts = [fill_template(t, "cat", this_is=True) for t in TEMPLATES_63]
    assert sum(p.startswith("This is ") for p in prompts) == 58
    assert prompts[0] == "There is a cat in the scene."
    assert prompts[5] == "itap of a cat."
    assert prompts[-1] == "This is a painting of a cat."
    assert all("{" not in p for p in prompts)


@pytest.mark.parametrize(
    ("name", "right", "parity"),
    [
        ("cat", "a", "a"),
        ("apple", "an", "an"),
        ("Apple", "an", "a"),
        ("hour", "an", "a"),
        ("hourglass", "an", "a"),
        ("house", "a", "a"),
        ("unicorn", "a", "an"),
        ("unicycle", "a", "an"),
        ("umbrella", "an", "an"),
        ("uniform", "a", "an"),
        ("uninflated balloon", "an", "an"),
        ("ukulele", "a", "an"),
        ("utensil", "a", "an"),
        ("urn", "an", "an"),
        ("ewer", "a", "an"),
        ("one-way street", "a", "an"),
        ("onion", "an", "an"),
        ("usher", "an", "an"),
        ("user", "a", "an"),
        ("eucalyptus", "a", "an"),
        ("ufo", "a", "an"),
        ("heirloom", "an", "a"),
    ],
)
def test_templates__articles_and_parity_mode(name: str, right: str, parity: str) -> None:
    assert article_for(name) == right
    assert article_for(name, parity=True) == parity


def test_templates__names_are_cleaned_as_in_vild() -> None:
    assert fill_template("a {}", "Traffic_light/signal.") == "a traffic light or signal"


def test_vocabulary_hash__is_stable_and_sees_every_difference() -> None:
    vocabulary = Vocabulary.parse("dog, mug: cup, -poster")
    code = "from ovd.vocabulary import Vocabulary as V; print(V.parse('dog, mug: cup, -poster').hash)"
    # PYTHONHASHSEED differs between processes: a hash that used it would differ too.
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == vocabulary.hash
    assert len(vocabulary.hash) == 16
    others = ["dog, mug: cup", "mug: cup, dog, -poster", "dog, mug, -poster", "dog, mug: cup, poster"]
    others_hashes = {Vocabulary.parse(text).hash for text in others}
    others_hashes.add(Vocabulary.parse("dog, mug: cup, -poster", templates=TEMPLATES_63).hash)
    assert len(others_hashes) == 5 and vocabulary.hash not in others_hashes
    # What a parser remarked is not part of what was asked.
    assert Vocabulary.parse("dog, dog, mug: cup, -poster").hash == vocabulary.hash


def test_vocabulary_file__round_trip(tmp_path: Path) -> None:
    vocabulary = Vocabulary.parse(
        ["dög", "mug: cup", "-poster", "a, b"], templates=TEMPLATES_63, this_is=True, parity=True
    )
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert loaded == vocabulary and loaded.hash == vocabulary.hash
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]


def test_vocabulary_file__text_uses_the_typed_grammar(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffdog\nmug: cup\n-poster\n", encoding="utf-8")
    assert Vocabulary.load(file).classes == Vocabulary.parse("dog\nmug: cup\n-poster").classes
    assert Vocabulary.load(file).templates == TEMPLATES_STICKER


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[]",
        b"{",
        b'{"format": "x", "classes": []}',
        b'{"format": "ovd-vocabulary-1", "classes": [{"name": 3}]}',
        b'{"format": "ovd-vocabulary-1", "classes": []}',
        b'{"format": "ovd-vocabulary-1", "classes": [{"name": "a"}], "templates": ["no slot"]}',
        b"[" * 100_000,
    ],
)
def test_vocabulary_file__damaged_one_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "v.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="v.json"):
        Vocabulary.load(file)


def test_vocabulary_file__missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.txt.*No such file"):
        Vocabulary.load(tmp_path / "none.txt")
