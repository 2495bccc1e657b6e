# SPDX-License-Identifier: Apache-2.0
"""Scores of words by the image tower's own embedding, fast for ten thousand of them. NumPy only.

Every formula is that of `ovd.inference.scoring.competitive_probabilities` and of the sigmoid after it, in another
order: what many words share is computed once, words are taken in blocks that stay in a processor's cache, and the
logarithm and the exponential that undo each other are left out.

Shapes: R regions, C words, B competitors, G groups of words with the same rivals, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.scoring import Calibration, RegionSet

EPS = 1e-6
LAYERS = 64
"""Of a group's left-out competitors, as many are subtracted; the sum of a group with more is added up anew."""
BLOCK = 1 << 17
"""Scores computed at a time: half a megabyte."""
LEAST_SHARE = 1e-5
"""Of the competitors' total, what a difference from it may be. Sums of double precision then keep seven digits or more;
a smaller one is added up anew."""


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """Which competitors count against which words.

    Attributes:
        excluded: (G, B) bool: of each group, the competitors that do not contradict its words.
        group: (C,) of each word.
    """

    excluded: NDArray[np.bool_]
    group: NDArray[np.int64]

    @classmethod
    def of(cls, rivals: NDArray[np.bool_]) -> Rivals:
        """From (C, B) bool, competitors that contradict each word: most of many words have one and the same."""
        distinct = distinct_rows(~rivals)
        return cls(excluded=distinct.rows, group=distinct.of)

    @cached_property
    def _layers(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(groups, what they leave out): the first of each group that leaves out any, the second, and so on."""
        group, word = np.nonzero(self.excluded)
        _, first, count = np.unique(group, return_index=True, return_counts=True)
        layer = np.arange(len(group)) - np.repeat(first, count)
        return [(group[layer == n], word[layer == n]) for n in range(min(int(count.max(initial=0)), LAYERS))]

    @cached_property
    def _many(self) -> NDArray[np.bool_]:
        """(G,) groups that leave out more than the layers hold."""
        return np.asarray(self.excluded.sum(axis=1) > LAYERS)

    def sums(self, odds_BR: Floats) -> Floats:
        """(G, R) sums of odds over the competitors that count.

        A difference from the total loses digits where nearly all of it is left out; single precision would show that.
        """
        total_R = odds_BR.sum(axis=0, dtype=np.float64)
        sum_GR = np.tile(total_R, (len(self.excluded), 1))
        for group, word in self._layers:  # no group twice in one
            sum_GR[group] -= odds_BR[word]
        for row in np.flatnonzero((sum_GR < LEAST_SHARE * total_R).any(axis=1) | self._many):
            sum_GR[row] = odds_BR[~self.excluded[row]].sum(axis=0, dtype=np.float64)
        return sum_GR.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class OpenWords:
    """Scores words, each alone.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        rivals: which of them contradict which words.
        calibration: its ``open_*`` values are used.
    """

    rows: Floats
    competitors: Floats
    rivals: Rivals
    calibration: Calibration

    def __call__(self, regions: RegionSet) -> Floats:
        """(C, R) scores in [0, 1]."""
        assert regions.image is not None
        if not len(self.competitors):
            raise ValueError("scores need at least one competitor: a background word")
        c = self.calibration
        image_DR = np.ascontiguousarray(np.float32(c.open_scale) * regions.image.T)
        words_BR = self.competitors @ image_DR
        shift_R = words_BR.max(axis=0)  # keeps every exponential in range
        np.exp(np.subtract(words_BR, shift_R, out=words_BR), out=words_BR)
        against_GR = np.log(np.maximum(self.rivals.sums(words_BR), np.float32(1e-30))) + shift_R
        area_R = np.prod(regions.boxes[:, 2:] - regions.boxes[:, :2], axis=1) / (regions.size[0] * regions.size[1])
        whole_R = regions.objectness.clip(0, 1) ** c.open_objectness * area_R**c.open_area
        score_CR = np.empty((len(self.rows), len(regions)), np.float32)
        step = max(1, BLOCK // max(1, len(regions)))
        for start in range(0, len(self.rows), step):
            part = slice(start, start + step)
            score = np.matmul(self.rows[part], image_DR, out=score_CR[part])
            np.subtract(against_GR[self.rivals.group[part]], score, out=score)
            _calibrate(score, whole_R.astype(np.float32), slope=c.open_slope, offset=c.open_offset)
        return score_CR


def _calibrate(against: Floats, whole_R: Floats, *, slope: float, offset: float) -> None:
    """From logits against words, in place: p = w / (1 + e^against), then ``sigmoid(slope · logit(p) + offset)``.

    The odds p / (1 − p) are w / (1 − w + e^against); as everywhere, p keeps `EPS` away from 0 and 1.
    """
    with np.errstate(over="ignore"):  # infinity is what is meant: the score is then 0
        odds = np.exp(against, out=against)
        np.add(odds, np.maximum(1 - whole_R, np.float32(1e-30)), out=odds)
        np.divide(whole_R, odds, out=odds)
        np.clip(odds, EPS / (1 - EPS), (1 - EPS) / EPS, out=odds)
        logit = np.log(odds, out=odds)
        np.multiply(logit, -slope, out=logit)
        np.subtract(logit, offset, out=logit)
        score = np.exp(logit, out=logit)
        np.add(score, 1, out=score)
        np.reciprocal(score, out=score)


@dataclass(frozen=True, kw_only=True)
class DistinctRows:
    """The rows of a table, each once.

    Attributes:
        rows: (G, K) bool.
        of: (C,) number of the row that each of the table's rows is.
    """

    rows: NDArray[np.bool_]
    of: NDArray[np.int64]


def distinct_rows(table_CK: NDArray[np.bool_]) -> DistinctRows:
    """The distinct rows of (C, K) bool."""
    if not table_CK.size:
        return DistinctRows(rows=table_CK[:1], of=np.zeros(len(table_CK), np.int64))
    packed = np.ascontiguousarray(np.packbits(table_CK, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    return DistinctRows(rows=table_CK[first], of=of.ravel())
