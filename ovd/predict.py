# SPDX-License-Identifier: Apache-2.0
"""``wordbox predict``: detect objects in pictures and folders of pictures.

    wordbox predict photos/ desk.jpg --classes "dog, mug: cup, -poster" --out found/
    wordbox predict photos/ --classes everything --out found/
    wordbox predict photos/ --vocabulary words.txt --out found/ --threshold 0.4
    wordbox predict photos/ --example "my mug=mug1.png" --example "my mug=mug2.png" --out found/

Writes into the output folder:

    results.json     COCO results: image_id, category_id, bbox [x, y, w, h], score, segmentation (RLE)
    images.json      images and categories with their ids, as a COCO annotation file without annotations
    drawn/           the pictures with boxes and masks, without the metadata of the originals
    failed.json      pictures that could not be read, and why (only if there are any)
    FORMAT/          the same in each --format: COCO annotations, YOLO, VOC, LabelMe, CVAT, Label Studio, CSV

Give the same command again to resume an interrupted run. Finished pictures are recognised by their content: one that
was replaced is predicted again, and pictures may be added. A different command (words, threshold, weights, …) is
refused, with the differences. Exit status: 0; 1 if some pictures could not be read; 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from ovd.formats.names import FORMATS, parse_formats
from ovd.picture_files import PictureFiles
from ovd.predict_video import is_video, predict_videos, videos_in
from ovd.query_flags import RARE, add_query_flags, check_words, load_query
from pretrain.engine.errors import BadImageError, UserError, on_one_line, run_cli, shorten, warn
from pretrain.engine.files import (
    alone_in,
    fitting_name,
    read_json,
    sha256_of,
    write_atomically,
    write_json,
    write_problem,
)
from pretrain.engine.flags import CommandParser, integer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ovd.detections import CocoResult
    from ovd.detector import Detector
    from ovd.query import Query
    from ovd.vocabulary import Vocabulary
    from pretrain.data.coco_entries import CocoImage

PARTS = "parts"
ELSEWHERE = {
    "--conf": "--threshold",
    "--imgsz": "--sides",
    "--model": "--weights",
    "--prompt": "--classes",
    "--save-txt": "--format yolo",
    "--source": "PICTURES, without a flag",
    "--text": "--classes",
    "--vid-stride": "--every",
}
"""Flags of other detectors' commands → what they are here."""


class PictureRecord(TypedDict, total=False):
    """Record of a finished picture; one that cannot be used has a ``reason`` in place of results.

    ``sha256`` is that of its file, ``drawn`` the name of its drawing; ``results`` are of image 0.
    """

    file_name: str
    sha256: str | None
    reason: str
    width: int
    height: int
    results: list[CocoResult]
    summary: str
    drawn: str


DESCRIPTION = """\
Detect objects in pictures and folders of pictures. Writes results.json (COCO), images.json and the drawn pictures to
--out; the same command again resumes an interrupted run.

    wordbox predict photos/ desk.jpg --classes "dog, mug: cup, -poster" --out found/
    wordbox predict photos/ --example "my mug=mug1.png" --example "my mug=mug2.png" --out found/
    wordbox predict clip.mp4 --classes dog --out found/         NAME.mp4 with boxes, NAME.jsonl with tracks"""


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox predict",
        DESCRIPTION,
        details=__doc__,
        usage="wordbox predict PICTURES ... --classes WORDS --out FOLDER",
    )
    add = flags.add_argument
    add("pictures", nargs="+",
        help="pictures and folders (searched recursively); or videos, a camera index, a stream URL")  # fmt: skip
    add_query_flags(flags)
    add("--out", type=Path, required=True, help="output folder")
    add("--draw", action=argparse.BooleanOptionalAction, default=True, help="write drawn pictures")
    add("--masks", action=argparse.BooleanOptionalAction, default=True, help="write and draw masks")
    add("--format", metavar="NAMES", help=f"also write these label formats, comma-separated: {', '.join(FORMATS)}")
    add("--tiles", action="store_true", help="also run on overlapping tiles of large pictures, to find small objects")
    add("--tile-side", type=integer(64), metavar="N",
        help="side of a tile in pixels (default: the network's input size)")  # fmt: skip
    add("--every", type=integer(1), default=1, metavar="N", help="process every N-th video frame (default 1)")
    add("--track", action=argparse.BooleanOptionalAction, default=True, help="track objects through a video")
    add("--overwrite", action="store_true", help="replace the results of another command")
    flags.hide(*RARE, "draw", "masks", "tile_side", "track")
    flags.elsewhere = ELSEWHERE
    return flags


