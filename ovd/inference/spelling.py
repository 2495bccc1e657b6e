# SPDX-License-Identifier: Apache-2.0
"""Names spelt nearly like a typed word: *bicycle* for "bycicle".

Two words are close if letters left out of both make them equal (SymSpell): that covers wrong, missing, doubled and
swapped letters, and takes microseconds however many names there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

SHORTEST = 3
"""Letters of a word; shorter ones are close to too much."""
TWO_MISTAKES = 7
"""Letters from which a word may have two mistakes."""
LIKENESS, OTHER_FIRST_LETTER = 0.7, 0.8
"""Least share of equal letters in order (difflib's ratio) of two words, and of two with different first letters: "usb"
is not taken for *bus*, nor "pikachu" for *spinach*."""
LONGEST = 30
"""Letters of a word; longer ones, which would take milliseconds each, are close to nothing."""


@dataclass(frozen=True, kw_only=True)
class Spellings:
    """Names that may be meant by a misspelt word.

    Attributes:
        names: in small letters.
    """

    names: tuple[str, ...]

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        """Checksums of what is left of the names without some letters, ascending, and the numbers of the names.

        Two arrays take 1 MB for 2,000 names, strings in a dictionary 20.
        """
        pairs = np.fromiter(
            ((_checksum(short), number) for number, name in enumerate(self.names) for short in _without_letters(name)),
            dtype=[("checksum", np.uint32), ("name", np.int32)],
        )
        pairs.sort(order="checksum")
        return pairs["checksum"].copy(), pairs["name"].copy()

    def close_to(self, word: str, *, count: int = 2) -> list[str]:
        """The names spelt most like ``word``, ``count`` at most; empty where none is within a mistake or two."""
        shorts = set(_without_letters(word))
        checksums, numbers = self._index
        wanted = np.fromiter(map(_checksum, shorts), np.uint32, len(shorts))
        ranges = zip(np.searchsorted(checksums, wanted), np.searchsorted(checksums, wanted, "right"), strict=True)
        mistakes: dict[str, int] = {}
        for name in {self.names[number] for first, end in ranges for number in numbers[first:end]}:
            common = shorts.intersection(_without_letters(name))
            if common:  # checksums may agree by chance
                letters = max(len(word), len(name)) - max(map(len, common))
                if letters <= _most_mistakes(word):
                    mistakes[name] = letters
        mistakes.pop(word, None)
        fewest = min(mistakes.values(), default=0)

        def unlikeness(name: str) -> tuple[bool, float]:
            return name[0] != word[0], -SequenceMatcher(None, word, name).ratio()

        close = (name for name, letters in mistakes.items() if letters == fewest)
        least = {False: LIKENESS, True: OTHER_FIRST_LETTER}
        ranked = sorted((unlikeness(name), name) for name in close)
        return [name for (other_first, ratio), name in ranked if -ratio >= least[other_first]][:count]


def _most_mistakes(word: str) -> int:
    return 0 if not SHORTEST <= len(word) <= LONGEST else 1 if len(word) < TWO_MISTAKES else 2


def _without_letters(word: str) -> Iterator[str]:
    """The word, and what is left of it without as many letters as it may have mistakes; each once."""
    for kept in range(len(word) - _most_mistakes(word), len(word) + 1):
        yield from {"".join(letters) for letters in combinations(word, kept)}


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))
