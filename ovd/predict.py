# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.predict PICTURE|FOLDER … --classes "dog, mug: cup" --out DIR``: boxes for many pictures.

Writes ``results.json`` (COCO results), ``images.json`` (which id is which file), and one drawing per picture. The same
command again goes on where it was stopped. Pictures that cannot be read are listed in ``bad_images.jsonl`` and do not
stop the rest; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import BadImageError, UserError, run_cli

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ovd.detector import Detections, Detector

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_pictures(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """(file, name in the output) of every picture; folders are searched, hidden files left out.

    Raises:
        UserError: a path does not exist, or nothing is found.
    """
    found: list[tuple[Path, str]] = []
    for item in paths:
        path = Path(item)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found += [(p, p.relative_to(path).as_posix()) for p in inside if not p.name.startswith(".")]
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise UserError(f"{path}: no such picture or folder")
    if not found:
        raise UserError(f"no picture found ({', '.join(SUFFIXES)}) in {', '.join(str(p) for p in paths)}")
    names = [name for _, name in found]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"two pictures would both be called {twice[0]!r} in the output; run them one folder at a time")
    return found


def draw(image: NDArray[np.uint8], detections: Detections) -> NDArray[np.uint8]:
    """The picture with masks, boxes and labels; colours follow the names, sizes follow the picture.

    Args:
        image: (H, W, 3) RGB.
        detections: of this picture.
    """
    import cv2
    import numpy as np

    from ovd.colours import class_styles

    canvas = np.ascontiguousarray(image.copy())
    height, width = canvas.shape[:2]
    line = max(1, round(min(height, width) / 240))
    size = max(11, round(min(height, width) / 30))
    styles = dict(zip(detections.names, class_styles(detections.names), strict=True))
    for i in reversed(range(len(detections))):  # the best on top
        style = styles[detections.class_name[i]]
        mask = detections.mask_of(i)
        if mask is not None:
            canvas[mask] = (0.65 * canvas[mask] + 0.35 * np.array(style.rgb)).astype(np.uint8)
        x1, y1, x2, y2 = (round(float(v)) for v in detections.xyxy[i])
        cv2.rectangle(canvas, (x1, y1), (x2, y2), (0, 0, 0), line + 2)  # a dark rim shows on any picture
        cv2.rectangle(canvas, (x1, y1), (x2, y2), style.rgb, line)
    for i in reversed(range(len(detections))):
        style = styles[detections.class_name[i]]
        x1, y1 = (round(float(v)) for v in detections.xyxy[i][:2])
        _label(
            canvas, f"{detections.class_name[i]} {detections.confidence[i]:.2f}", (x1, y1), size, style.rgb, style.ink
        )
    return canvas