def main(argv: list[str]) -> int:
    """Parse, load, predict; returns the exit status."""
    options = parser().parse_args(argv)
    if options.tile_side is not None and not options.tiles:
        raise UserError("--tile-side goes with --tiles")
    if videos := [text for text in options.pictures if is_video(text)]:
        if len(videos) < len(options.pictures):
            raise UserError(f"{videos[0]}: is a video; run pictures and videos separately")
        return predict_videos(options, videos)
    if options.every > 1 or not options.track:
        raise UserError("--every and --no-track are for videos")
    formats = parse_formats(options.format) if options.format is not None else ()
    examples = check_words(options)
    for folder in filter(Path.is_dir, map(Path, options.pictures)):
        if videos := videos_in(folder):
            warn(
                f"{folder}: {len(videos)} videos skipped; give their paths to run them, as in "
                f"wordbox predict {videos[0]}"
            )
    pictures = PictureFiles.collect([Path(text) for text in options.pictures], without=options.out)
    detector, query = load_query(options, examples, masks=options.masks)
    if options.tiles:
        from ovd.tiles import TiledDetector

        detector = TiledDetector(detector, side=options.tile_side)
    failed = predict(
        detector=detector, pictures=pictures, vocabulary=query, out=options.out, threshold=options.threshold,
        draw=options.draw, masks=options.masks, overwrite=options.overwrite,
    )  # fmt: skip
    if formats:
        from ovd.formats.predictions import write_predictions

        write_predictions(options.out, formats, pictures.paths)
    written = ["results.json", *(["drawn/"] if options.draw else []), *(f"{name}/" for name in formats)]
    print(f"in {options.out}: {', '.join(written)}")
    return 1 if failed else 0


def predict(
    *,
    detector: Detector,
    pictures: PictureFiles,
    vocabulary: Query | Vocabulary,
    out: Path,
    threshold: float | None = None,
    draw: bool = True,
    masks: bool = True,
    overwrite: bool = False,
) -> list[dict[str, str]]:
    """Predict pictures into a folder; see the module for what is written.

    Args:
        detector: the detector.
        pictures: what is predicted; image ids in the results are 1, 2, … in their order.
        vocabulary: words, or words and examples; category ids are 1, 2, … in the order of its names.
        out: output folder.
        threshold: lowest score; the calibrated default when None.
        draw: write drawn pictures.
        masks: write and draw masks.
        overwrite: start again where another job has written.

    Returns:
        one ``{"file_name", "reason"}`` per picture that could not be read.

    Raises:
        UserError: the folder belongs to another job, or cannot be written.
    """
    from ovd.query import Query

    query = vocabulary if isinstance(vocabulary, Query) else Query(vocabulary)
    threshold = detector.threshold_for(query, threshold)
    for notice in query.notices:
        warn(notice)
    job = {
        "words or examples": f"{query.hash} ({shorten(', '.join(query.names))})",
        "threshold": round(threshold, 6),
        "weights": "{sha256} {settings}".format_map({"sha256": "", "settings": "", **detector.card}),
        "draw": draw,
        "masks": masks,
    }
    try:
        with alone_in(out):
            parts = _claim_folder(out, job, pictures.ids, overwrite)
            failed = _predict_pictures(
                detector, query, pictures, out=out, parts=parts, threshold=threshold, draw=draw, masks=masks
            )
            _write_results(out, parts, pictures.ids, query, failed)
    except OSError as problem:
        raise UserError(f"{out}: cannot write there: {write_problem(problem, out)}") from problem
    if failed:
        print(
            f"{len(failed)} of {len(pictures)} pictures could not be used; see {out / 'failed.json'}", file=sys.stderr
        )
    return failed


def _predict_pictures(
    detector: Detector,
    query: Query,
    pictures: PictureFiles,
    *,
    out: Path,
    parts: Path,
    threshold: float,
    draw: bool,
    masks: bool,
) -> list[dict[str, str]]:
    """Write a record into ``parts`` for each picture that has no current one; returns those that cannot be used."""
    from ovd.pictures import frame_count

    failed: list[dict[str, str]] = []
    several: list[str] = []
    drawn = drawn_names(pictures.ids)
    for index, name in enumerate(pictures.ids):
        record_file = _record_file(parts, name)
        drawing = out / "drawn" / drawn[index] if draw else None
        digest = _digest(pictures.path(index))
        record = _read_record(record_file)
        if record is None or not _is_current(record, digest, out, drawing):
            record = {"file_name": name, "sha256": digest}
            try:
                pixels = pictures.image(index)
                record |= _predict_picture(detector, query, pixels, threshold=threshold, masks=masks, drawing=drawing)
                several += [name] if frame_count(pictures.path(index)) > 1 else []
            except BadImageError as problem:
                record["reason"] = problem.reason
            if drawing is not None:
                record["drawn"] = drawn[index]
            write_json(record_file, record)
        if "reason" in record:
            failed.append({"file_name": name, "reason": record["reason"]})
        outcome = f"cannot be used: {record['reason']}" if "reason" in record else record["summary"]
        print(on_one_line(f"[{index + 1}/{len(pictures)}] {name}: {outcome}"), flush=True)
    if several:
        warn(f"{len(several)} pictures have several frames or pages; the first was searched (first: {several[0]})")
    return failed


