# SPDX-License-Identifier: Apache-2.0
"""Names of classes that were added to a detector by fine-tuning, and which typed words they answer.

Shapes: ``C`` typed classes, ``O`` fine-tuned classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovd.inference.known_words import Phrases, WordList
from ovd.words import name_key


@dataclass(frozen=True, kw_only=True)
class FinetunedNames:
    """The names of all fine-tuned classes of a detector.

    Attributes:
        words: the O names (`ovd.words.name_key`), with their meanings where they have one.
    """

    words: WordList

    def has(self, phrase: str) -> bool:
        """Whether a phrase, in whatever number, is one of the classes."""
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
