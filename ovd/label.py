# SPDX-License-Identifier: Apache-2.0
"""``wordbox label``: label a folder of pictures with class names, as a data set that other tools train on.

    wordbox label photos/ --classes "dog, mug: cup" --format yolo --out set/
    yolo detect train data=set/data.yaml

Writes into the output folder:

    data.yaml, images/, labels/   the data set, or what the other formats consist of
    contact_sheet.html            detections of each class, the least certain first: check it before you train
    predictions/                  detections with their scores; the same command resumes from there
    failed.json                   in predictions/: pictures that could not be read, and why

Pictures without detections stay in the data set, as negatives. Every fifth picture, by a hash of its name, goes to the
part ``val``. Give the same command again after an interruption, or after adding pictures, to label what is missing.
Exit status: 0; 1 if some pictures could not be read; 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.formats.names import DATASET_FORMATS
from ovd.query_flags import RARE, add_query_flags, check_words, load_query
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.files import alone_in, read_json, write_atomically, write_json
from pretrain.engine.flags import CommandParser, share

if TYPE_CHECKING:
    from ovd.formats.shapes import LabelledPictures

PREDICTIONS = "predictions"
SHEET = "contact_sheet.html"
STAMP = "label.json"
WRITTEN = ("annotations", "images", "labels", "Annotations", "ImageSets", "JPEGImages", "data.yaml", SHEET)
"""What the formats write: removed when a folder is rewritten with other options."""

DESCRIPTION = """\
Label a folder of pictures with class names, as a data set that other tools train on, with a contact sheet to check; the
same command again resumes an interrupted run.

    wordbox label photos/ --classes "dog, mug: cup" --format yolo --out set/"""


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox label",
        DESCRIPTION,
        details=__doc__,
        usage="wordbox label PICTURES ... --classes WORDS --out FOLDER [options]",
    )
    add = flags.add_argument
    add("pictures", nargs="+", type=Path, help="pictures and folders (searched recursively)")
    add_query_flags(flags)
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the data set")
    add("--format", choices=DATASET_FORMATS, default="yolo", help="label format (default yolo; yolo-seg has outlines)")
    add("--val", type=share, default=0.2, help="fraction of the pictures for the part val (default .2; 0: no split)")
    add("--pictures", dest="picture_mode", choices=("copy", "link"), default="copy",
        help="copy or link them (default copy)")  # fmt: skip
    add("--masks", action=argparse.BooleanOptionalAction, default=None, help="write masks (default: yolo-seg only)")
    add("--overwrite", action="store_true", help="replace the results of another command")
    flags.hide(*RARE, "picture_mode", "masks", "overwrite")
    return flags


def main(argv: list[str]) -> int:
    """Parse, find, write; returns the exit status."""
    options = parser().parse_args(argv)
    from ovd.picture_files import PictureFiles
    from ovd.predict import predict

    out: Path = options.out
    examples = check_words(options)
    pictures = PictureFiles.collect(options.pictures, without=out)
    settings = {"format": options.format, "val": options.val, "pictures": options.picture_mode}
    require_labels_folder(out, settings, overwrite=options.overwrite)
    masks = options.format == "yolo-seg" if options.masks is None else options.masks
    detector, query = load_query(options, examples, masks=masks)
    from ovd.contact_sheet import contact_sheet
    from ovd.formats.predictions import read_predictions
    from ovd.formats.write import outlines_notice, write_labels

    with alone_in(out):
        require_labels_folder(out, settings, overwrite=options.overwrite)  # another command may have come first
        # Only now: what is replaced must not be lost to a typing mistake.
        claim(out, settings, overwrite=options.overwrite)
        failed = predict(
            detector=detector,
            pictures=pictures,
            vocabulary=query,
            out=out / PREDICTIONS,
            threshold=options.threshold,
            draw=False,
            masks=masks,
            overwrite=options.overwrite,
        )
        labelled = with_parts(read_predictions(out / PREDICTIONS, pictures.paths), options.val)
        if not labelled.pictures:
            reasons = out / PREDICTIONS / "failed.json"
            raise UserError(f"none of the {len(pictures)} pictures could be read; see {reasons}")
        if notice := outlines_notice(labelled, options.format):
            warn(notice)
        write_labels(labelled, out, options.format, picture_mode=options.picture_mode)
        page = contact_sheet(
            labelled, title=os.fspath(out.name), threshold=detector.threshold_for(query, options.threshold)
        )
        write_atomically(out / SHEET, page.encode(errors="backslashreplace"))  # names on disk may be no UTF-8
    print(summary(labelled))
    print(f"{options.format} data set in {out}; look through {out / SHEET} before you train on it")
    return 1 if failed else 0


def require_labels_folder(out: Path, settings: dict[str, object], *, overwrite: bool) -> None:
    """Check whether the data set may be written into the folder or resumed there.

    Raises:
        UserError: it holds something else, or a data set of other settings without ``overwrite``.
    """
    stamp = out / STAMP
    if stamp.is_file():
        before = read_json(stamp, hint="give another --out")
        before = before if isinstance(before, dict) else {}
        changed = [
            f"{key} was {before.get(key)}, is {value}" for key, value in settings.items() if before.get(key) != value
        ]
        if changed and not overwrite:
            raise UserError(
                f"{out}: has a data set of another command: {'; '.join(changed)}. Give another --out, or --overwrite "
                "to replace it"
            )
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is not empty, and was not written by wordbox label. Give another --out")


def claim(out: Path, settings: dict[str, object], *, overwrite: bool) -> None:
    """Claim the folder; with ``overwrite`` an earlier data set is removed."""
    if overwrite and (out / STAMP).is_file():
        for name in WRITTEN:
            if (path := out / name).is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    write_json(out / STAMP, settings)


def with_parts(labelled: LabelledPictures, val: float) -> LabelledPictures:
    """The pictures split into train and val by a hash of their names, so that adding pictures moves none."""
    if not val:
        return labelled
    rank = {
        p.id: int.from_bytes(hashlib.sha256(os.fsencode(p.file)).digest()[:8], "big") / 2**64 for p in labelled.pictures
    }
    chosen = {i for i, share_of in rank.items() if share_of < val}
    if len(rank) > 1 and val < 1:  # few pictures: each part has one
        chosen = chosen or {min(rank, key=rank.__getitem__)}
        chosen = chosen if len(chosen) < len(rank) else chosen - {max(rank, key=rank.__getitem__)}
    pictures = tuple(replace(p, part="val" if p.id in chosen else "train") for p in labelled.pictures)
    return replace(labelled, pictures=pictures)


def summary(labelled: LabelledPictures) -> str:
    """How often each class was found."""
    count: Counter[str] = Counter(shape.name for picture in labelled.pictures for shape in picture.shapes)
    without = sum(not picture.shapes for picture in labelled.pictures)
    lines = [f"{name}: {count[name]}" for name in labelled.names]
    return "\n".join([*lines, f"{len(labelled.pictures)} pictures, {without} of them without any"])


if __name__ == "__main__":
    run_cli(main)
