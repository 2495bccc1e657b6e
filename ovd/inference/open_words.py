# SPDX-License-Identifier: Apache-2.0
"""Scores of words by the image tower's own embedding, fast for ten thousand of them. NumPy only.

Every formula is that of `ovd.inference.scoring.competitive_probabilities` and of the sigmoid after it, in another
order: what many words share is computed once, words are taken in blocks, the logarithm and the exponential that undo
each other are left out, and so is the sigmoid of words that no region shows.

Shapes: R regions, C words, B competitors, K words of the proposal network, G groups of words that the same competitors
and words of the proposal network contradict, S distinct sets of related words, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.scorers import Shown
from ovd.inference.scoring import Calibration, RegionSet

OPEN_EPS = 1e-12
"""Products of several probabilities' powers are small numbers, and their order counts."""
LAYERS = 64
"""Of a group's left-out competitors, as many are subtracted; the sum of a group with more is added up anew."""
BLOCK = 1 << 21
"""Scores computed at a time, eight megabytes: smaller products of matrices are slower ones."""
CACHED = 1 << 17
"""Of these, as many are worked on at a time: half a megabyte."""
MIN_SHARE = 1e-5
"""Of the competitors' total, what a difference from it may be. Sums of double precision then keep seven digits or more;
a smaller one is added up anew."""
TINY = np.float32(1e-30)
"""Keeps quotients finite: of sums of odds that are all left out, and of regions that are certainly nothing."""


@dataclass(frozen=True, kw_only=True)
class CompetitorGroups:
    """Words in groups that the same competitors and the same words of the proposal network contradict.

    Attributes:
        excluded: (G, B) bool: of each group, the competitors that do not contradict its words; the group that leaves
            out most comes first.
        related: (G, K) bool: likewise, words of the proposal network.
        group: (C,) of each word.
    """

    excluded: NDArray[np.bool_]
    related: NDArray[np.bool_]
    group: NDArray[np.int64]

    @classmethod
    def of(cls, competitor_mask: NDArray[np.bool_], related: NDArray[np.bool_]) -> CompetitorGroups:
        """Group words; most of many words fall into one group.

        Args:
            competitor_mask: (C, B) competitors that contradict each word.
            related: (C, K) words of the proposal network that do not.
        """
        distinct = distinct_rows(np.concatenate([~competitor_mask, related], axis=1))
        excluded, related = distinct.rows[:, : competitor_mask.shape[1]], distinct.rows[:, competitor_mask.shape[1] :]
        order = np.argsort(-excluded.sum(axis=1), kind="stable")
        return cls(excluded=excluded[order], related=related[order], group=np.argsort(order)[distinct.of])

    @cached_property
    def related_sets(self) -> DistinctRows:
        """The distinct rows of ``related``: far fewer than groups."""
        return distinct_rows(self.related)

    @cached_property
    def _layers(self) -> list[NDArray[np.int64]]:
        """What the groups leave out: the first competitor of each, the second, and so on; of ever fewer groups."""
        count = self.excluded.sum(axis=1)
        word = np.nonzero(self.excluded)[1]
        first = np.cumsum(count) - count
        depth = min(int(count.max(initial=0)), LAYERS)
        return [word[first[: int((count > n).sum())] + n] for n in range(depth)]

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
        for words in self._layers:
            sum_GR[: len(words)] -= odds_BR[words]
        for row in np.flatnonzero((sum_GR < MIN_SHARE * total_R).any(axis=1) | self._many):
            sum_GR[row] = odds_BR[~self.excluded[row]].sum(axis=0, dtype=np.float64)
        return sum_GR.astype(np.float32)


