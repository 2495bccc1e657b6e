# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures as Roboflow's supervision holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ovd.formats.shapes import LabelledPictures, Picture
from pretrain.data.masks import decode
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from supervision import DetectionDataset, Detections


def detection_dataset(labelled: LabelledPictures) -> DetectionDataset:
    """A `supervision.DetectionDataset`: corners and class ids, with masks where every object has one.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import supervision
    except ImportError as problem:
        raise UserError("this needs the package supervision: pip install supervision") from problem
    paths = [str(picture.source) for picture in labelled.pictures]
    annotations = {str(picture.source): detections(picture) for picture in labelled.pictures}
    return supervision.DetectionDataset(classes=list(labelled.names), images=paths, annotations=annotations)


def detections(picture: Picture) -> Detections:
    """One picture's objects as `supervision.Detections`, crowds left out."""
    from supervision import Detections

    shapes = [shape for shape in picture.shapes if not shape.crowd]
    scores = [shape.score for shape in shapes]
    masked = bool(shapes) and all(shape.segmentation for shape in shapes)
    return Detections(
        xyxy=np.array([shape.box for shape in shapes], dtype=np.float32).reshape(-1, 4),
        mask=np.stack([decode(s.segmentation, picture.size, picture.file) for s in shapes]) if masked else None,
        confidence=np.array(scores, dtype=np.float32) if None not in scores else None,
        class_id=np.array([shape.index for shape in shapes], dtype=int),
        data={"class_name": np.array([shape.name for shape in shapes], dtype=str)},
    )
