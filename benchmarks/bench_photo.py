# SPDX-License-Identifier: Apache-2.0
"""A new photo of 480x640 and 20 words, file to boxes, in turns with YOLO-World-S v2 of random weights.

python benchmarks/bench_photo.py --threads 1 --yolo-python OTHER/bin/python
python benchmarks/bench_photo.py --threads 1 --runtimes torch onnx onnx-int8    # of ours, in turns

OTHER is an environment with `ultralytics` (AGPL-3.0): `python -m venv OTHER; OTHER/bin/pip install ultralytics`.
Without it only our own times are taken. The photos are the page's examples, brought to 640x480, and their mirror
images; words are embedded before, as both do once for all photos.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from _common import ROOT, milliseconds, parser, ratio, report, set_threads, show_ratio, take_turns

from ovd.runtime.choice import Runtime

if TYPE_CHECKING:
    from ovd import Detector

WORDS = (
    "person, dog, cat, horse, car, bus, chair, couch, dining table, cup, bottle, wine glass, tv, laptop, book, clock, "
    "potted plant, guitar, drum, lamp"
)  # fmt: skip


def photos(folder: Path) -> list[Path]:
    """JPEG files of 640x480: the page's examples and their mirror images."""
    from PIL import Image, ImageOps

    files = []
    for source in sorted((ROOT / "ovd/demo/examples/photos").glob("*.jpg")):
        for turned in (False, True):
            with Image.open(source) as picture:
                fitted = ImageOps.fit(picture.convert("RGB"), (640, 480))
            files.append(folder / f"{source.stem}-{int(turned)}.jpg")
            (ImageOps.mirror(fitted) if turned else fitted).save(files[-1], quality=90)
    return files


class YoloWorld:
    """The other detector, in its own interpreter."""

    def __init__(self, python: str, *, words: int, threads: int) -> None:
        command = [python, str(ROOT / "benchmarks/yolo_world.py"), str(words), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parameters = int(self._answer()["parameters"])

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("error: the other interpreter ended; has it got ultralytics?")

    def __call__(self, files: Iterator[Path]) -> None:
        """One photo."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{next(files)}\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End its process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def ours(detector: Detector, files: Iterator[Path], *, words: str) -> None:
    """One photo."""
    detector.find(next(files), words)


def main() -> None:
    """Take turns, print the ratio."""
    flags = parser(__doc__ or "", weights=True)
    flags.add_argument("--yolo-python", metavar="FILE", help="interpreter of an environment with ultralytics")
    flags.add_argument(
        "--sides", type=int, nargs="+", metavar="N", help="of the photo in our proposal network (default: as shipped)"
    )
    flags.add_argument(
        "--runtimes", choices=get_args(Runtime), nargs="+", default=["auto"], help="of ours (default: auto)"
    )
    flags.add_argument("--words", default=WORDS, help="comma-separated (default: 17 of COCO's and 3 others)")
    options = flags.parse_args()
    threads = options.threads or 1
    set_threads(threads)
    from ovd import Detector

    detectors = {
        "ours" if len(options.runtimes) == 1 else f"ours, {runtime}": Detector.load(
            options.weights, device="cpu", runtime=runtime, threads=threads, cache_size=0, sides=options.sides
        )
        for runtime in options.runtimes
    }
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder))
        alternatives = {
            name: partial(ours, one, itertools.cycle(files), words=options.words) for name, one in detectors.items()
        }
        other = None
        if options.yolo_python:
            other = YoloWorld(options.yolo_python, words=len(options.words.split(",")), threads=threads)
            alternatives["yolo-world"] = partial(other, itertools.cycle(files))
        seconds = take_turns(alternatives, rounds=options.rounds or 32, warmup=4)
        if other is not None:
            other.close()
    rows = []
    for name, times in seconds.items():
        value = milliseconds(times)
        rows.append((f"{name}, p50 / p95", f"{value['p50_ms']:,.0f} / {value['p95_ms']:,.0f} ms", ""))
    figures: dict[str, object] = {name: milliseconds(times) for name, times in seconds.items()}
    first, *rest = detectors
    for name in rest:
        figures[f"{name} over {first}"] = compared = ratio(seconds[name], seconds[first])
        rows.append((f"{name} / {first}", show_ratio(compared), ""))
    for name in detectors if other is not None else ():
        figures[f"{name} over yolo-world"] = compared = ratio(seconds[name], seconds["yolo-world"])
        rows.append((f"{name} / YOLO-World-S v2", show_ratio(compared), "aim: at most .5"))
    count = len(options.words.split(","))
    title = f"A new photo of 640x480, {count} words, file to boxes; {options.weights}, {threads} threads"
    report(title, rows, figures, options.json)


if __name__ == "__main__":
    main()
