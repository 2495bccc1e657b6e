# SPDX-License-Identifier: Apache-2.0
"""How a typed word relates to the words that a detector was trained on: synonym, hypernym, hyponym or unrelated.

Shapes: ``C`` typed classes, ``K`` known words, ``B`` background words.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ovd.inference.everyday import (
    ACTIVITIES,
    AFTER_HEADS,
    AMOUNTS,
    COLLECTIVE,
    GROUPS,
    INDISTINCT,
    IRREGULAR,
    KINDS,
    OTHER_THINGS,
    STATES,
    SYNONYMS,
)
from ovd.inference.spelling import Spellings
from pretrain.data.lexicon import Lexicon

_MARKS = ' .,;:!?…。！？()[]{}<>«»"“”'
ARTICLES = frozenset(("a", "an", "the", "some", "my"))
CACHED_LISTS = 4
"""Lists of classes whose relations are cached: 10,000 words take a second, and every picture needs them."""
Phrases = Sequence[Sequence[str]]
"""For each class its name and synonyms."""


@dataclass(frozen=True, kw_only=True)
class Relations:
    """Between typed classes and other words; a class is what any of its phrases is.

    Attributes:
        same_or_below: (C, K) bool: a region that is the known word is also the class (dog, for "animal" or "dog").
        above: (C, K) bool: the class is a kind of the known word (dog, for "terrier").
        indistinct: (C, K) bool: of these, kinds that a small encoder cannot distinguish from the word (cat, for
            "kitten").
    """

    same_or_below: NDArray[np.bool_]
    above: NDArray[np.bool_]
    indistinct: NDArray[np.bool_]

    @property
    def related(self) -> NDArray[np.bool_]:
        """(C, K) bool: words that do not contradict the class."""
        return self.same_or_below | self.above


@dataclass(frozen=True, kw_only=True)
class WordList:
    """Words and their meanings in a lexicon.

    Attributes:
        words: of the proposal network, or of the training.
        lexicon: what they mean.
    """

    words: tuple[str, ...]
    lexicon: Lexicon

    @cached_property
    def _columns(self) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, int]]:
        """Meaning -> words that have it or lie below it; meaning -> words that have it; word -> its number."""
        below: dict[str, list[int]] = {}
        same: dict[str, list[int]] = {}
        for number, word in enumerate(self.words):
            for key in set(self.line_of(word)):
                below.setdefault(key, []).append(number)
            same.setdefault(self.meaning_of(word) or word, []).append(number)
        return below, same, {word: number for number, word in enumerate(self.words)}

    @cached_property
    def is_english(self) -> bool:
        """Whether most of the words are nouns of the lexicon."""
        return sum(self.meaning_of(word) is not None for word in self.words) * 2 > len(self.words)

    def meaning_of(self, phrase: str) -> str | None:
        """Id of the meaning of a typed phrase; None: not in the lexicon.

        Capitals, plurals, and compounds in one word or in several (*surf board*, *hot-dog*, *firehydrant*) too.
        """
        forms = singulars(folded(phrase))
        if OTHER_THINGS & set(forms):
            return None
        for form in forms:
            if (meaning := self.lexicon.meaning(SYNONYMS.get(form, form))) is not None:
                return meaning
        return next((self._compounds[key] for key in map(closed_up, forms) if key in self._compounds), None)

    @cached_property
    def _compounds(self) -> dict[str, str]:
        """Names of the words that are compounds, closed up -> meaning."""
        names = [(name, SYNONYMS.get(name, name)) for name in (*self.words, *SYNONYMS)]
        found = {closed_up(name): self.lexicon.meaning(meant) for name, meant in names}
        return {key: meaning for key, meaning in found.items() if meaning is not None}

    def head_of(self, phrase: str) -> str | None:
        """The head noun of a phrase: *car* of "red car", *man* of "a man with a hat"; None if there is none."""
        return self._head(folded(phrase).split(), phrase=folded(phrase))

    def _head(self, words: list[str], *, phrase: str) -> str | None:
        """The head noun of some words of a phrase, and not the phrase itself."""
        for end in range(1, len(words) + 1):
            after = words[end] if end < len(words) else None
            if after is not None and after not in AFTER_HEADS:
                continue
            is_amount = after == "of" and not AMOUNTS.isdisjoint(singulars(words[end - 1]))
            if is_amount and (head := self._head(words[end + 1 :], phrase=phrase)) is not None:  # "a pair of skis"
                return head
            noun = words[:end]
            while noun and noun[-1] in STATES:
                noun = noun[:-1]
            heads = (" ".join(noun[start:]) for start in range(len(noun)))
            understood = [head for head in heads if head != phrase and self.understands(head)]
            if understood or after not in ACTIVITIES:
                return min(understood, key=lambda head: head.split()[0] in ARTICLES, default=None)
        return None

    def _understood_part(self, phrase: str) -> str:
        """The phrase, or its head noun if the phrase itself has no meaning."""
        return phrase if self.understands(phrase) else self.head_of(phrase) or phrase

    def understands(self, phrase: str) -> bool:
        """Whether the phrase itself has a meaning here."""
        forms = {folded(phrase), *singulars(folded(phrase))}  # an article may be part of a name
        return self.meaning_of(phrase) is not None or not forms.isdisjoint(self._named)

    @cached_property
    def _named(self) -> frozenset[str]:
        """Names that are known without a lexicon."""
        return frozenset((*KINDS, *GROUPS, *self.words))

    def misspelt(self, phrase: str) -> list[str]:
        """Names that are spelt like a phrase without a meaning, or like its last word; empty where none is."""
        phrase = folded(phrase)
        return self._spellings.close_to(phrase) or self._spellings.close_to(phrase.split(" ")[-1])

    @cached_property
    def _spellings(self) -> Spellings:
        everyday = (*SYNONYMS, *KINDS, *GROUPS, *IRREGULAR, *INDISTINCT, *COLLECTIVE) if self.is_english else ()
        return Spellings(names=tuple(map(folded, (*self.words, *everyday))))

    def is_one(self, phrase: str) -> bool:
        """Whether a phrase, singular or plural, is one of the words or a synonym of one; not a kind or a group."""
        _, same, number_of = self._columns
        meaning = self.meaning_of(phrase)
        return meaning in same if meaning is not None else bool(set(singulars(folded(phrase))) & number_of.keys())

    def line_of(self, phrase: str) -> list[str]:
        """The meaning of a phrase, and what it is a kind of; the phrase itself where the lexicon does not have it."""
        phrase = self._understood_part(phrase)
        forms = singulars(folded(phrase))
        meaning = self.meaning_of(phrase)
        line = [meaning, *self.lexicon.above(meaning)] if meaning is not None else [SYNONYMS.get(forms[-1], forms[-1])]
        for general in (general for form in forms for general in KINDS.get(form, ())):
            above = self.lexicon.meaning(general)
            line += [general] if above is None else [above, *self.lexicon.above(above)]
        return list(dict.fromkeys(line))

    def general_of(self, phrase: str) -> str | None:
        """The one of the words that a phrase is a kind of, by age, sex, occupation or build alone; None: none is."""
        forms = singulars(folded(self._understood_part(phrase)))
        general = next((INDISTINCT[form] for form in forms if form in INDISTINCT), None)
        return general if general in self._columns[2] else None

    def member_of(self, phrase: str) -> str | None:
        """The one of the words that each box of a collective noun (*crowd*) shows; None: the phrase is none."""
        forms = singulars(folded(self._understood_part(phrase)))
        member = next((COLLECTIVE[form] for form in forms if form in COLLECTIVE), None)
        return member if member in self._columns[2] else None

    def index_of(self, word: str) -> int | None:
        """Number of a word, or else of the first that means the same; None: there is none."""
        _, same, number_of = self._columns
        return number_of.get(word, next(iter(same.get(self.meaning_of(word) or word, ())), None))

    def members_of(self, phrase: str) -> frozenset[str]:
        """Words that the phrase, singular or plural, is a group of."""
        return frozenset(
            word for form in singulars(folded(self._understood_part(phrase))) for word in GROUPS.get(form, ())
        )

    @cached_property
    def _cache(self) -> OrderedDict[Phrases, Relations]:
        return OrderedDict()

    def relations(self, phrases: Phrases) -> Relations:
        """How each class relates to each word; cached for the last lists."""
        key = tuple(tuple(group) for group in phrases)
        if (relations := self._cache.get(key)) is None:
            relations = self._cache[key] = self._relate(key)
            while len(self._cache) > CACHED_LISTS:
                self._cache.popitem(last=False)
        return relations

    def among(self, phrases: Phrases) -> NDArray[np.bool_]:
        """(C, C) bool: whatever is the class in the column is also the class in the row."""
        of_phrase = [number for number, group in enumerate(phrases) for _ in group]
        words = WordList(words=tuple(phrase for group in phrases for phrase in group), lexicon=self.lexicon)
        same_or_below_CP = words.relations(phrases).same_or_below
        among_CC = np.zeros((len(phrases), len(phrases)), dtype=bool)
        for phrase, number in enumerate(of_phrase):
            among_CC[:, number] |= same_or_below_CP[:, phrase]
        return among_CC

    def _relate(self, phrases: Phrases) -> Relations:
        below, with_meaning, number_of = self._columns
        same = np.zeros((len(phrases), len(self.words)), dtype=bool)
        above, indistinct = np.zeros_like(same), np.zeros_like(same)
        for row, phrase in ((row, phrase) for row, group in enumerate(phrases) for phrase in group):
            line = self.line_of(phrase)
            same[row, below.get(line[0], [])] = True
            for member in self.members_of(phrase):
                same[row, below.get(self.meaning_of(member) or member, [])] = True
            above[row, [number for key in line for number in with_meaning.get(key, [])]] = True
            if (general := self.general_of(phrase)) is not None:
                indistinct[row, number_of[general]] = True
        return Relations(same_or_below=same, above=above & ~same, indistinct=indistinct & ~same)


def folded(phrase: str) -> str:
    """A phrase as lists of other programs write it (``Fire_Hydrant``, ``person.``), in small letters and plain."""
    return " ".join(phrase.replace("_", " ").casefold().split()).strip(_MARKS)


def closed_up(phrase: str) -> str:
    """A compound as one word."""
    return phrase.replace(" ", "").replace("-", "")


def singulars(phrase: str) -> list[str]:
    """A phrase without its article, and what may be its singular; the phrase first."""
    article, _, noun = phrase.partition(" ")
    if noun and article in ARTICLES:
        phrase = noun
    head, _, last = phrase.rpartition(" ")
    forms = [last]
    if last in IRREGULAR:
        forms.append(IRREGULAR[last])
    elif last.endswith("men") and len(last) > 4:
        forms.append(last[:-3] + "man")
    elif last.endswith("ies") and len(last) > 4:
        forms.append(last[:-3] + "y")
    elif last.endswith("s") and not last.endswith(("ss", "us", "is")):
        if last.endswith(("ches", "shes", "xes", "sses", "oes")):
            forms.append(last[:-2])
        forms.append(last[:-1])
    return [f"{head} {form}" if head else form for form in forms]
