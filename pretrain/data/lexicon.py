# SPDX-License-Identifier: Apache-2.0
"""Lexicon of nouns: synonyms and hypernyms, from a file made of WordNet once.

    lexicon = read_lexicon()
    lexicon.synonyms("cell phone")   # ("cellular telephone", "mobile phone", …)
    lexicon.hypernyms("terrier")     # ("hunting dog", "dog", …)

Words of one meaning are one class, however they are spelt (tv, television; couch, sofa; cell phone, mobile phone).

`python -m pretrain.data.lexicon --wordnet DIR --nouns FILE … --out FILE` writes the file. Which meaning a noun has: the
one that `senses.json` gives by hand; else the first that is a class of ImageNet-1k, then one of ImageNet-21k, then any
thing that can be drawn. A compound that WordNet does not list means what its last words mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pretrain.data.coco import category_names
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, write_atomically

if TYPE_CHECKING:
    from pretrain.data.nouns import Synset, WordNet

FORMAT = "lexicon/1"
SHIPPED = Path(__file__).with_name("lexicon.json")
PERSON = 18  # lexnames(5WN)
# Hypernyms of nearly everything, which say nothing about a picture.
TOO_GENERAL = frozenset(
    "abstraction|animate thing|artifact|being|body part|causal agent|commodity|consumer goods|covering|entity|group|"
    "instrumentality|living thing|material|matter|object|organism|part|physical entity|physical object|solid|structure|"
    "substance|thing|unit|whole".split("|")
)
# "bottle of soap" is a bottle; "plate of food" a plate.
OF = " of "


@dataclass(frozen=True)
class Meaning:
    """`names` of one meaning, the most usual first, and its hypernym (None: only uninformative ones)."""

    names: tuple[str, ...]
    above: str | None


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Nouns and what they mean.

    Attributes:
        meanings: by id.
        nouns: noun -> id of its meaning.
        imagenet: ids of ImageNet-1k's classes, in the order of its networks' outputs.
    """

    meanings: Mapping[str, Meaning]
    nouns: Mapping[str, str]
    imagenet: tuple[str, ...]

    def meaning(self, noun: str) -> str | None:
        """Id of a noun's meaning; None for a noun that is not listed."""
        return self.nouns.get(noun) or self._by_name.get(noun)

    def synonyms(self, noun: str) -> tuple[str, ...]:
        """Other names of the same meaning."""
        key = self.meaning(noun)
        return () if key is None else tuple(name for name in self.meanings[key].names if name != noun)

    def hypernyms(self, noun: str) -> tuple[str, ...]:
        """One name of each hypernym, the nearest first."""
        return tuple(self.meanings[above].names[0] for above in self.above(self.meaning(noun)))

    def above(self, meaning: str | None) -> list[str]:
        """The meanings above one, the nearest first."""
        keys: list[str] = []
        current = None if meaning is None else self.meanings[meaning].above
        while current is not None:
            keys.append(current)
            current = self.meanings[current].above
        return keys

    def at_or_below(self, words: Iterable[str]) -> frozenset[str]:
        """Ids of the meanings of some words and of all their hyponyms."""
        tops = {key for key in map(self.meaning, words) if key is not None}
        return frozenset(key for key in self.meanings if not tops.isdisjoint((key, *self.above(key))))

    @cached_property
    def _by_name(self) -> dict[str, str]:
        """The meaning that a name is the most usual one of, else the first that has it."""
        keys = {meaning.names[0]: key for key, meaning in reversed([*self.meanings.items()])}
        for key, meaning in self.meanings.items():
            for name in meaning.names:
                keys.setdefault(name, key)
        return keys


def read_lexicon(path: Path | None = None) -> Lexicon:
    """A lexicon file; None: the shipped one.

    Raises:
        UserError: it is unreadable or none.
    """
    where = path or SHIPPED
    content = read_json(where, hint="pretrain.data.lexicon writes it")
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT!r}")
        meanings = {key: Meaning(tuple(m["names"]), m["above"]) for key, m in content["meanings"].items()}
        lexicon = Lexicon(meanings=meanings, nouns=content["nouns"], imagenet=tuple(content["imagenet"]))
        missing = {m.above for m in meanings.values() if m.above} | set(lexicon.nouns.values()) | set(lexicon.imagenet)
        if missing - meanings.keys():
            raise ValueError(f"meaning {min(missing - meanings.keys())} is named and not there")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{where}: not a lexicon ({type(problem).__name__}: {problem})") from problem
    return lexicon


# --- making the file -------------------------------------------------------------------------------------------------


def imagenet_offsets(name: str) -> list[int]:
    """WordNet 3.0 offsets of ImageNet's classes (nouns), in the order of the networks, from the lists in timm."""
    text = (resources.files("timm") / "data" / "_info" / f"{name}_synsets.txt").read_text(encoding="utf-8")
    return [int(line[1:]) for line in text.split() if line.startswith("n")]


