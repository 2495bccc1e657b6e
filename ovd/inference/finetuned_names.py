# SPDX-License-Identifier: Apache-2.0
"""Names of fine-tuned classes, and the typed words that they match.

Shapes: ``C`` typed classes, ``O`` fine-tuned classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.inference.known_words import Phrases, WordList
from ovd.words import name_key
from pretrain.data.lexicon import Lexicon

if TYPE_CHECKING:
    from ovd.modeling.export import FinetunedCard


@dataclass(frozen=True, kw_only=True)
class FinetunedNames:
    """The names of all fine-tuned classes of a detector.

    Attributes:
        words: the O names (`ovd.words.name_key`), with their meanings where they have one.
    """

    words: WordList

    @classmethod
    def of(cls, cards: Sequence[FinetunedCard], *, lexicon: Lexicon) -> FinetunedNames | None:
        """The names of a detector's branches, oldest branch first; None where it has none."""
        if not cards:
            return None
        names = tuple(dict.fromkeys(name_key(name) for card in cards for name in card.names))
        return cls(words=WordList(words=names, lexicon=lexicon))

    def columns(self, cards: Sequence[FinetunedCard]) -> list[list[int]]:
        """For each branch the columns of its classes among all fine-tuned classes; -1: a later branch's."""
        newest = {name_key(name): number for number, card in enumerate(cards) for name in card.names}
        column = {name: number for number, name in enumerate(self.words.words)}
        return [
            [column[key] if newest[key] == number else -1 for key in map(name_key, card.names)]
            for number, card in enumerate(cards)
        ]

    def has(self, phrase: str) -> bool:
        """Whether a phrase, singular or plural, is one of the classes."""
        return name_key(phrase) in self.words.words or self.words.is_one(phrase)

    def answering(self, phrases: Phrases) -> NDArray[np.bool_]:
        """(C, O) bool: fine-tuned classes whose objects are also the typed class.

        A name as it was learned is that class alone: of *vehicle* and *bus* in one file the labels say which is which.
        Any other phrase is what it means, and what lies below it.
        """
        column = {name: number for number, name in enumerate(self.words.words)}
        named = [[name_key(phrase) for phrase in group] for group in phrases]
        others = [[phrase for phrase in group if phrase not in column] for group in named]
        answering_CO = self.words.relations(others).same_or_below.copy()
        for row, group in enumerate(named):
            answering_CO[row, [column[phrase] for phrase in group if phrase in column]] = True
        return answering_CO