def _label(
    canvas: NDArray[np.uint8], text: str, at: tuple[int, int], size: int, fill: tuple[int, ...], ink: str
) -> None:
    """Text on a filled bar above ``at``, or below it at the upper edge of the picture."""
    import cv2

    colour = (0, 0, 0) if ink == "#000000" else (255, 255, 255)
    x, y = max(at[0], 0), at[1]
    top = y - size - 5 if y >= size + 5 else max(y, 0)
    if hasattr(cv2, "FontFace"):  # OpenCV 5: its built-in Unicode face knows Greek, Cyrillic and Chinese
        face = cv2.FontFace("uni")
        _, _, wide, _ = cv2.getTextSize((0, 0), text, (0, 0), face, size, 400)
        x = max(0, min(x, canvas.shape[1] - wide - 6))
        cv2.rectangle(canvas, (x, top), (x + wide + 6, top + size + 5), fill, -1)
        cv2.putText(canvas, text, (x + 3, top + size), colour, face, size, 400)
        return
    scale = size / 22
    (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x = max(0, min(x, canvas.shape[1] - wide - 6))
    cv2.rectangle(canvas, (x, top), (x + wide + 6, top + size + 5), fill, -1)
    cv2.putText(canvas, text, (x + 3, top + size), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)


class Output:
    """The output folder; ``results.jsonl`` is the record of what is done, one line per picture.

    Args:
        folder: new, empty, or of a run with the same settings.
        settings: what decides the results; another run's folder is refused.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.lines = folder / "results.jsonl"
        self.bad = folder / "bad_images.jsonl"
        record = folder / "run.json"
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if record.is_file():
            old = json.loads(record.read_text(encoding="utf-8"))
            changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
            if changed:
                raise UserError(f"--out {folder} holds a run with other {', '.join(changed)}; choose another folder")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder} is not empty; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_text(text, encoding="utf-8")
        self.done: dict[str, dict[str, Any]] = {}
        for line in self._whole_lines(self.lines):
            entry = json.loads(line)
            self.done[entry["file"]] = entry
        self.known_bad = {json.loads(line)["file"] for line in self._whole_lines(self.bad)}

    @staticmethod
    def _whole_lines(path: Path) -> list[str]:
        """Lines that end; a half-written last line of a killed run is cut off, its picture is done again."""
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        return whole.splitlines()

    def add(self, name: str, size: tuple[int, int], rows: list[dict[str, Any]]) -> None:
        """Record one picture."""
        entry = {"file": name, "height": size[0], "width": size[1], "rows": rows}
        with self.lines.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.done[name] = entry

    def add_bad(self, name: str, why: str) -> None:
        """Record a picture that cannot be read, once."""
        if name not in self.known_bad:
            with self.bad.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"file": name, "error": why}, ensure_ascii=False) + "\n")
            self.known_bad.add(name)

    def finish(self, names: Sequence[str], classes: Sequence[str]) -> None:
        """Write ``results.json`` and ``images.json`` whole; ids follow the order of ``names``, from 1."""
        images, results = [], []
        for image_id, name in enumerate(names, start=1):
            entry = self.done.get(name)
            if entry is None:
                continue
            images.append({"id": image_id, "file_name": name, "height": entry["height"], "width": entry["width"]})
            results += [{**row, "image_id": image_id} for row in entry["rows"]]
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        for path, content in (
            (self.folder / "images.json", {"images": images, "categories": categories}),
            (self.folder / "results.json", results),
        ):
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            partial.replace(path)


def predict_folder(
    detector: Detector, pictures: Sequence[tuple[Path, str]], out: Output, *, threshold: float | None, drawings: bool
) -> int:
    """Run every picture that is not done; returns how many could not be read."""
    from PIL import Image

    from ovd.detector import to_rgb

    bad = 0
    for path, name in pictures:
        if name in out.done:
            continue
        try:
            image = to_rgb(path)
        except BadImageError as problem:
            out.add_bad(name, str(problem))
            print(f"warning: {problem}", file=sys.stderr)
            bad += 1
            continue
        found = detector.detect(image, threshold)
        if drawings:
            target = out.folder / "drawings" / f"{name}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(image, found)).save(target, quality=92)  # pixels only: no EXIF, no place of the photo
        out.add(name, found.size, found.to_coco(0))
        counts = {word: found.class_name.count(word) for word in found.names if word in found.class_name}
        shown = ", ".join(f"{count} {word}" for word, count in counts.items()) or "nothing found"
        print(f"{name}: {shown}")
    return bad


def main(argv: list[str]) -> int:
    """Entry point; 0, or 1 when some pictures could not be read."""
    parser = argparse.ArgumentParser(prog="python -m ovd.predict", description=__doc__)
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE|FOLDER", help="JPEG, PNG, WebP or BMP files, or folders"
    )
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--classes", help='"dog, mug: cup, coffee mug; -poster", as on the page')
    words.add_argument("--vocabulary", metavar="FILE.json", help="a saved vocabulary")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of a stopped run")
    parser.add_argument("--weights", default="default", help="shipped weights by name, or an exported folder")
    parser.add_argument("--threshold", type=float, help="lowest score (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--no-drawings", action="store_true", help="write the JSON files only")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0.0 <= args.threshold <= 1.0:
        raise UserError(f"--threshold {args.threshold}: must be between 0 and 1")
    pictures = find_pictures(args.pictures)

    from ovd.detector import Detector
    from ovd.vocabulary import Vocabulary

    detector = Detector.load(args.weights, device=args.device)
    given = Vocabulary.load(args.vocabulary, templates=detector.templates) if args.vocabulary else args.classes
    vocabulary = detector.set_classes(given)
    for notice in vocabulary.notices:
        print(f"note: {notice}", file=sys.stderr)
    settings = {
        "classes": vocabulary.hash,
        "weights": detector.card.get("sha256", str(args.weights)),
        "threshold": detector.threshold if args.threshold is None else args.threshold,
        "pictures": hashlib.sha256("\n".join(name for _, name in pictures).encode()).hexdigest(),
    }
    out = Output(Path(args.out), settings)
    bad = predict_folder(detector, pictures, out, threshold=args.threshold, drawings=not args.no_drawings)
    out.finish([name for _, name in pictures], vocabulary.names)
    print(f"{len(out.done)} pictures, results in {out.folder / 'results.json'}")
    if bad:
        print(f"warning: {bad} pictures could not be read; see {out.bad}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    run_cli(main)
