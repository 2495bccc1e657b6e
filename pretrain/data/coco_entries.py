# SPDX-License-Identifier: Apache-2.0
"""The entries of COCO files as our own code writes them; what comes from a file is checked by `pretrain.data.coco`.

Boxes are x, y, width, height in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypedDict

ImageId = int | str

CocoJson: TypeAlias = Mapping[str, Any]
"""Content of an annotation file, an entry of one or of a results file, before it is checked."""


class CocoCategory(TypedDict):
    """An entry of ``categories``."""

    id: int
    name: str


class _ImageExtras(TypedDict, total=False):
    file_name: str
    height: int
    width: int
    split: str


class CocoImage(_ImageExtras):
    """An entry of ``images``; ``split`` is its part: train, val, …"""

    id: ImageId


class CocoObject(TypedDict, total=False):
    """An entry of ``annotations`` without its ids; ``score`` is a teacher's, or a detection's."""

    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: object
    score: float


class CocoAnnotation(CocoObject):
    """An entry of ``annotations``."""

    id: int
    image_id: ImageId
