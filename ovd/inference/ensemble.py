# SPDX-License-Identifier: Apache-2.0
"""Weighted geometric mean of the text head's and the image head's scores (ViLD-ensemble)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats

BASE_NOVEL_WEIGHT = 2.0 / 3.0
"""ViLD section 3.4: the text head's exponent on base classes, and the image head's on novel ones."""

FIXED_TEXT_WEIGHT = 0.6
"""Exponent of the text head when it is unknown which typed word is base; the value DetPro uses for transfer data
sets."""


def text_exponents(is_base_C: NDArray[np.bool_], *, novel: float = 1 - BASE_NOVEL_WEIGHT) -> Floats:
    """(C,) exponents of the text head: `BASE_NOVEL_WEIGHT` on base classes and ``novel`` on novel ones."""
    return np.where(is_base_C, np.float32(BASE_NOVEL_WEIGHT), np.float32(novel))


def geometric_ensemble(text_RC: Floats, image_RC: Floats, exponent: Floats | float) -> Floats:
    """``text^e · image^(1−e)``, elementwise, not renormalised.

    The result is a score and no distribution: with exponents that differ between classes a row can sum to more than 1,
    so a softmax must never be rebuilt from it.

    Args:
        text_RC: probabilities of the text head.
        image_RC: probabilities of the image head.
        exponent: scalar or (C,), see :func:`text_exponents`.
    """
    return text_RC**exponent * image_RC ** (1.0 - exponent)
