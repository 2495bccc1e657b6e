# SPDX-License-Identifier: Apache-2.0
"""Names of formats, for command lines, which must not wait for the readers' and writers' imports."""

from __future__ import annotations

from pretrain.engine.errors import UserError, did_you_mean

DATASET_FORMATS = ("coco", "yolo", "yolo-seg", "voc")
"""Tools train on these: they come with pictures."""

FORMATS = (*DATASET_FORMATS, "labelme", "cvat", "label-studio", "csv")


def parse_formats(text: str) -> tuple[str, ...]:
    """Value of ``--format``: ``yolo,csv`` → the names.

    Raises:
        UserError: there is none of one of the names.
    """
    names = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip().lower())))
    for name in names:
        if name not in FORMATS:
            raise UserError(
                f"--format {text}: unknown '{name}'{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}"
            )
    if not names:
        raise UserError(f"--format: expected one or more of {', '.join(FORMATS)}, separated by commas")
    return names
