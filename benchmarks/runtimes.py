# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime against torch: a photo of 640×480 with 20 words, in pairs.

    wordbox export --format onnx
    python benchmarks/runtimes.py --threads 1
    python benchmarks/runtimes.py --threads 2

Words are embedded before anything is timed. Each pair is the two runtimes one after the other.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import cv2
from _common import photo, timed

WORDS = (
    "person, dog, cat, car, chair, table, cup, bottle, tree, grass, ball, bird, horse, bicycle, window, door, lamp, "
    "shoe, hat, bag"
)


def main() -> int:
    """Print milliseconds and ratios."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--threads", type=int, default=1, help="of both runtimes (default 1)")
    flags.add_argument("--pairs", type=int, default=10, help="(default 10)")
    options = flags.parse_args()
    from ovd.detector import Detector

    cv2.setNumThreads(options.threads)
    picture = photo()
    both = {
        name: Detector.load("default", runtime=name, device="cpu", threads=options.threads, cache_size=0)
        for name in ("torch", "onnx")
    }
    queries = {name: detector.query(WORDS) for name, detector in both.items()}
    for name, detector in both.items():  # the first run plans kernels
        detector.answer(picture, queries[name])
    pairs = [
        [timed(partial(detector.answer, picture, queries[name]))[0] for name, detector in both.items()]
        for _ in range(options.pairs)
    ]
    torch_ms, onnx_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [torch / onnx for torch, onnx in pairs]
    print(f"threads {options.threads}: torch {torch_ms:.0f} ms, onnx {onnx_ms:.0f} ms")
    print(f"torch / onnx: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
