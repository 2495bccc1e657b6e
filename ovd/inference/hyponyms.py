# SPDX-License-Identifier: Apache-2.0
"""Classes that are scored by words below them: a *rodent* is where a guinea pig or a squirrel is. NumPy only.

Shapes: R regions, F of them, C classes, H words of the training, B competitors, K words of the proposal network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.open_words import CompetitorGroups, OpenWords, contradicting
from ovd.inference.scoring import Calibration, RegionSet

MIN_SCORE = 0.01
"""Regions whose score cannot reach it are left out: most of 150."""


@dataclass(frozen=True, kw_only=True)
class TrainingWords:
    """The words of the training, as classes.

    Attributes:
        rows: (H, D) unit text embeddings; they are the first competitors.
        related: (H, H) bool: words that do not contradict each other.
        known: (H, K) bool: words of the proposal network that do not contradict each.
    """

    rows: Floats
    related: NDArray[np.bool_]
    known: NDArray[np.bool_]

    def scored(self, words: NDArray[np.int64], competitors: Floats, calibration: Calibration) -> OpenWords:
        """Some of the words, each scored against the (B, D) competitors that contradict it."""
        groups = CompetitorGroups.of(contradicting(self.related[words], len(competitors)), self.known[words])
        return OpenWords(rows=self.rows[words], competitors=competitors, groups=groups, calibration=calibration)


@dataclass(frozen=True, kw_only=True)
class Hyponyms:
    """Classes and the words that are one of them.

    Attributes:
        words: those of the training that any class needs.
        members: (C, their number) bool: of them, words that are the class or below it.
        highest: score of a class where a word of it scores 1.
        power: of the words' scores.
    """

    words: OpenWords
    members: NDArray[np.bool_]
    highest: float
    power: int

    @classmethod
    def of(
        cls,
        training: TrainingWords,
        members: NDArray[np.bool_],
        competitors: Floats,
        calibration: Calibration,
        *,
        power: int,
    ) -> Hyponyms:
        """With the words that any class needs.

        Args:
            training: all H words.
            members: (C, H) bool.
            competitors: (B, D) unit text embeddings.
            calibration: its ``open_*`` values are used.
            power: of the words' scores.
        """
        needed = np.flatnonzero(members.any(axis=0))
        return cls(
            words=training.scored(needed, competitors, calibration),
            members=members[:, needed],
            highest=calibration.open_fallback,
            power=power,
        )

    def best(self, regions: RegionSet) -> tuple[NDArray[np.int64], Floats]:
        """((F,) the regions that can have a score, (F, C) their scores by the best word of each class)."""
        few = np.flatnonzero(self.highest * self.words.bound(regions) ** self.power >= MIN_SCORE)
        if not len(few):
            return few, np.zeros((0, len(self.members)), np.float32)
        best_FC = best_of(self.words(regions.at(few)), self.members)
        return few, np.asarray(self.highest * best_FC**self.power, np.float32)


def best_of(scores_RK: Floats, members_CK: NDArray[np.bool_]) -> Floats:
    """(R, C): the best of each class's words; 0 for a class without any."""
    best_RC = np.zeros((len(scores_RK), len(members_CK)), np.float32)
    for column in np.flatnonzero(members_CK.any(axis=1)):  # few of many: (R, C, K) at once would be large
        best_RC[:, column] = scores_RK[:, members_CK[column]].max(axis=1)
    return best_RC
