# SPDX-License-Identifier: Apache-2.0
"""What 10,000 words cost beside one: a photo of 640×480 with both queries in turn, and where the time goes.

    wordbox export --format onnx
    python benchmarks/many_words.py                        # ONNX Runtime, one thread
    python benchmarks/many_words.py --runtime torch --threads 2

Words are embedded before anything is timed; --cache keeps their embeddings for the next run. On a crowded machine the
processor's time (of all threads together) says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from _common import photo, timed

WORDS = 10_000


def typical(call: Callable[[], object], rounds: int) -> str:
    """Medians of a call as text."""
    clock, processor = np.median([timed(call) for _ in range(rounds)], axis=0).tolist()
    return f"{clock:.1f} ms, {processor:.1f} of the processor"


def main() -> int:
    """Print the ratios, and the parts of a query of 10,000 words."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--weights", default="default", help="of a detector of photographs (default: default)")
    flags.add_argument("--runtime", choices=("onnx", "torch"), default="onnx", help="(default onnx)")
    flags.add_argument("--threads", type=int, default=1, help="of the networks and of NumPy (default 1)")
    flags.add_argument("--pairs", type=int, default=10, help="(default 10)")
    flags.add_argument("--cache", type=Path, metavar="FOLDER", help="of embeddings of words")
    options = flags.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # NumPy's threads are settled when it is imported
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    from ovd.detector import Detector
    from pretrain.data.lexicon import read_lexicon

    cv2.setNumThreads(options.threads)
    picture = photo()
    detector = Detector.load(
        options.weights,
        runtime=options.runtime,
        device="cpu",
        threads=options.threads,
        cache_size=0,
        text_cache=options.cache,
    )
    nouns = list(read_lexicon().nouns)
    many = [*nouns, *(f"thing number {i}" for i in range(WORDS - len(nouns)))][:WORDS]
    one, all_of = detector.query("dog"), detector.query(many)
    for query in (one, all_of):  # the first answer prepares the scorer, and plans the networks' kernels
        detector.answer(picture, query)
    pairs = [[timed(partial(detector.answer, picture, query)) for query in (one, all_of)] for _ in range(options.pairs)]
    for number, clock in enumerate(("clock", "processor")):
        ratios = sorted(b[number] / a[number] for a, b in pairs)
        once = statistics.median(a[number] for a, _ in pairs)
        print(f"10,000 words / one word by the {clock}: median {statistics.median(ratios):.3f}, "
              f"{ratios[0]:.3f} to {ratios[-1]:.3f}; one word {once:.0f} ms")  # fmt: skip
    regions = detector.embed(picture)
    print("10,000 words: scores", typical(lambda: regions.scores(all_of), options.pairs))
    print("10,000 words: scores and boxes", typical(lambda: regions.classify(all_of), options.pairs))
    print("one word: scores and boxes", typical(lambda: regions.classify(one), options.pairs))
    seen = regions.regions.text
    words = detector.text.embed(all_of.words)
    print("the product of regions and words alone", typical(lambda: words @ seen.T, options.pairs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
