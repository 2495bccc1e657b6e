# SPDX-License-Identifier: Apache-2.0
"""Sample source of text distillation: phrases with their teacher embeddings, drawn by weight."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.data.phrases import Targets
from pretrain.engine.errors import UserError


class PhraseBatch(NamedTuple):
    """`tokens` (N, T) int64 and the teacher's `embeddings` (N, D) float32."""

    tokens: Tensor
    embeddings: Tensor


def held_out(phrase: str, share: float) -> bool:
    """Whether a phrase belongs to the `share` kept out of training: decided by its own hash, the same everywhere."""
    return int.from_bytes(hashlib.sha256(phrase.encode()).digest()[:4], "big") < share * 2**32


class PhraseSource:
    """Draws phrases with a probability proportional to their weight.

    Args:
        targets: Phrases and embeddings.
        tokens: (P, T) tokens of every phrase, in the same order (they are computed once).
        weights: Phrase -> weight; None: all alike. A phrase that is missing here is not drawn.
        held_out_share: Share of the phrases that is never drawn.
        seed: Of the draws.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        tokens: Tensor,
        weights: Mapping[str, float] | None = None,
        held_out_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.embeddings, self.tokens, self.seed = targets.embeddings, tokens, seed
        chosen: list[tuple[int, float]] = []
        for row, phrase in enumerate(targets.phrases):
            weight = 1.0 if weights is None else weights.get(phrase, 0.0)
            if weight > 0 and not held_out(phrase, held_out_share):
                chosen.append((row, weight))
        if not chosen:
            raise UserError("no phrase of the targets is in the phrase file: were they written from another file?")
        self.rows = [row for row, _ in chosen]
        self.cumulative = list(itertools.accumulate(weight for _, weight in chosen))

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, draw: int) -> int:
        """The row of a phrase: a function of the draw alone, because weights, not an order, decide."""
        point = random.Random(self.seed << 40 ^ draw).random() * self.cumulative[-1]
        return self.rows[min(bisect.bisect(self.cumulative, point), len(self.rows) - 1)]

    def collate(self, samples: Sequence[int]) -> PhraseBatch:
        """Look up tokens and embeddings."""
        rows = torch.tensor(samples)
        return PhraseBatch(self.tokens[rows], self.embeddings[rows].float())
