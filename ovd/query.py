# SPDX-License-Identifier: Apache-2.0
"""A query: words and examples as one list of classes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from ovd.examples import Example
from ovd.inference.everything import PromptFreeWords
from ovd.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Query:
    """Words and examples in one list of classes: words first, then the examples whose name is no word.

    A word and an example of the same name are one class; its score is the better of the two.
    """

    words: Vocabulary
    examples: tuple[Example, ...] = ()
    prompt_free: PromptFreeWords | None = None
    """Of a query for all words that the detector knows: how it chooses one of them."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; the index is the ``class_id`` of detections."""
        words = self.words.names
        word_keys = {name.casefold() for name in words}
        return words + tuple(e.name for e in self.positive_examples if e.name.casefold() not in word_keys)

    @property
    def positive_examples(self) -> tuple[Example, ...]:
        """The examples to look for."""
        return tuple(e for e in self.examples if not e.negative)

    @cached_property
    def columns(self) -> list[int]:
        """The class of each score column: the words to look for, then the examples to look for."""
        number = {name.casefold(): i for i, name in enumerate(self.names)}
        return [number[name.casefold()] for name in (*self.words.names, *(e.name for e in self.positive_examples))]

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Notes on what parsing changed, and on classes of words and examples."""
        if not self.positive_examples:
            return self.words.notices
        words = {name.casefold() for name in self.words.names}
        both = [e.name for e in self.positive_examples if e.name.casefold() in words]
        mixed = (f"Given as a word and as an example, the better score counts: {', '.join(both[:5])}",) if both else ()
        return self.words.notices + mixed

    def has_scores_of(self, other: Query) -> bool:
        """Whether another query's scores are this one's: the same words. Queries with examples have their own."""
        same_words = self.prompt_free is other.prompt_free and self.words == other.words
        return self is other or (same_words and not self.examples and not other.examples)

    @property
    def hash(self) -> str:
        """16 hex digits over words, names and crops; the vocabulary's own hash where there are no examples."""
        if not self.examples and self.prompt_free is None:
            return self.words.hash
        if self.prompt_free is not None:
            return hashlib.sha256(f"everything {self.words.hash}".encode()).hexdigest()[:16]
        record = [self.words.hash, *([e.name, e.negative, e.hash] for e in self.examples)]
        return hashlib.sha256(json.dumps(record, ensure_ascii=True).encode("ascii")).hexdigest()[:16]
