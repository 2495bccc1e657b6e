# SPDX-License-Identifier: Apache-2.0
"""``wordbox convert``: a labelled data set in another format.

    wordbox convert roboflow/data.yaml --to coco --out as_coco/
    wordbox convert VOC2012/ --to yolo --out as_yolo/ --part train
    wordbox convert boxes.json --images photos/ --to voc --out as_voc/ --pictures link

Sources are COCO's ``.json``, YOLO's ``data.yaml`` and folders of both and of Pascal VOC's, Roboflow's and Label
Studio's exports among them. Every entry is read and checked before anything is written. Classes keep their order; ids
are numbered from 1. What a format cannot hold is left out: crowds in YOLO, outlines in YOLO (``yolo-seg`` keeps them)
and VOC, the second half of a pixel in VOC.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.formats.names import DATASET_FORMATS, FORMATS
from pretrain.engine.errors import BadImageError, UserError, run_cli, warn
from pretrain.engine.files import alone_in
from pretrain.engine.flags import CommandParser

if TYPE_CHECKING:
    from ovd.formats.shapes import LabelledPictures


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox convert",
        "A labelled data set in another format.",
        details=__doc__,
        usage="wordbox convert SOURCE --to FORMAT --out FOLDER [options]",
    )
    add = flags.add_argument
    add("source", type=Path, metavar="SOURCE", help="COCO .json, YOLO data.yaml, or the folder of a data set")
    add("--to", required=True, metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("--out", required=True, type=Path, metavar="FOLDER", help="where it is written; new or empty")
    add("--from", dest="kind", choices=("coco", "yolo", "voc"), help="what SOURCE is (default: recognised)")
    add("--images", type=Path, metavar="FOLDER", help="the pictures of COCO or VOC files (default: looked for)")
    add("--part", default="all", help="train, val or test (default all)")
    add("--pictures", choices=("copy", "link", "none"), default="copy",
        help=f"what becomes of them in {', '.join(DATASET_FORMATS)} (default copy)")  # fmt: skip
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    return flags


def main(argv: list[str]) -> int:
    """Read, check, write; returns the exit status."""
    options = parser().parse_args(argv)
    out: Path = options.out
    require_room(out, overwrite=options.overwrite)
    from ovd.formats.labels import PARTS
    from ovd.formats.read import read_labels
    from ovd.formats.shapes import labelled_pictures
    from ovd.formats.write import outlines_notice, write_labels
    from pretrain.data.folder import backslash_hint

    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images {options.images}: no such folder")
    labels = read_labels(options.source, kind=options.kind, images=options.images, part=options.part)
    labelled = labelled_pictures(labels)
    if not labelled.pictures:
        raise UserError(f"{labels.where}: has no pictures; there is nothing to convert")
    missing = [picture.source for picture in labelled.pictures if not picture.source.is_file()]
    if missing and options.pictures != "none" and options.to in DATASET_FORMATS:
        folder = f"another --images than {options.images}" if options.images is not None else "their folder by --images"
        raise UserError(
            f"{labels.where}: {len(missing)} of {len(labelled.pictures)} pictures are not there (first: {missing[0]}); "
            f"give {folder}, or --pictures none.{backslash_hint(missing[0])}"
        )
    for notice in (*labelled.notices, *picture_notices(labelled)):
        warn(f"{labels.where}: {notice}")
    crowds = sum(shape.crowd for picture in labelled.pictures for shape in picture.shapes)
    if crowds and options.to.startswith("yolo"):
        warn(f"{crowds} crowds (or difficult objects) are left out: YOLO knows none")
    parts = Counter(picture.part for picture in labelled.pictures)
    unlisted = {part: count for part, count in parts.items() if part not in PARTS}
    if options.to.startswith("yolo") and unlisted and len(unlisted) < len(parts):
        named = ", ".join(f"{count} of {part or 'no part'}" for part, count in unlisted.items())
        warn(f"not in data.yaml, which has train, val and test: {named} (--part chooses)")
    if boxes_only := outlines_notice(labelled, options.to):
        warn(f"{labels.where}: {boxes_only}")
    with alone_in(out):
        require_room(out, overwrite=options.overwrite)  # another command may have written since
        write_labels(labelled, out, options.to, picture_mode=options.pictures)
    objects = sum(len(picture.shapes) for picture in labelled.pictures)
    print(
        f"{labels.kind} → {options.to}: {len(labelled.pictures)} pictures, {objects} objects, "
        f"{len(labelled.names)} classes in {out}"
    )
    return 0


def require_room(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: it does, and is not to be overwritten; or it is a file.
    """
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out}: is not empty. Give another --out, or --overwrite to write into it")


def picture_notices(labelled: LabelledPictures) -> list[str]:
    """Notices on pictures that cannot be read, or are not of the size by which their labels are divided."""
    from ovd.pictures import upright_size

    unread, other = [], []
    for picture in labelled.pictures:
        if not picture.source.is_file():
            continue
        try:
            actual = upright_size(picture.source)
        except BadImageError as problem:
            unread.append(str(problem))
            continue
        if actual != picture.size:
            (height, width), (stated_height, stated_width) = actual, picture.size
            other.append(f"{picture.source}: {width} × {height} pixels upright, not {stated_width} × {stated_height}")
    total, notices = len(labelled.pictures), []
    if unread:
        notices.append(f"{len(unread)} of {total} pictures cannot be read (first: {unread[0]})")
    if other:
        text = "pictures are not of the size that their labels say, so that boxes may come out wrong"
        notices.append(f"{len(other)} of {total} {text} (first: {other[0]})")
    return notices


if __name__ == "__main__":
    run_cli(main)
