# SPDX-License-Identifier: Apache-2.0
"""Prompt-free detection: a query with all the words that the detector knows, which names each object once.

Shapes: R regions, C words, D joint embedding. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import best_first, one_blas_thread

if TYPE_CHECKING:
    from ovd.inference.region_model import RegionModel
    from ovd.inference.scoring import RegionSet

EVERYTHING = "everything"
"""Typed alone, in place of class names."""

SHOWN_THRESHOLD = 0.3
"""Lowest score shown. 1,250 words without a query need more certainty than a few typed ones: of the boxes that
450 validation photos can judge .84 are right at .3 and .73 at .22, the threshold of typed words."""

OPEN_THRESHOLD = 0.7
"""The score of a word outside the proposal network's own that counts as `SHOWN_THRESHOLD`. In 252 validation photos of
one thing .74 of such boxes have its name, or one above or below it, from .7 on (122 boxes), .69 from .6 (152). In
scenes, where nobody labelled other things, about half of those that were looked at are right."""

MANY_WORDS, MANY_THRESHOLD = 100, 0.8
"""Of more words of equal standing, the lowest score shown: each is scored alone, so with the words grow the chances
that one of them errs. Of the boxes that `vild-sticker` shows with all its 552 words on 120 validation scenes of seed
3000, .26 are right from .3 on, .41 from .5, .71 from .8 and .80 from .9."""

PROMPT_FREE_CROSS_CLASS_IOU = 0.5
"""IoU above which two words are two names for one thing."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptFreeWords:
    """The words of prompt-free detection.

    Attributes:
        names: one for each meaning.
        shift: (C,) added to the logit of each word's score.
        kind_of: (C, C) bool: the word in the row is a kind of the word in the column.
        family: (C,) the most general of the words that each is a kind of, itself where there is none: boxes of one
            family (*guitar*, *electric guitar*) suppress each other as boxes of one class do.
        threshold: lowest score shown.
    """

    names: tuple[str, ...]
    shift: NDArray[np.float32]
    kind_of: NDArray[np.bool_]
    family: NDArray[np.int64]
    threshold: float = SHOWN_THRESHOLD

    @classmethod
    def plain(cls, names: Sequence[str]) -> PromptFreeWords:
        """Words of equal standing."""
        names = tuple(dict.fromkeys(names))
        return cls(
            names=names,
            shift=np.zeros(len(names), np.float32),
            kind_of=np.zeros((len(names), len(names)), bool),
            family=np.arange(len(names)),
            threshold=MANY_THRESHOLD if len(names) > MANY_WORDS else SHOWN_THRESHOLD,
        )

    def with_threshold(self, threshold: float | None) -> PromptFreeWords:
        """The same words with another threshold; None: with their own."""
        return self if threshold is None else replace(self, threshold=threshold)

    def rescored(self, score_RC: NDArray[np.float32]) -> NDArray[np.float32]:
        """(R, C) scores shifted onto one scale; 0 for a hyponym of a word whose own score reaches the threshold.

        So what is called *dog* is not called *beagle* too: hyponyms were learned from fewer photos.
        """
        logit = np.log(np.clip(score_RC, 1e-7, 1 - 1e-7))
        logit = logit - np.log1p(-np.clip(score_RC, 1e-7, 1 - 1e-7)) + self.shift
        shifted = (1 / (1 + np.exp(-logit))).astype(np.float32)
        hypernyms = np.flatnonzero(self.kind_of.any(axis=0))
        hypernym_shown = (score_RC[:, hypernyms] >= self.threshold).astype(np.float32)
        suppressed = hypernym_shown @ self.kind_of[:, hypernyms].T.astype(np.float32) > 0
        return np.where(suppressed, np.float32(0), shifted)


def open_shift() -> float:
    """The shift from the logit of `OPEN_THRESHOLD` to that of `SHOWN_THRESHOLD`."""
    shown, opened = (np.log(threshold / (1 - threshold)) for threshold in (SHOWN_THRESHOLD, OPEN_THRESHOLD))
    return float(shown - opened)


def is_everything(classes: object) -> bool:
    """Whether the class names are just `EVERYTHING`."""
    if isinstance(classes, (list, tuple)) and len(classes) == 1:
        classes = classes[0]
    return isinstance(classes, str) and classes.strip().casefold() == EVERYTHING


@one_blas_thread
def nearest_words(model: RegionModel, regions: RegionSet, rows: Iterable[int], *, count: int = 3) -> list[list[str]]:
    """For each of some regions, the nearest prompt-free words by text embedding, best first.

    Args:
        model: whose background words are searched.
        regions: of one picture.
        rows: numbers of regions.
        count: words for each.
    """
    card, sayable = model.card, frozenset(model.prompt_free_words().names)
    chosen = [i for i, word in enumerate(() if card is None else card.background_words) if word in sayable]
    chosen_rows = list(rows)
    if card is None or not chosen or not chosen_rows:
        return [[] for _ in chosen_rows]
    embeddings = regions.open_embedding(model.calibration.open_conse)[chosen_rows]
    cosines = embeddings @ model.background_words[chosen].T
    return [[card.background_words[chosen[i]] for i in best_first(row, count).tolist()] for row in cosines]
