# SPDX-License-Identifier: Apache-2.0
"""Detections of ``wordbox predict`` as labelled pictures, for the writers of other formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ovd.formats.labels import Labels
from ovd.formats.shapes import LabelledPictures, labelled_pictures
from ovd.formats.write import outlines_notice, write_labels
from pretrain.engine.errors import warn
from pretrain.engine.files import read_json


def read_predictions(out: Path, sources: Mapping[str, Path]) -> LabelledPictures:
    """Detections of an output folder, with their scores.

    Args:
        out: holds ``images.json`` and ``results.json``.
        sources: the name of each picture → where it lies.

    Raises:
        UserError: a file is missing or damaged.
    """
    hint = "wordbox predict writes it"
    content = read_json(out / "images.json", hint=hint)
    results = read_json(out / "results.json", hint=hint)
    content["annotations"] = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, 1)
    ]
    labels = Labels(content=content, root=out, kind="coco", where=str(out / "results.json"))
    return labelled_pictures(labels, sources=sources)


def write_predictions(out: Path, formats: Sequence[str], sources: Mapping[str, Path]) -> None:
    """Write the detections of an output folder into a folder of it for each format, without pictures.

    Args:
        out, sources: see `read_predictions`.
        formats: of `ovd.formats.names.FORMATS`.

    Raises:
        UserError: see `read_predictions`, or what cannot be written.
    """
    predictions = read_predictions(out, sources)
    for name in formats:
        if notice := outlines_notice(predictions, name):
            warn(notice)
        write_labels(predictions, out / name, name, picture_mode="none")
