# SPDX-License-Identifier: Apache-2.0
"""Words that English weights do not know: what is said, and what is not claimed."""

from __future__ import annotations

import unicodedata

import pytest

from ovd.inference.hints import LANGUAGES, english_of, hint_of, script_of, unknown_word
from ovd.inference.known_words import WordList
from ovd.inference.spelling import Spellings
from pretrain.data.lexicon import read_lexicon


@pytest.mark.parametrize(
    ("word", "english", "language"),
    [("Hund", "dog", "German"), ("KATZE", "cat", "German"), ("möbel", "furniture", "German"),
     ("chien", "dog", "French"), ("vélos", "bicycle", "French"), ("狗", "dog", "Chinese"),
     ("椅子", "chair", "Chinese")],
)  # fmt: skip
def test_hints__listed_name_has_its_english(word: str, english: str, language: str) -> None:
    assert english_of(word) == english_of(unicodedata.normalize("NFD", word)) == (english, language)
    assert hint_of(word) == (
        f"{word!r} is {language} for {english!r}, but these weights know English only: type {english!r}"
    )


@pytest.mark.parametrize(
    ("word", "script"),
    [("собака", "Cyrillic script"), ("いぬ", "Japanese script"), ("개", "Korean script"), ("كلب", "Arabic script"),
     ("龘", "Chinese characters"), ("blorple", None), ("jalapeño", None), ("42", None), ("☕", None), ("", None)],
)  # fmt: skip
def test_hints__foreign_script_is_named(word: str, script: str | None) -> None:
    assert script_of(word) == script
    assert (hint_of(word) is None) == (script is None)


def test_hints__unknown_word_gets_the_nearest_known_words() -> None:
    said = unknown_word("blorple", ["ball", "apple"], english=True)
    assert said == "'blorple' is not a word these weights were trained on; nearest known words: ball, apple"
    # Weights that were trained on other words than English ones are not said to know English only.
    assert "English" not in unknown_word("Hund", ["Katze"], english=False)


def test_hints__misspelt_word_is_asked_about() -> None:
    hint = unknown_word("bycicle", ["cicada"], misspelt=["bicycle"], english=True)
    assert hint == "'bycicle' is not a word these weights were trained on; did you mean bicycle?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("bycicle", "bicycle"), ("umbrela", "umbrella"), ("chiar", "chair"), ("dogg", "dog"), ("poeple", "people"),
     ("Golden_Retreiver", "golden retriever"), ("red bycicle", "bicycle"), ("sissors", "scissors"),
     ("blorple", None), ("bicycle" * 15, None), ("dining", None), ("usb", None), ("pikachu", None),
     ("a", None), ("", None)],
)  # fmt: skip
def test_words__misspelt_name_is_recognised(typed: str, meant: str | None) -> None:
    names = ("bicycle", "umbrella", "chair", "dog", "golden retriever", "scissors", "dining table", "bus", "spinach")
    found = WordList(words=names, lexicon=read_lexicon()).misspelt(typed)
    assert meant in found if meant else found == []


def test_words__misspelt_name_of_other_vocabularies_gets_their_words_alone() -> None:
    assert WordList(words=("Thrombozyt", "RBC"), lexicon=read_lexicon()).misspelt("trombozyt") == ["thrombozyt"]
    assert WordList(words=("Thrombozyt", "RBC"), lexicon=read_lexicon()).misspelt("poeple") == []


@pytest.mark.parametrize("mistake", ["letter", "lettre", "leter", "lettter"])
def test_spellings__one_mistake_of_each_kind_is_close(mistake: str) -> None:
    assert Spellings(names=("letter", "window")).close_to(mistake) == ([] if mistake == "letter" else ["letter"])


def test_hints__suggested_names_are_known_words() -> None:
    from ovd.inference.hints import _english

    words = WordList(words=("person",), lexicon=read_lexicon())
    assert {language for _, language in _english().values()} == set(LANGUAGES)
    assert sorted({e for e, _ in _english().values() if not (words.understands(e) or words.head_of(e))}) == []


def test_hints__vocabulary_language_is_detected() -> None:
    lexicon = read_lexicon()
    assert WordList(words=("dog", "cat", "blorple"), lexicon=lexicon).is_english
    assert not WordList(words=("Hund", "Katze", "dog"), lexicon=lexicon).is_english
