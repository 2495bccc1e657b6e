# SPDX-License-Identifier: Apache-2.0
"""One door to the writers: every format by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ovd.formats.datasets import Place, write_coco, write_voc, write_yolo
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


def about_outlines(labelled: LabelledPictures, name: str) -> str | None:
    """A notice where a format of outlines is asked for, and objects have none."""
    if name != "yolo-seg":
        return None
    shapes = [shape for picture in labelled.pictures for shape in picture.shapes if not shape.crowd]
    if not (without := sum(not shape.segmentation for shape in shapes)):
        return None
    return f"{without} of {len(shapes)} objects have no outline: yolo-seg has the corners of their boxes"


def write_labels(labelled: LabelledPictures, out: Path, name: str, *, place: Place = "copy") -> None:
    """Write labelled pictures in a format.

    Args:
        labelled: what is written.
        out: folder; made where it is missing.
        name: of `ovd.formats.names.FORMATS`.
        place: what becomes of the pictures, in the formats that bring them.

    Raises:
        UserError: what cannot be written.
    """
    if name in DATASETS:
        DATASETS[name](labelled, out, place=place)
    else:
        EXPORTS[name](labelled, out)
