# SPDX-License-Identifier: Apache-2.0
"""Sample source of text distillation: phrases with their teacher embeddings, drawn by weight."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.phrases import Phrase, TeacherTargets
from pretrain.engine.errors import UserError
from pretrain.engine.identity import text_identity


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
        targets: texts and embeddings; phrases without an embedding of their text are not drawn.
        phrases: what to learn; None: every text of the targets, alike.
        tokenize: texts -> (N, T) tokens, applied once.
        held_out_share: share of the phrases that is never drawn.
        seed: of the draws.

    Raises:
        UserError: nothing is left to draw, or a definition was never embedded.
    """

    def __init__(
        self,
        targets: TeacherTargets,
        *,
        phrases: Sequence[Phrase] | None,
        tokenize: Callable[[Sequence[str]], Tensor],
        held_out_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        row = {text: i for i, text in enumerate(targets.phrases)}
        every = [Phrase(text) for text in targets.phrases] if phrases is None else phrases
        chosen = [p for p in every if p.text in row and not held_out(p.text, held_out_share)]
        if not chosen:
            raise UserError("no phrase of the phrase file has a target: were the targets made from another file?")
        self.tokens = tokenize([p.text for p in chosen])
        self.embeddings = targets.embeddings[[row[p.text] for p in chosen]]
        defined = [i for i, p in enumerate(chosen) if p.definition]
        missing = [chosen[i].definition for i in defined if chosen[i].definition not in row]
        if missing:
            raise UserError(
                f"{len(missing)} definitions have no target, such as {missing[0]!r}: embed the phrase file again"
            )
        if defined:
            both = (
                self.embeddings[defined].float()
                + targets.embeddings[[row[chosen[i].definition] for i in defined]].float()
            )
            self.embeddings[defined] = F.normalize(both, dim=-1).half()
        self.cumulative = list(itertools.accumulate(p.weight for p in chosen))

    def __len__(self) -> int:
        return len(self.cumulative)

    def identity(self) -> dict[str, str]:
        """Phrases, weights and embeddings."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes() + self.embeddings.contiguous().numpy().tobytes())
        return {"phrases and targets": digest.hexdigest(), "weights": text_identity(self.cumulative)}

    def sample(self, index: int, draw: int) -> int:
        """The row of a phrase: a function of the draw alone, because weights, not an order, decide."""
        point = random.Random(self.seed << 40 ^ draw).random() * self.cumulative[-1]
        return min(bisect.bisect(self.cumulative, point), len(self.cumulative) - 1)

    def collate(self, samples: Sequence[int]) -> PhraseBatch:
        """Look up tokens and embeddings."""
        rows = torch.tensor(samples)
        return PhraseBatch(self.tokens[rows], self.embeddings[rows].float())
