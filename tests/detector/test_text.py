# SPDX-License-Identifier: Apache-2.0
"""Words to embeddings: the ensemble formula, and what the memory and the file cache save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ovd.text import TextEmbedder, cut_phrases, embed_phrases, embed_vocabulary
from ovd.vocabulary import TEMPLATES_63, Vocabulary
from pretrain.nets.towers import ClipTokenizer
from tests.detector.fakes import WordEncoder, make_detector, picture


def test_embed__normalised_mean_over_synonyms_and_templates() -> None:
    encoder = WordEncoder()
    vocabulary = Vocabulary.parse("dog\nmug: cup, coffee mug\n-poster", templates=TEMPLATES_63)
    rows = embed_vocabulary(vocabulary, encoder)
    for row, entry in zip(rows, vocabulary.classes, strict=True):
        prompts = [text for phrase in entry.phrases for text in vocabulary.prompts(phrase)]
        mean = np.mean([encoder.word(p) for p in prompts], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=0, atol=1e-5)


def test_embed_phrases__unit_rows_whatever_the_batch() -> None:
    encoder = WordEncoder()
    words = ["dog", "cat", "zebra", "mug", "cup"]
    rows = embed_phrases(words, encoder, batch_size=2)
    np.testing.assert_allclose(rows, [encoder.word(w) for w in words], rtol=1e-5, atol=1e-6)
    assert embed_phrases([], encoder).shape == (0, encoder.embed_dim)


def test_phrase_cache__only_new_phrases_are_encoded() -> None:
    encoder = WordEncoder()
    embedder = TextEmbedder(encoder=encoder)
    first = embedder.embed(Vocabulary.parse("dog, cat"))
    encoder.encoded.clear()
    second = embedder.embed(Vocabulary.parse("zebra, cat, dog"))
    assert encoder.encoded and all("zebra" in text for text in encoder.encoded)
    np.testing.assert_array_equal(second[[2, 1]], first)


def test_phrase_cache__drops_the_least_recently_used() -> None:
    encoder = WordEncoder()
    embedder = TextEmbedder(encoder=encoder, max_phrases=2)
    embedder.embed(Vocabulary.parse("dog, cat"))
    embedder.embed(Vocabulary.parse("dog, zebra"))  # cat is dropped
    encoder.encoded.clear()
    embedder.embed(Vocabulary.parse("dog"))
    assert encoder.encoded == []
    embedder.embed(Vocabulary.parse("cat"))
    assert encoder.encoded


def test_phrase_cache__templates_are_part_of_the_key() -> None:
    encoder = WordEncoder()
    embedder = TextEmbedder(encoder=encoder)
    embedder.embed(Vocabulary.parse("dog", templates=["{}"]))
    encoder.encoded.clear()
    embedder.embed(Vocabulary.parse("dog", templates=["big {}"]))
    assert encoder.encoded == ["big dog"]


def test_file_cache__belongs_to_one_encoder(tmp_path: Path) -> None:
    pytest.importorskip("pretrain.engine.checkpoint")
    vocabulary = Vocabulary.parse("dog, mug: cup")
    first = embed_vocabulary(vocabulary, WordEncoder(), cache_dir=tmp_path)
    encoder = WordEncoder()
    second = embed_vocabulary(vocabulary, encoder, cache_dir=tmp_path)
    assert encoder.encoded == []
    np.testing.assert_array_equal(first, second)

    class Other(WordEncoder):
        def fingerprint(self) -> str:
            return "f" * 16 + "0" * 48  # same file name, other weights

    other = Other()
    embed_vocabulary(vocabulary, other, cache_dir=tmp_path)
    assert other.encoded


class ShortEncoder(WordEncoder):
    """CLIP's tokenizer, of 32 tokens with those that open and close a text."""

    def token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return ClipTokenizer(32)(texts).numpy()


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("dog", False),
        (" ".join(["dog"] * 30), False),
        (" ".join(["dog"] * 31), True),
        ("a rather long name of a thing, which is still read whole", False),
        ("\u6905\u5b50" * 12, True),
        ("\u6905\u5b50" * 3, False),
        ("x" * 5000, True),
    ],
)
def test_cut_phrases__names_longer_than_the_context(name: str, cut: bool) -> None:
    vocabulary = Vocabulary.of(["cat", name], templates=["{}"])
    assert cut_phrases(vocabulary, ShortEncoder()) == ([name] if cut else [])


def test_cut_phrases__longest_prompt_and_synonyms_count() -> None:
    words = " ".join(["dog"] * 25)
    vocabulary = Vocabulary.parse(f"cat: {words}", templates=["{}", "a picture of the old {} there"])
    assert cut_phrases(vocabulary, ShortEncoder()) == [words]
    assert cut_phrases(vocabulary, WordEncoder()) == []


def test_cut_phrases__detector_gives_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make_detector()
    monkeypatch.setattr("ovd.detector.cut_phrases", lambda vocabulary, encoder: ["red"])
    detector.set_classes("red, blue")
    (notice,) = detector.detect(picture()).notices
    assert notice == "Longer than the text encoder reads, the end is ignored: red"
    assert detector.query(detector.vocabulary).notices == (notice,)
