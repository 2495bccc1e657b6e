# SPDX-License-Identifier: Apache-2.0
"""Scores of a detector of photographs with class-agnostic proposals: its heads alone classify the regions.

Shapes: R regions, C classes, B background words, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, platt_scaled
from ovd.inference.ensemble import geometric_ensemble, text_exponents
from ovd.inference.open_words import DistinctRows, best_unrelated, distinct_rows
from ovd.inference.scorers import PER_CLASS, select_classes
from ovd.inference.scoring import Calibration, RegionSet, competitive_probabilities

SINGLE_HEAD_VARIANTS = frozenset(("text", "vild"))
"""Values of `model.variant` with one head, whose scores are not averaged with the image embedding's."""


@dataclass(frozen=True, kw_only=True)
class EnsembleScorer:
    """ViLD-ensemble's geometric mean of the text head's probability and the image embedding's.

    The text head's is the probability that the region is the word and a good box of it. The image embedding's is a
    softmax against all words that contradict the class, times a power of objectness. The score of a class without
    labels is lowered where the text head is sure of a labelled word that contradicts it.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        competitor_mask: (C, B) bool: competitors that contradict the class.
        exponent: (C,) of the head's probability; 1: it stands alone.
        labelled_rows: (L, D) unit text embeddings of the words of the labels.
        related: (C, L) bool: those that do not contradict the class.
        is_labelled: (C,) bool: labels named the class, or a kind of it.
        scale: inverse temperature of the head.
        calibration: of the checkpoint.
    """

    rows: Floats = field(metadata=PER_CLASS)
    competitors: Floats
    competitor_mask: NDArray[np.bool_] = field(metadata=PER_CLASS)
    exponent: Floats = field(metadata=PER_CLASS)
    labelled_rows: Floats
    related: NDArray[np.bool_] = field(metadata=PER_CLASS)
    is_labelled: NDArray[np.bool_] = field(metadata=PER_CLASS)
    scale: float
    calibration: Calibration

    def select(self, columns: Sequence[int]) -> EnsembleScorer:
        """See `ovd.inference.scorers.Scorer`."""
        return select_classes(self, columns)

    @cached_property
    def _novel(self) -> NDArray[np.int64]:
        """Numbers of the classes that no label named."""
        return np.flatnonzero(~self.is_labelled)

    @cached_property
    def _novel_related(self) -> DistinctRows:
        """Of these, the distinct sets of related words."""
        return distinct_rows(self.related[self._novel])

    def __call__(self, regions: RegionSet) -> Floats:
        """See `ovd.inference.scorers.Scorer`."""
        c = self.calibration
        score_RC = regions.head_probabilities(self.rows, scale=self.scale)
        if (self.exponent < 1).any():
            assert regions.image is not None
            image_RC = competitive_probabilities(
                regions.image,
                self.rows,
                self.competitors,
                None,
                scale=c.open_scale,
                mask_CB=self.competitor_mask,
            )
            image_RC *= regions.objectness.clip(0, 1)[:, None] ** c.open_objectness
            score_RC = geometric_ensemble(score_RC, image_RC, self.exponent)
        if c.open_unknown and len(self._novel):
            sets = self._novel_related
            labelled_RL = regions.head_probabilities(self.labelled_rows, scale=self.scale)
            other_SR = best_unrelated(labelled_RL, sets.rows)
            score_RC[:, self._novel] *= (1 - other_SR[sets.of].T) ** c.open_unknown
        return platt_scaled(score_RC, slope=c.slope, offset=c.offset)


def head_exponents(variant: str, is_labelled_C: NDArray[np.bool_], *, novel: float) -> Floats:
    """(C,) exponents of the head that learned words.

    Args:
        variant: `model.variant`.
        is_labelled_C: whether labels named the class.
        novel: `model.novel_exponent`, of the other classes.
    """
    if variant in SINGLE_HEAD_VARIANTS:
        return np.ones(len(is_labelled_C), np.float32)
    return text_exponents(is_labelled_C, novel=novel)