def drawn_names(names: Sequence[str]) -> list[str]:
    """Names of the drawn pictures, all different: ``cat.png`` gives ``cat.jpg``, ``cat.png.jpg`` beside another cat.

    Names that differ only by case count as the same: the folder may be copied to a disk that makes no difference.
    """
    drawn = [f"{Path(name).with_suffix('')}.jpg" for name in names]
    count = Counter(name.casefold() for name in drawn)
    unique = {name for name, times in count.items() if times == 1}
    for index, name in enumerate(names):
        if count[drawn[index].casefold()] > 1:
            head, last = os.path.split(name)
            endings = (".jpg" if number == 1 else f"-{number}.jpg" for number in itertools.count(1))
            choices = (os.path.join(head, fitting_name(last, ending)) for ending in endings)
            drawn[index] = next(choice for choice in choices if choice.casefold() not in unique)
            unique.add(drawn[index].casefold())
    return drawn


def _claim_folder(out: Path, job: Mapping[str, object], names: Sequence[str], overwrite: bool) -> Path:
    """Record the command that writes into the folder, or check that it is the same; returns the folder of records.

    Raises:
        UserError: it holds something else.
    """
    parts = out / PARTS
    stamp = out / "job.json"
    if stamp.is_file() and not overwrite:
        differences = _differences(read_json(stamp, hint="give another --out, or --overwrite"), job, names)
        if differences:
            raise UserError(
                f"{out}: has results of another command: {'; '.join(differences)}. "
                "Give another --out, or --overwrite to replace them"
            )
    elif out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty. Give another --out, or --overwrite to write into it")
    parts.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for old in parts.glob("*.json"):
            old.unlink()
    write_json(stamp, {**job, "pictures": list(names)})
    return parts


def _differences(before: object, job: Mapping[str, object], names: Sequence[str]) -> list[str]:
    """How the command that wrote the folder differs from this one; pictures may be added."""
    if not isinstance(before, dict) or "pictures" not in before:
        return ["it was written by another version"]
    differences = [f"{key} was {before.get(key)}, is {value}" for key, value in job.items() if before.get(key) != value]
    missing = sorted(set(before["pictures"]) - set(names))
    if missing:
        differences.append(f"files differ: {len(missing)} of its pictures are not among these, such as {missing[0]}")
    return differences


def _record_file(parts: Path, name: str) -> Path:
    """Where the record of a picture is kept."""
    return parts / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"


def _digest(path: Path) -> str | None:
    """The sha256 of a picture's file; None if it cannot be read (reading the picture then gives the reason)."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _is_current(record: PictureRecord, digest: str | None, out: Path, drawing: Path | None) -> bool:
    """Whether a record is of this very picture, and its drawing is there. Failures are always tried again."""
    return (
        "reason" not in record
        and digest is not None
        and record.get("sha256") == digest
        and (drawing is None or (drawing == out / "drawn" / str(record.get("drawn")) and drawing.is_file()))
    )


def _read_record(file: Path) -> PictureRecord | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))  # written under another name and renamed: always whole
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(record, dict) and ("reason" in record or isinstance(record.get("results"), list))
    return cast("PictureRecord", record) if whole else None


def _predict_picture(
    detector: Detector, query: Query, pixels: NDArray[np.uint8], *, threshold: float, masks: bool, drawing: Path | None
) -> PictureRecord:
    """A picture's detections, drawn into the file ``drawing``."""
    from ovd.drawing import draw_detections

    detections = detector.answer(pixels, query, threshold=threshold)
    if drawing is not None:
        _save_picture(drawing, draw_detections(pixels, detections, masks=masks))
    counts: dict[str, int] = {}
    for class_name in detections.class_name:
        counts[class_name] = counts.get(class_name, 0) + 1
    summary = ", ".join(f"{class_name} × {count}" for class_name, count in counts.items()) or "nothing found"
    height, width = detections.size
    return {
        "width": width,
        "height": height,
        "results": detections.to_coco(0, masks=masks),  # of no picture: ids are those of the whole command
        "summary": summary,
    }


def _write_results(out: Path, parts: Path, names: Sequence[str], query: Query, failed: list[dict[str, str]]) -> None:
    images: list[CocoImage] = []
    results: list[CocoResult] = []
    for number, name in enumerate(names, 1):
        record = _read_record(_record_file(parts, name))
        if record is not None and "reason" not in record:
            name, width, height = record["file_name"], record["width"], record["height"]
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            results.extend({**row, "image_id": number} for row in record["results"])
    categories = [{"id": i, "name": class_name} for i, class_name in enumerate(query.names, 1)]
    if query.prompt_free is not None and results:  # of all known words only those that were detected
        detected = {row["category_id"] for row in results}
        categories = [category for category in categories if category["id"] in detected]
    write_json(out / "results.json", results)
    write_json(out / "images.json", {"images": images, "annotations": [], "categories": categories})
    if failed:
        write_json(out / "failed.json", failed)
    else:
        (out / "failed.json").unlink(missing_ok=True)


def _save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)  # from bare pixels: no EXIF, no position
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    run_cli(main)
