# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.predict``: name what is in pictures and folders of pictures.

    python -m ovd.predict photos/ desk.jpg --classes "dog, mug: cup, -poster" --out found/
    python -m ovd.predict photos/ --vocabulary words.txt --out found/ --threshold 0.4
    python -m ovd.predict photos/ --example "my mug=mug1.png" --example "my mug=mug2.png" --out found/

Writes into the output folder:

    results.json     COCO results: image_id, category_id, bbox [x, y, w, h], score, segmentation (RLE)
    images.json      images and categories with their ids, as a COCO annotation file without annotations
    drawn/           the pictures with boxes and masks, without the metadata of the originals
    failed.json      pictures that could not be read, and why (only when there are some)

An interrupted run continues where it stopped when the same command is given again. Exit status: 0; 1 when some pictures
could not be read (all others are done); 2 when nothing could be started.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import BadImageError, UserError, run_cli
from pretrain.engine.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ovd.detections import Detections
    from ovd.detector import Detector
    from ovd.examples import Question
    from ovd.vocabulary import Vocabulary

PARTS = "parts"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    flags = argparse.ArgumentParser(
        prog="python -m ovd.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("pictures", nargs="+", type=Path, help="picture files and folders (searched with sub folders)")
    words = flags.add_mutually_exclusive_group()
    words.add_argument("--classes", help='"dog, mug: cup, -poster": synonyms after a colon, minus excludes')
    words.add_argument("--vocabulary", type=Path, help="file with names, one a line, or a saved vocabulary (.json)")
    flags.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="[NAME=]CROP",
        help="a picture of the thing to find, may be given often, also beside words; crops of one NAME are averaged, "
        "the file's name is the default; --example=-NAME=CROP excludes",
    )
    flags.add_argument("--out", type=Path, required=True, help="output folder")
    flags.add_argument("--threshold", type=float, default=None, help="lowest score (default: the calibrated one)")
    flags.add_argument("--weights", default="default", help="name of shipped weights, or a folder written by ovd.train")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    flags.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    flags.add_argument("--draw", action=argparse.BooleanOptionalAction, default=True, help="write drawn pictures")
    flags.add_argument("--masks", action=argparse.BooleanOptionalAction, default=True, help="write and draw masks")
    flags.add_argument("--overwrite", action="store_true", help="replace what another command wrote into the folder")
    return flags


def main(argv: list[str]) -> int:
    """Parse, load, predict; returns the exit status."""
    options = parser().parse_args(argv)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold}: must be between 0 and 1")
    if options.vocabulary is None and options.classes is None and not options.example:
        raise UserError('nothing to look for: give --classes "mug, lamp", --vocabulary FILE or --example CROP')
    files = collect(options.pictures)
    from ovd.examples import parse_examples
    from ovd.vocabulary import Vocabulary

    examples = parse_examples([named_example(text) for text in options.example])
    # Mistakes in words are told before the network is loaded; what is asked is read again, with the network's prompts.
    if options.vocabulary is not None:
        Vocabulary.load(options.vocabulary)
    elif not any(not e.negative for e in examples):
        Vocabulary.parse(options.classes or "")
    import torch

    from ovd.detector import Detector

    if options.threads:
        torch.set_num_threads(max(1, options.threads))
    detector = Detector.load(options.weights, device=options.device, masks=options.masks, cache_size=0)
    words: Vocabulary | str | None = options.classes
    if options.vocabulary is not None:
        words = Vocabulary.load(options.vocabulary, templates=detector.templates)
    failed = predict(
        detector=detector,
        files=files,
        vocabulary=detector.question(words, examples),
        out=options.out,
        threshold=options.threshold,
        draw=options.draw,
        masks=options.masks,
        overwrite=options.overwrite,
    )
    return 1 if failed else 0


def named_example(text: str) -> tuple[str, Path]:
    """``NAME=CROP`` or ``CROP`` → (name, path); a file whose own name has an equals sign needs a NAME in front.

    Raises:
        UserError: no such file.
    """
    name, equals, file = text.partition("=")
    path = Path(file if equals else text)
    if not path.is_file():
        raise UserError(f"--example {text}: no such file {str(path)!r}; expected NAME=CROP or CROP, e.g. mug=mug.png")
    return (name if equals and name.strip() else path.stem), path


