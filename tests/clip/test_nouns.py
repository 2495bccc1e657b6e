# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - WordNet's lines are as long as they are
"""WordNet's files, the synonym rule, phrase files and targets: on a dictionary of a few lines, without WordNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data.nouns import WordNet, load_pairs, save_pairs, synonym_pairs
from pretrain.data.phrases import (
    PROMPTS,
    Phrase,
    build_phrases,
    read_phrases,
    read_targets,
    write_phrases,
    write_targets,
)
from pretrain.data.targets import PhraseSource, held_out
from pretrain.engine.errors import UserError

# A dictionary in WordNet's format: animals (05), artifacts (06); the numbers are offsets.
DATA = """\
  1 This line and the next belong to the licence header.
  2 It is skipped.
00000010 05 n 01 animal 0 002 ~ 00000020 n 0000 ~ 00000050 n 0000 | a living thing
00000020 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 004 @ 00000010 n 0000 ~ 00000030 n 0000 ~ 00000040 n 0000 ~ 00000045 n 0000 | a pet that barks; "he walked the dog"
00000030 05 n 02 puppy 0 pup 0 001 @ 00000020 n 0000 | a young dog
00000040 05 n 02 toy_dog 0 lapper 0 001 @ 00000020 n 0000 | a small dog
00000045 05 n 01 pug 0 001 @ 00000020 n 0000 | a flat-nosed dog
00000050 05 n 02 bat 0 chiropteran 0 001 @ 00000010 n 0000 | it flies at night
00000060 06 n 02 bat 1 club 0 000 | a stick for hitting balls
00000070 06 n 02 car 0 automobile 0 001 ~ 00000080 n 0000 | it drives
00000080 06 n 02 cab 0 taxi 0 001 @ 00000070 n 0000 | a car for hire
00000090 18 n 01 pug 0 000 | a person who fights
"""
INDEX = """\
  1 header
