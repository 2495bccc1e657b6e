# SPDX-License-Identifier: Apache-2.0
"""Masks as COCO's run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's compressed run lengths of an (H, W) mask, as JSON holds them: ``size`` and ``counts``."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
