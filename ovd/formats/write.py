# SPDX-License-Identifier: Apache-2.0
"""The writers, by the name of their format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ovd.formats.datasets import PictureMode, write_coco, write_voc, write_yolo
from ovd.formats.exports import write_csv, write_cvat, write_label_studio, write_labelme
from ovd.formats.shapes import LabelledPictures

DATASETS: dict[str, Callable[..., None]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "yolo-seg": partial(write_yolo, outline=True),
    "voc": write_voc,
}
EXPORTS: dict[str, Callable[[LabelledPictures, Path], None]] = {
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
    "csv": write_csv,
}


def outlines_notice(labelled: LabelledPictures, name: str) -> str | None:
    """A notice where a format of outlines is written, and objects have none."""
    if name != "yolo-seg":
        return None
    shapes = [shape for picture in labelled.pictures for shape in picture.shapes if not shape.crowd]
    if not (without := sum(not shape.segmentation for shape in shapes)):
        return None
    return f"{without} of {len(shapes)} objects have no outline: yolo-seg has the corners of their boxes"


def write_labels(labelled: LabelledPictures, out: Path, name: str, *, picture_mode: PictureMode = "copy") -> None:
    """Write labelled pictures in a format.

    Args:
        labelled: what is written.
        out: folder; made where it is missing.
        name: of `ovd.formats.names.FORMATS`.
        picture_mode: whether pictures are copied, linked or left out, in formats that include them.

    Raises:
        UserError: what cannot be written.
    """
    if name in DATASETS:
        DATASETS[name](labelled, out, picture_mode=picture_mode)
    else:
        EXPORTS[name](labelled, out)