animal n 1 1 ~ 1 1 00000010
automobile n 1 0 1 0 00000070
bat n 2 1 @ 2 2 00000050 00000060
cab n 1 1 @ 1 0 00000080
canis_familiaris n 1 1 @ 1 0 00000020
car n 1 1 ~ 1 1 00000070
chiropteran n 1 1 @ 1 0 00000050
club n 1 0 1 0 00000060
dog n 1 2 @ ~ 1 1 00000020
domestic_dog n 1 1 @ 1 0 00000020
lapper n 1 1 @ 1 0 00000040
pug n 2 1 @ 2 1 00000090 00000045
pup n 1 1 @ 1 0 00000030
puppy n 1 1 @ 1 1 00000030
taxi n 1 1 @ 1 0 00000080
toy_dog n 1 1 @ 1 0 00000040
"""
COUNTS = "dog%1:05:00:: 1 42\ndog%2:38:00:: 1 3\npuppy%1:05:00:: 1 2\nbat%1:06:00:: 2 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(DATA)
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "cntlist.rev").write_text(COUNTS)
    (tmp_path / "noun.exc").write_text("pups pup\ndogges dog\n")
    return tmp_path


@pytest.fixture
def wordnet(folder: Path) -> WordNet:
    return WordNet.load(folder)


def test_wordnet__files_are_parsed(wordnet: WordNet) -> None:
    dog = wordnet.synsets[20]
    assert dog.lemmas == ("dog", "domestic dog", "Canis familiaris")
    assert (dog.lexfile, dog.hypernyms, dog.hyponyms) == (5, (10,), (30, 40, 45))
    assert dog.definition == "a pet that barks"
    assert wordnet.senses["bat"] == (50, 60)
    assert wordnet.counts == {"dog": 42, "puppy": 2, "bat": 5}  # the verb "to dog" is not counted
    assert wordnet.first_sense_counts == {"dog": 42, "puppy": 2}
    assert wordnet.exceptions["dogges"] == "dog"


def test_wordnet__frequencies_and_exceptions_are_optional(folder: Path) -> None:
    (folder / "cntlist.rev").unlink()
    (folder / "noun.exc").unlink()
    wordnet = WordNet.load(folder)
    assert (wordnet.counts, wordnet.exceptions) == ({}, {})


def test_first_sense__prefers_the_given_files(wordnet: WordNet) -> None:
    def offset(*args: object) -> int | None:
        found = wordnet.first_sense(*args)  # type: ignore[arg-type]
        return found and found.offset

    assert offset("bat") == 50
    assert offset("bat", (6,)) == 60
    assert offset("Bat", (13, 6, 5)) == 60
    assert offset("bat", (20,)) is None
    assert offset("gryphon") is None


def test_synonym_pairs__follow_the_rule(wordnet: WordNet) -> None:
    pairs = {
        p.query: p
        for p in synonym_pairs(wordnet, ["dog", "bat", "car", "taxi"], ["animal", "animal", "vehicle", "vehicle"])
    }
    assert pairs["puppy"].answers == (0,)
    assert (pairs["puppy"].relation, pairs["puppy"].tagged) == ("hyponym", True)
    assert (pairs["pup"].relation, pairs["pup"].tagged) == ("hyponym", False)
    assert pairs["automobile"].relation == "synonym"
    assert pairs["chiropteran"].answers == (1,)
    assert pairs["cab"].answers == (2, 3)  # a synonym of taxi and a kind of car
    assert pairs["cab"].relation == "synonym"
    assert "toy dog" not in pairs and "domestic dog" not in pairs  # they contain the answer
    assert "Canis familiaris" not in pairs  # Latin
    assert "club" not in pairs  # the other bat: sports supercategory was not asked for
    assert "pug" not in pairs  # most commonly a fighter
    assert "taxi" not in pairs  # a class itself


def test_synonym_pairs__exclude_words_of_captions(wordnet: WordNet) -> None:
    pairs = synonym_pairs(wordnet, ["dog"], ["animal"], captions=["two puppys on a bench"])
    assert [p.query for p in pairs] == ["lapper", "pup"]


def test_synonym_pairs__file_round_trip(wordnet: WordNet, tmp_path: Path) -> None:
    nouns = ["dog", "car"]
    pairs = synonym_pairs(wordnet, nouns, ["animal", "vehicle"])
    save_pairs(tmp_path / "pairs.json", pairs, nouns)
    assert load_pairs(tmp_path / "pairs.json", nouns) == pairs
    assert [p.answers for p in load_pairs(tmp_path / "pairs.json", ["car", "dog"])] == [
        tuple(1 - a for a in p.answers) for p in pairs
    ]
    with pytest.raises(UserError, match="'dog' is neither a key"):
        load_pairs(tmp_path / "pairs.json", ["car"])
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(UserError, match="not a list of synonym pairs"):
        load_pairs(tmp_path / "pairs.json", nouns)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("data.noun", "00000010 05 n 09 animal 0\n", "synset 1 is not in WordNet's format"),
        ("index.noun", "animal n one\n", "lemma 1 is not in WordNet's format"),
        ("index.noun", "animal n 2 0 2 0 00000010\n", "announces 2 senses and lists 1"),
    ],
)
def test_wordnet__damaged_file_is_named_with_the_line(folder: Path, name: str, line: str, message: str) -> None:
    (folder / name).write_text(line)
    with pytest.raises(UserError, match=message):
        WordNet.load(folder)


def test_wordnet__missing_folder_says_what_it_is_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only rebuilding the text tower needs it"):
        WordNet.load(tmp_path)


# --- phrases ---------------------------------------------------------------------------------------------------------


def test_phrases__common_and_drawable_words_weigh_more(wordnet: WordNet) -> None:
    weight = dict(wordnet.phrases())
    assert weight["dog"] > weight["puppy"] > weight["pup"]
    assert weight["domestic dog"] > weight["canis familiaris"]  # a proper name in every form
    assert wordnet.phrases()[0][0] == "dog"


def test_phrases__have_the_definition_of_their_sense(wordnet: WordNet) -> None:
    found = {
        p.text: p
        for p in build_phrases(
            wordnet, ["bat", "gadget"], ["sport", "tool"], [("a bat", "bat"), ("a bat and a gadget", None)]
        )
    }
    assert found["bat"].definition == "bat: a stick for hitting balls"  # sport: not the animal
    assert found["a photo of a bat"].definition == found["a bat"].definition == found["bat"].definition
    assert found["gadget"].definition == ""  # WordNet does not know it
    assert found["a bat and a gadget"].definition == ""
    assert found["puppy"].definition == "puppy: a young dog"
    assert found["pug"].definition == ""  # most commonly a person, not a thing one can draw
    assert found["dogges"].definition.startswith("dog:")
    assert {PROMPTS[0].format("gadget"), "car", "automobile", "animal"} <= found.keys()
    assert found["bat"].weight > found["a bat"].weight


def test_phrases__definitions_can_be_limited(wordnet: WordNet) -> None:
    some = build_phrases(wordnet, ["dog"], ["animal"], [], definitions=1)
    assert {p.definition for p in some} == {"", "dog: a pet that barks"}
    everything = build_phrases(wordnet, ["dog"], ["animal"], [])
    assert [p.text for p in some] == [p.text for p in everything]


def test_phrase_file__round_trip(tmp_path: Path) -> None:
    phrases = [Phrase("a dog", 2.5, "dog: a pet"), Phrase("piñata", 1.0)]
    write_phrases(tmp_path / "phrases.txt", phrases)
    assert read_phrases(tmp_path / "phrases.txt") == phrases
    (tmp_path / "plain.txt").write_text("dog\n\ncat\t3\n")
    assert read_phrases(tmp_path / "plain.txt") == [Phrase("dog"), Phrase("cat", 3.0)]
    (tmp_path / "latin.txt").write_bytes(b"pi\xf1ata\n")
    with pytest.raises(UserError, match=r"latin\.txt: not a text file in UTF-8 \(byte 2\)"):
        read_phrases(tmp_path / "latin.txt")
    for weight in ("0", "-1", "many", "nan"):
        (tmp_path / "bad.txt").write_text(f"dog\t1\ncat\t{weight}\n")
        with pytest.raises(UserError, match=r"bad\.txt:2: the weight"):
            read_phrases(tmp_path / "bad.txt")


def embeddings(count: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tokenize(texts: object) -> torch.Tensor:
    return torch.tensor([[len(t)] for t in texts])  # type: ignore[attr-defined]


def test_target_file__round_trip_and_refusals(tmp_path: Path) -> None:
    write_targets(tmp_path / "t.safetensors", ["dog", "piñata"], embeddings(2))
    got = read_targets(tmp_path / "t.safetensors")
    assert got.phrases == ("dog", "piñata")
    torch.testing.assert_close(got.embeddings.float(), torch.from_numpy(embeddings(2)), atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match="no teacher targets"):
        read_targets(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="3 phrases but 2"):
        write_targets(tmp_path / "t.safetensors", ["a", "b", "c"], embeddings(2))


def test_phrases__drawn_by_weight_and_seed(tmp_path: Path) -> None:
    write_targets(tmp_path / "t.safetensors", ["one", "three", "unused"], embeddings(3))
    targets = read_targets(tmp_path / "t.safetensors")
    phrases = [Phrase("one", 1.0), Phrase("three", 3.0), Phrase("without target", 9.0)]
    source = PhraseSource(targets, phrases=phrases, tokenize=tokenize, seed=1)
    assert len(source) == 2
    draws = [source.sample(0, draw) for draw in range(4000)]
    assert set(draws) == {0, 1}
    assert np.mean(draws) == pytest.approx(0.75, abs=0.03)
    assert draws == [source.sample(99, draw) for draw in range(4000)]
    assert draws != [
        PhraseSource(targets, phrases=phrases, tokenize=tokenize, seed=2).sample(0, d) for d in range(4000)
    ]
    batch = source.collate([1, 0])
    assert batch.tokens.tolist() == [[5], [3]]
    torch.testing.assert_close(batch.embeddings, targets.embeddings[[1, 0]].float())


def test_targets__definition_is_added(tmp_path: Path) -> None:
    write_targets(tmp_path / "t.safetensors", ["dog", "dog: a pet"], embeddings(2))
    targets = read_targets(tmp_path / "t.safetensors")
    source = PhraseSource(targets, phrases=[Phrase("dog", 1.0, "dog: a pet")], tokenize=tokenize)
    total = embeddings(2).sum(0)
    got = source.collate([0]).embeddings[0].numpy()
    np.testing.assert_allclose(got, total / np.linalg.norm(total), atol=2e-3)
    with pytest.raises(UserError, match="definitions have no target"):
        PhraseSource(targets, phrases=[Phrase("dog", 1.0, "never embedded")], tokenize=tokenize)


def test_phrases__held_out_ones_are_never_drawn(tmp_path: Path) -> None:
    words = [f"word {i}" for i in range(400)]
    write_targets(tmp_path / "t.safetensors", words, embeddings(400))
    source = PhraseSource(
        read_targets(tmp_path / "t.safetensors"), phrases=None, tokenize=tokenize, held_out_share=0.25
    )
    kept = [word for word in words if not held_out(word, 0.25)]
    assert len(source) == len(kept)
    assert 0.15 < 1 - len(kept) / 400 < 0.35
    with pytest.raises(UserError, match="no phrase"):
        PhraseSource(read_targets(tmp_path / "t.safetensors"), phrases=[Phrase("cat")], tokenize=tokenize)