def collect(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (name, path) of every picture; the name is the path inside its folder, and unique.

    Raises:
        UserError: a path does not exist, or a folder holds no picture.
    """
    from pretrain.data.folder import list_images

    found: dict[str, Path] = {}
    for place in given:
        if place.is_dir():
            inside = [(path.relative_to(place).as_posix(), path) for path in list_images(place)]
        elif place.is_file():
            inside = [(place.name, place)]
        else:
            raise UserError(f"{place}: no such file or folder")
        for name, path in inside:
            if found.setdefault(name, path).resolve() != path.resolve():
                raise UserError(f"two pictures would be called {name!r}: {found[name]} and {path}; run them separately")
    return list(found.items())


def predict(
    *,
    detector: Detector,
    files: Sequence[tuple[str, Path]],
    vocabulary: Question | Vocabulary,
    out: Path,
    threshold: float | None = None,
    draw: bool = True,
    masks: bool = True,
    overwrite: bool = False,
) -> list[dict[str, str]]:
    """Predict pictures into a folder; see the module for what is written.

    Args:
        detector: the detector.
        files: (name, path) pairs; ids are 1, 2, … in this order.
        vocabulary: words, or words and examples; category ids are 1, 2, … in the order of its names.
        out: output folder.
        threshold: lowest score; the calibrated default when None.
        draw: write drawn pictures.
        masks: write and draw masks.
        overwrite: start anew where another job has written.

    Returns:
        One ``{"file_name", "reason"}`` per picture that could not be read.

    Raises:
        UserError: the folder belongs to another job, or cannot be written.
    """
    from ovd.examples import Question

    question = vocabulary if isinstance(vocabulary, Question) else Question(vocabulary)
    level = detector.threshold_of(question) if threshold is None else threshold
    names = [name for name, _ in files]
    drawn = drawn_names(names)
    job = {
        "files": hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest(),
        "vocabulary": question.hash,
        "threshold": round(level, 6),
        "weights": str(detector.card.get("sha256", "")),
        "draw": draw,
        "masks": masks,
    }
    try:
        parts = _claim(out, job, overwrite)
        failed: list[dict[str, str]] = []
        for number, (name, path) in enumerate(files, 1):
            part = parts / f"{number:08d}.json"
            record = _finished(part)
            if record is None:
                target = out / "drawn" / drawn[number - 1] if draw else None
                record = _one(detector, question, number, name, path, target, level, masks)
                _write_json(part, record)
            if "reason" in record:
                failed.append({"file_name": name, "reason": record["reason"]})
            said = f"cannot be used: {record['reason']}" if "reason" in record else record["summary"]
            print(f"[{number}/{len(files)}] {name}: {said}", flush=True)
        _merge_parts(out, parts, names, question, failed)
    except OSError as problem:
        raise UserError(f"{out}: cannot write there: {problem.strerror or problem}") from problem
    if failed:
        print(f"{len(failed)} of {len(files)} pictures could not be used; see {out / 'failed.json'}", file=sys.stderr)
    return failed


def drawn_names(names: Sequence[str]) -> list[str]:
    """Names of the drawn pictures: ``cat.png`` gives ``cat.jpg``, and ``cat.png.jpg`` where there is another cat."""
    stems = [str(Path(name).with_suffix("")) for name in names]
    count = Counter(stems)
    return [f"{stem if count[stem] == 1 else name}.jpg" for name, stem in zip(names, stems, strict=True)]


def _claim(out: Path, job: dict[str, Any], overwrite: bool) -> Path:
    """Make the folder ours, or find out that it already is; returns the folder of finished parts."""
    parts = out / PARTS
    stamp = out / "job.json"
    if stamp.is_file() and not overwrite:
        try:
            other = json.loads(stamp.read_text(encoding="utf-8"))
        except ValueError:
            other = {}
        changed = [key for key in job if other.get(key) != job[key]]
        if changed:
            raise UserError(
                f"{out}: holds results of another command ({', '.join(changed)} differ). "
                "Give another --out, or --overwrite to replace them"
            )
    elif out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty. Give another --out, or --overwrite to write into it")
    parts.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for old in parts.glob("*.json"):
            old.unlink()
    _write_json(stamp, job)
    return parts


def _finished(part: Path) -> dict[str, Any] | None:
    if not part.is_file():
        return None
    record = json.loads(part.read_text(encoding="utf-8"))  # written under another name and renamed: always whole
    return record if isinstance(record, dict) else None


def _one(
    detector: Detector,
    question: Question,
    number: int,
    name: str,
    path: Path,
    target: Path | None,
    threshold: float,
    masks: bool,
) -> dict[str, Any]:
    from ovd.pictures import to_rgb

    try:
        pixels = to_rgb(path)
    except BadImageError as problem:
        return {"file_name": name, "reason": problem.reason}
    found = detector.answer(pixels, question, threshold=threshold)
    if target is not None:
        _save_picture(target, draw_detections(pixels, found, masks=masks))
    counts: dict[str, int] = {}
    for class_name in found.class_name:
        counts[class_name] = counts.get(class_name, 0) + 1
    summary = ", ".join(f"{class_name} × {count}" for class_name, count in counts.items()) or "nothing found"
    height, width = found.size
    return {
        "file_name": name,
        "width": width,
        "height": height,
        "results": found.to_coco(number, masks=masks),
        "summary": summary,
    }


def _merge_parts(
    out: Path, parts: Path, names: Sequence[str], question: Question, failed: list[dict[str, str]]
) -> None:
    images, results = [], []
    for number in range(1, len(names) + 1):
        record = _finished(parts / f"{number:08d}.json")
        if record is not None and "reason" not in record:
            images.append({"id": number, **{key: record[key] for key in ("file_name", "width", "height")}})
            results.extend(record["results"])
    categories = [{"id": i + 1, "name": class_name} for i, class_name in enumerate(question.names)]
    _write_json(out / "results.json", results)
    _write_json(out / "images.json", {"images": images, "annotations": [], "categories": categories})
    if failed:
        _write_json(out / "failed.json", failed)
    else:
        (out / "failed.json").unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    # File names of a disk may be no UTF-8; they come back as the bytes they were.
    write_atomically(path, json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape"))


def _save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)  # from bare pixels: no EXIF, no position
    write_atomically(path, buffer.getvalue())


def draw_detections(pixels: NDArray[np.uint8], found: Detections, *, masks: bool = True) -> NDArray[np.uint8]:
    """Draw boxes, masks and labels onto a copy of the picture.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        found: its detections.
        masks: fill the masks.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    from ovd.colours import class_styles

    height, width = pixels.shape[:2]
    styles = class_styles(found.names)
    canvas = pixels.copy()
    if masks:
        for i in reversed(range(len(found))):  # the best score is drawn last, on top
            mask = found.mask_of(i)
            if mask is not None:
                colour = np.array(styles[found.class_id[i]].rgb, dtype=np.float32)
                canvas[mask] = (canvas[mask] * 0.6 + colour * 0.4 + 0.5).astype(np.uint8)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    line = max(2, round(min(height, width) / 200))
    size = max(11, round(min(height, width) / 32))
    for i in reversed(range(len(found))):
        style = styles[found.class_id[i]]
        x1, y1, x2, y2 = (float(v) for v in found.xyxy[i])
        corners = (round(x1), round(y1), max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1))
        pen.rectangle(corners, outline="white", width=line + 2)
        pen.rectangle(corners, outline=style.colour, width=line)
        text = f"{found.class_name[i]} {found.confidence[i]:.2f}"
        ink = Image.fromarray(text_coverage(text, size))
        w, h = ink.width + 8, ink.height + 4
        x = min(max(0, corners[0]), max(0, width - w))
        y = corners[1] - h if corners[1] >= h else max(0, corners[1])
        pen.rectangle((x, y, x + w, y + h), fill=style.colour)
        pen.bitmap((x + 4, y + 2), ink, fill=style.ink)
    return np.asarray(image)


def text_coverage(text: str, size: int) -> NDArray[np.uint8]:
    """Draw one line of text in any script.

    OpenCV 5 carries a font with Latin, Cyrillic, Greek, CJK and more letters; with OpenCV 4 Pillow's own font is used,
    which draws an empty box for what it lacks.

    Args:
        text: the line.
        size: letter height in pixels.

    Returns:
        (h, w) uint8, 255 where the ink covers a pixel wholly.
    """
    import cv2
    import numpy as np

    if hasattr(cv2, "FontFace"):
        face = cv2.FontFace("uni")
        x, y, w, h = cv2.getTextSize((1, 1), text, (0, 0), face, size, 600)
        canvas = np.zeros((h, w, 3), dtype=np.uint8)
        cv2.putText(canvas, text, (-x, -y), (255, 255, 255), face, size, 600)
        return canvas[:, :, 0]
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return np.asarray(image)


if __name__ == "__main__":
    run_cli(main)
