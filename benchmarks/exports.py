# SPDX-License-Identifier: Apache-2.0
"""Two exports of a detector of photographs against each other: a photo of 640×480, in pairs.

    wordbox export --format onnx --output /tmp/float
    wordbox export --format onnx --int8 --output /tmp/int8
    python benchmarks/exports.py /tmp/float /tmp/int8 --threads 2

On a crowded machine the processor's time (of all threads together) says more than the clock.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import cv2
from _common import photo, timed

WORDS = "person, dog, cat, car, chair, table, cup, bottle, tree, grass"


def main() -> int:
    """Print the ratios of the first export's times to the second's."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("exports", nargs=2, type=Path, metavar="FOLDER", help="written by wordbox export")
    flags.add_argument("--threads", type=int, default=1, help="(default 1)")
    flags.add_argument("--pairs", type=int, default=10, help="(default 10)")
    options = flags.parse_args()
    from ovd.detector import Detector

    cv2.setNumThreads(options.threads)
    picture = photo()
    both = [Detector.load(one, runtime="onnx", threads=options.threads, cache_size=0) for one in options.exports]
    queries = [detector.query(WORDS) for detector in both]
    times = [
        [timed(partial(detector.answer, picture, query)) for detector, query in zip(both, queries, strict=True)]
        for _ in range(options.pairs + 1)
    ]
    for number, clock in enumerate(("clock", "processor")):
        ratios = sorted(first[number] / second[number] for first, second in times[1:])  # the first loads the graphs
        print(f"threads {options.threads}, first / second by the {clock}: median {statistics.median(ratios):.2f}, "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f}")  # fmt: skip
    for folder in options.exports:
        print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
