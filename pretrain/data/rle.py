# SPDX-License-Identifier: Apache-2.0
"""Masks as COCO's run lengths."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class JsonRle(TypedDict):
    """COCO's compressed run lengths as JSON holds them; ``size`` is height, width."""

    size: list[int]
    counts: str


def encode_mask(mask: NDArray[np.bool_]) -> JsonRle:
    """COCO's compressed run lengths of an (H, W) mask, as JSON holds them."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