class Senses:
    """Chooses the meaning of a noun.

    Args:
        wordnet: the dictionary.
        chosen: noun -> another noun, with ``#3`` for its third meaning.
        photographed: sets of WordNet offsets, the preferred first.
    """

    def __init__(self, wordnet: WordNet, *, chosen: Mapping[str, str], photographed: Sequence[frozenset[int]]) -> None:
        self.wordnet, self.chosen, self.photographed = wordnet, chosen, photographed

    def of(self, noun: str) -> Synset | None:
        """The meaning of a noun; None where neither it nor its last words are in WordNet.

        Raises:
            UserError: `chosen` names what WordNet does not have.
        """
        if noun in self.chosen:
            word, _, number = self.chosen[noun].partition("#")
            offsets = self.wordnet.senses.get(word, ())
            if not offsets or (number and not 1 <= int(number) <= len(offsets)):
                raise UserError(f"{noun!r} is mapped to {self.chosen[noun]!r}, which WordNet does not have")
            return self.wordnet.synsets[offsets[int(number) - 1]] if number else self._best(word)
        words = noun.split(OF, 1)[0].split()
        heads = [" ".join(words[i:]) for i in range(len(words))]
        return next((synset for head in [noun, *heads] if (synset := self._best(head)) is not None), None)

    def _best(self, noun: str) -> Synset | None:
        from pretrain.data.nouns import DRAWABLE

        for form in self._forms(noun):
            candidates = [self.wordnet.synsets[offset] for offset in self.wordnet.senses.get(form, ())]
            drawable = [s for s in candidates if s.lexfile in DRAWABLE]
            tests = [[s for s in drawable if s.offset in offsets] for offsets in self.photographed]
            tests += [drawable, [s for s in candidates if s.lexfile == PERSON], candidates]
            best = next((group[0] for group in tests if group), None)
            if best is not None:
                return best
        return None

    def _forms(self, noun: str) -> list[str]:
        """The noun and what may be its singulars."""
        forms = [noun, *([self.wordnet.exceptions[noun]] if noun in self.wordnet.exceptions else [])]
        for plural, singular in (("ies", "y"), ("es", ""), ("s", "")):
            if noun.endswith(plural) and not noun.endswith("ss"):
                forms.append(noun[: -len(plural)] + singular)
        return forms


class MeaningRecord(TypedDict):
    """A meaning in a lexicon file: its names, and the key of the one above it."""

    names: list[str]
    above: str | None


class LexiconRecord(TypedDict):
    """A lexicon file: key of the meaning of each noun, and of ImageNet's classes in their order."""

    format: str
    source: str
    nouns: dict[str, str]
    imagenet: list[str]
    meanings: dict[str, MeaningRecord]


def build_lexicon(wordnet: WordNet, nouns: Iterable[str], senses: Senses, imagenet: Sequence[int]) -> LexiconRecord:
    """The content of a lexicon file.

    Args:
        wordnet: the dictionary.
        nouns: words to list; those without a meaning are left out.
        senses: what they mean.
        imagenet: offsets of the classes of ImageNet's networks.
    """
    synsets = {noun: synset for noun in sorted(set(nouns)) if (synset := senses.of(noun)) is not None}
    meanings: dict[str, MeaningRecord] = {}

    def add(synset: Synset) -> str:
        key = f"n{synset.offset:08d}"
        if key not in meanings:
            names = [name for name in synset.lemmas if name == name.lower()] or [synset.lemmas[0].lower()]
            meanings[key] = {"names": names, "above": None}
            parent = wordnet.synsets[synset.hypernyms[0]] if synset.hypernyms else None
            if parent is not None and not TOO_GENERAL & set(parent.lemmas):
                meanings[key]["above"] = add(parent)
        return key

    return {
        "format": FORMAT,
        "source": "WordNet 3.0",
        "nouns": {noun: add(synset) for noun, synset in synsets.items()},
        "imagenet": [add(wordnet.synsets[offset]) for offset in imagenet],
        "meanings": dict(sorted(meanings.items())),
    }


def nouns_of(path: Path) -> list[str]:
    """Nouns of a list, of a table file -> nouns, or the category names of a COCO file.

    Raises:
        UserError: it is none of them.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict) and "categories" in content:
            return list(category_names(content["categories"], str(path)).values())
        groups = content.values() if isinstance(content, dict) else [content]
        return [str(noun) for group in groups for noun in group]
    except (TypeError, KeyError) as problem:
        raise UserError(f"{path}: neither nouns nor COCO categories ({problem!r})") from problem


def main(argv: list[str]) -> int:
    """Write the lexicon."""
    from pretrain.data.nouns import WordNet

    parser = argparse.ArgumentParser(prog="python -m pretrain.data.lexicon", description="Write a lexicon of nouns.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's files")
    parser.add_argument("--nouns", type=Path, nargs="+", required=True, help="files of nouns, or COCO files")
    parser.add_argument("--senses", type=Path, default=Path(__file__).with_name("senses.json"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args(argv)
    wordnet = WordNet.load(args.wordnet)
    classes = imagenet_offsets("imagenet")
    photographed = [frozenset(classes), frozenset(imagenet_offsets("imagenet22k"))]
    senses = Senses(wordnet, chosen=read_json(args.senses), photographed=photographed)
    nouns = [noun for path in args.nouns for noun in nouns_of(path)]
    content = build_lexicon(wordnet, nouns, senses, classes)
    rows = {key: value for key, value in content.items() if key != "meanings"}
    meanings = ",\n".join(f" {json.dumps(key)}: {json.dumps(m)}" for key, m in content["meanings"].items())
    text = json.dumps(rows)[:-1] + ', "meanings": {\n' + meanings + "\n}}\n"
    write_atomically(args.out, text.encode())
    unknown = sorted(set(nouns) - content["nouns"].keys())
    print(f"{args.out}: {len(content['nouns'])} nouns, {len(content['meanings'])} meanings")
    if unknown:
        print(f"without a meaning: {', '.join(unknown)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