class SharedTerms(NamedTuple):
    """Terms of a picture's scores that the words of a group share.

    Attributes:
        image_RD: image embeddings times the scale.
        against_R1: log odds against a word of the commonest group.
        ratio_GR: odds against each group's words, as a multiple of the commonest group's.
        nothing_SR: for each of `CompetitorGroups.related_sets`, odds against a region being a whole object that may be
            its words.
    """

    image_RD: Floats
    against_R1: Floats
    ratio_GR: Floats
    nothing_SR: Floats


@dataclass(frozen=True, kw_only=True)
class OpenWords:
    """Scores words, each alone.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        groups: of words, by what contradicts them.
        calibration: its ``open_*`` values are used.
    """

    rows: Floats
    competitors: Floats
    groups: CompetitorGroups
    calibration: Calibration

    def __call__(self, regions: RegionSet) -> Floats:
        """(R, C) scores in [0, 1]."""
        score_RC = np.empty((len(regions), len(self.rows)), np.float32)
        for words, odds_RC in self._odds_against(regions):
            score_RC[:, words] = self._score(odds_RC)
        return score_RC

    def shown(self, regions: RegionSet, *, threshold: float) -> Shown:
        """The same of words with a region at or above a threshold; of all others only the best.

        A score falls with the odds against the word (rises, if the sigmoid does), so the best of each is one sigmoid.
        """
        if not len(regions):
            return Shown.of(np.zeros((0, len(self.rows)), np.float32), threshold=threshold)
        rising = self.calibration.open_slope < 0
        best_C = np.empty(len(self.rows), np.float32)
        classes, scores = [np.zeros(0, np.int64)], [np.zeros((len(regions), 0), np.float32)]
        for words, odds_RC in self._odds_against(regions):
            best = self._score(odds_RC.max(axis=0) if rising else odds_RC.min(axis=0))
            best_C[words] = best
            few = np.flatnonzero(best >= threshold)
            classes.append(words[few])
            scores.append(self._score(odds_RC[:, few]))
        return Shown.in_order(best_C, np.concatenate(classes), np.concatenate(scores, axis=1))

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], int]:
        """(C,) words, those of the commonest group last, and how many are of others."""
        common = self.groups.group == self._common
        return np.argsort(common, kind="stable"), int((~common).sum())

    @cached_property
    def _common(self) -> int:
        """The group that most words are of."""
        return int(np.bincount(self.groups.group, minlength=1).argmax())

    @cached_property
    def _rows_DC(self) -> Floats:
        """Embeddings of the words in their order, laid out as a product with regions reads them."""
        return np.ascontiguousarray(self.rows[self._order[0]].T)

    def bound(self, regions: RegionSet) -> Floats:
        """(R,) what no word's score exceeds (with a rising sigmoid): that of a region whose embedding is the word."""
        whole_R = np.maximum(self._wholeness(regions), TINY)
        return self._score(np.asarray((1 - whole_R) / whole_R, np.float32))

    def _wholeness(self, regions: RegionSet) -> Floats:
        """(R,) 0…1, how likely a region is a whole thing, of whatever kind."""
        c = self.calibration
        area_R = np.prod(regions.boxes[:, 2:] - regions.boxes[:, :2], axis=1) / (regions.size[0] * regions.size[1])
        whole_R = regions.objectness.clip(0, 1) ** c.open_objectness * area_R**c.open_area
        if c.open_quality and regions.quality is not None:
            whole_R = whole_R * regions.quality.clip(0, 1) ** c.open_quality
        return np.asarray(whole_R, np.float32)

    def _shared_terms(self, regions: RegionSet) -> SharedTerms:
        if not len(self.competitors):
            raise ValueError("scores need at least one competitor: a background word")
        c = self.calibration
        image_RD = np.float32(c.open_scale) * regions.open_embedding(c.open_conse)
        words_BR = self.competitors @ np.ascontiguousarray(image_RD.T)
        shift_R = words_BR.max(axis=0)  # keeps every exponential in range
        np.exp(np.subtract(words_BR, shift_R, out=words_BR), out=words_BR)
        sum_GR = np.maximum(self.groups.sums(words_BR), TINY)
        sets = self.groups.related_sets
        whole_SR = np.tile(self._wholeness(regions), (len(sets.rows), 1))
        if c.open_unknown and regions.word_scores is not None:
            whole_SR *= (1 - best_unrelated(regions.word_scores, sets.rows)).clip(0, 1) ** c.open_unknown
        whole_SR = np.maximum(whole_SR, TINY)
        against_GR = np.divide(sum_GR, whole_SR[sets.of], out=sum_GR)
        common_R = against_GR[self._common].copy()
        return SharedTerms(
            image_RD=image_RD,
            against_R1=(np.log(common_R) + shift_R)[:, None],
            ratio_GR=np.divide(against_GR, common_R, out=against_GR),
            nothing_SR=np.asarray(np.maximum(1 - whole_SR, TINY) / whole_SR, np.float32),
        )

    def _odds_against(self, regions: RegionSet) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Words, and (R, their number) odds (1 − p) / p of probabilities before the sigmoid; the array is used again.

        With p = w / (1 + s / e^word), where w says that a region is a whole thing and none that contradicts the word,
        and s is the sum over competitors, the odds are (1 − w) / w + s / w / e^word.
        """
        if not len(self.rows):
            return
        image_RD, against_R1, ratio_GR, nothing_SR = self._shared_terms(regions)
        set_of = self.groups.related_sets.of
        nothing_R1 = nothing_SR[set_of[self._common]][:, None]
        order, others = self._order
        step = max(1, BLOCK // max(1, len(regions)))
        block = np.empty((len(regions), min(step, len(order))), np.float32)
        for start in range(0, len(order), step):
            words = order[start : start + step]
            odds = np.matmul(image_RD, self._rows_DC[:, start : start + step], out=block[:, : len(words)])
            group = self.groups.group[words[: max(0, others - start)]]
            ratio_RC, nothing_RC = ratio_GR[group].T, nothing_SR[set_of[group]].T
            rows = max(1, CACHED // len(words))
            for first in range(0, len(odds), rows):  # while they are in the cache
                some, of = odds[first : first + rows], slice(first, first + rows)
                with np.errstate(over="ignore"):  # infinity is what is meant: the score is then 0
                    np.exp(np.subtract(against_R1[of], some, out=some), out=some)
                    other, common = some[:, : len(group)], some[:, len(group) :]
                    other *= ratio_RC[of]
                    other += nothing_RC[of]
                    common += nothing_R1[of]
            yield words, odds

    def _score(self, odds: Floats) -> Floats:
        """``sigmoid(slope · logit(p) + offset)`` of odds (1 − p) / p; p keeps `OPEN_EPS` from 0 and 1."""
        logit = np.log(np.clip(odds, np.float32(OPEN_EPS), np.float32(1 / OPEN_EPS)))
        logit *= self.calibration.open_slope
        logit -= self.calibration.open_offset
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(logit, out=logit)), np.float32)


def contradicting(related_CH: NDArray[np.bool_], competitors: int) -> NDArray[np.bool_]:
    """(C, B) bool: competitors that contradict each class: all but the related ones.

    Args:
        related_CH: whether the class is related to a word of the training; these come first among the competitors.
        competitors: how many there are.
    """
    mask_CB = np.ones((len(related_CH), competitors), dtype=bool)
    mask_CB[:, : related_CH.shape[1]] = ~related_CH
    return mask_CB


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


def best_unrelated(scores_RK: Floats, related_CK: NDArray[np.bool_]) -> Floats:
    """(C, R) best score of a word that is not related to each class; 0 where all are.

    Args:
        scores_RK: 0…1.
        related_CK: whether a word is related to a class.
    """
    best = [scores_RK[:, ~related_K].max(axis=1, initial=0.0) for related_K in related_CK]
    return np.asarray(best, np.float32).reshape(len(related_CK), len(scores_RK))
