# SPDX-License-Identifier: Apache-2.0
"""Crops compared with regions: two pictures are alike where the same nouns fit both, and where they look alike.

An image tower trained on words keeps in its embedding much that no word says: light, size, what is cut off. A softmax
over the words of the training leaves that out. So a crop and a region are compared by their distributions over words
(semantic attributes of an image as its representation: classemes, Torresani et al., ECCV 2010), with the Bhattacharyya
coefficient ``Σ_b sqrt(p_b q_b)``, 1 where both are the same. The cosine of the embeddings, centred on the picture as in
`ovd.inference.scoring.score_examples`, tells things of one noun apart.

Shapes: R regions, E examples, B words, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ovd.inference.arrays import Floats, logit, sigmoid, softmax
from ovd.inference.scoring import Calibration, RegionSet, centred_on_picture


def root_profile(rows_ND: Floats, words_BD: Floats, *, scale: float) -> Floats:
    """(N, B) square roots of the softmax over words; the dot product of two rows is their Bhattacharyya coefficient.

    Args:
        rows_ND: unit image embeddings.
        words_BD: unit text embeddings.
        scale: inverse temperature.
    """
    return np.sqrt(softmax(scale * (rows_ND @ words_BD.T)))


@dataclass(frozen=True, kw_only=True)
class ProfileScorer:
    """Classes given by crops, each alone: a sigmoid of ``coefficient · exp(cosine − 1) · objectness^e``.

    Attributes:
        rows: (E, D) unit image embeddings.
        words: (B, D) unit text embeddings.
        calibration: its plain values, see `Calibration.of_examples`.
    """

    rows: Floats
    words: Floats
    calibration: Calibration

    @cached_property
    def _profiles(self) -> Floats:
        return root_profile(self.rows, self.words, scale=self.calibration.logit_scale)

    def __call__(self, regions: RegionSet) -> Floats:
        """See `ovd.inference.scorers.Scorer`."""
        if not len(self.rows):
            return np.zeros((len(regions), 0), np.float32)
        c = self.calibration
        centred, (rows_ED,) = centred_on_picture(regions, self.rows)
        score_RE = root_profile(regions.distilled, self.words, scale=c.logit_scale) @ self._profiles.T
        score_RE *= np.exp(centred.text @ rows_ED.T - 1)
        score_RE *= np.power(regions.objectness.clip(0, 1), c.objectness_weight)[:, None]
        if (c.slope, c.offset) == (1.0, 0.0):
            return score_RE.clip(0, 1)
        return sigmoid(c.slope * logit(score_RE, eps=1e-6) + c.offset)

    def select(self, columns: Sequence[int]) -> ProfileScorer:
        """See `ovd.inference.scorers.Scorer`."""
        return replace(self, rows=self.rows[list(columns)])
