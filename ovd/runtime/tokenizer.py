# SPDX-License-Identifier: Apache-2.0
"""CLIP's byte-pair encoding (Radford et al., arXiv:2103.00020, section 2.4) from a file of merges, without torch.

Texts are repaired (ftfy), freed of HTML entities, squeezed and put in small letters; words, digits and runs of other
signs are split off; each is spelt in bytes, of which the pair that was merged first in training is joined again and
again. Ids: the 256 bytes, the same at the end of a word, one for each merge, start and end of a text.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.engine.errors import UserError

END_OF_WORD = "</w>"
WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes; printable ones map to themselves.

    Ids count the printable ones first, then the others, which get the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letter[byte] for byte in range(256)]


class BytePairs:
    """Texts -> (N, T) token ids, padded with 0; longer texts are cut off.

    Args:
        file: one merge a line, "th e</w>", the first one first.
        context_length: T.
    """

    def __init__(self, file: Path, *, context_length: int) -> None:
        self.file, self.context_length = file, context_length
        self._letters = byte_letters()
        self._spell = lru_cache(maxsize=20_000)(self._ids_of)

    def __reduce__(self) -> tuple[Callable[[], BytePairs], tuple[()]]:
        """Caches cannot be pickled: a copy has its own."""
        return partial(BytePairs, self.file, context_length=self.context_length), ()

    @cached_property
    def _tables(self) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        """(pair -> its place among the merges, token -> id)."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"{self.file}: cannot be read ({problem}); export the weights again") from problem
        merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
        letters = sorted(self._letters, key=lambda letter: (ord(letter) >= 256, ord(letter)))
        tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
        tokens += ["<start_of_text>", "<end_of_text>"]
        # Of two ways to merge the same token the later one names it.
        return {pair: rank for rank, pair in enumerate(merges)}, {token: i for i, token in enumerate(tokens)}

    @cached_property
    def _words(self) -> Any:
        import regex

        return regex.compile(WORDS, regex.IGNORECASE)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        if isinstance(texts, str):
            raise TypeError("a list of texts is wanted, not one text")
        _, ids = self._tables
        start, end = ids["<start_of_text>"], ids["<end_of_text>"]
        result = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(result, texts, strict=True):
            tokens = [start, *self._tokens(text), end]
            if len(tokens) > len(row):
                tokens = [*tokens[: len(row) - 1], end]
            row[: len(tokens)] = tokens
        return result

    def _tokens(self, text: str) -> list[int]:
        import ftfy

        clean = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        return [token for word in self._words.findall(clean) for token in self._spell(word)]

    def _ids_of(self, word: str) -> tuple[int, ...]:
        ranks, ids = self._tables
        if word in ("<start_of_text>", "<end_of_text>"):
            return (ids[word],)
        parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += END_OF_WORD
        while len(parts) > 1:
            pairs = set(pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            parts = _joined(parts, best)
        return tuple(ids[part] for part in parts)


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts with every occurrence of a pair made one, from the left."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
