# SPDX-License-Identifier: Apache-2.0
"""The detector as a person meets it: start of the page, a picture with few and with many classes, other words on it."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from itertools import islice, product
from typing import TYPE_CHECKING

from _common import ROOT, milliseconds, page_url, parser, pictures, ratio, report, set_threads, show_ratio, take_turns

if TYPE_CHECKING:
    import numpy as np

    from ovd import Detector
    from ovd.vocabulary import Vocabulary

COUNTS = (1, 100, 1_000, 10_000)
ADJECTIVES = (
    "red orange yellow green blue purple pink brown grey black white golden silver wooden plastic paper glass tiny "
    "huge old new broken clean dirty shiny"
).split()


def cold_start(weights: str, threads: int | None) -> float:
    """Seconds from starting ``app.py`` until its page answers with HTTP 200."""
    command = [sys.executable, "app.py", "--port", "0", "--weights", weights]
    if threads is not None:
        command += ["--threads", str(threads)]
    start = time.perf_counter()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        page_url(server)
        return time.perf_counter() - start
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def words(count: int) -> list[str]:
    """``count`` different class names: the nouns of the stickers, then nouns with an adjective."""
    from pretrain.data.stickers import Stickers

    nouns = Stickers.load().nouns
    made = [*nouns, *(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, nouns))]
    return list(islice(dict.fromkeys(made), count))


class Turn:
    """Detects in the next picture with one vocabulary; the pictures are more than a detector remembers."""

    def __init__(self, detector: Detector, images: list[np.ndarray], vocabulary: Vocabulary) -> None:
        self.detector, self.images, self.vocabulary, self.next = detector, images, vocabulary, 0

    def __call__(self) -> None:
        image = self.images[self.next % len(self.images)]
        self.next += 1
        self.detector.embed(image).classify(self.vocabulary)


def main() -> None:
    """Measure in this order: start, one picture, many classes, other words on the same picture."""
    flags = parser(__doc__ or "", weights=True)
    flags.add_argument("--no-start", action="store_true", help="leave out the start of the page")
    options = flags.parse_args()
    set_threads(options.threads)
    rounds = options.rounds or 20

    from ovd import Detector
    from ovd.vocabulary import Vocabulary

    starts = [] if options.no_start else [cold_start(options.weights, options.threads) for _ in range(3)]
    detector = Detector.load(options.weights, device="cpu", cache_size=0)
    images = pictures((480, 640), 12)
    all_words = words(max(COUNTS))
    vocabularies: dict[int, Vocabulary] = {}
    encoding: dict[int, float] = {}
    for count in (*COUNTS, 20):
        vocabulary = vocabularies[count] = Vocabulary.parse(all_words[:count], templates=detector.templates)
        fresh = Detector(model=detector.model, encoder=detector.text.encoder, templates=detector.templates)
        start = time.perf_counter()
        fresh.text.embed(vocabulary)
        encoding[count] = time.perf_counter() - start
        detector.text.embed(vocabulary)

    twenty = take_turns({"20": Turn(detector, images, vocabularies[20])}, rounds=2 * rounds, warmup=3)["20"]
    by_count = take_turns(
        {str(count): Turn(detector, images, vocabularies[count]) for count in COUNTS}, rounds=rounds, warmup=2
    )
    many = ratio(by_count[str(COUNTS[-1])], by_count[str(COUNTS[0])])
    regions = detector.embed(images[0])
    again = take_turns(
        {str(count): partial(regions.classify, vocabularies[count]) for count in COUNTS}, rounds=5 * rounds, warmup=3
    )

    figure = milliseconds(twenty)
    rows = []
    if starts:
        rows.append(("page, start to HTTP 200, median of 3", f"{sorted(starts)[1]:.1f} s", ""))
    rows += [
        ("picture 640x480, 20 classes, p50", f"{figure['p50_ms']:,.0f} ms", ""),
        ("picture 640x480, 20 classes, p95", f"{figure['p95_ms']:,.0f} ms", ""),
    ]
    for count in COUNTS:
        rows.append(
            (f"picture 640x480, {count:,} classes, p50", f"{milliseconds(by_count[str(count)])['p50_ms']:,.0f} ms", "")
        )
    rows.append(("10,000 classes / 1 class", show_ratio(many), "aim: below 2"))
    for count in COUNTS:
        value = milliseconds(again[str(count)])
        aim = "aim: below 50 ms" if count == 1_000 else ""
        rows.append((f"other words, same picture, {count:,} classes, p50", f"{value['p50_ms']:,.1f} ms", aim))
    for count in COUNTS:
        rows.append((f"encoding {count:,} new words, once", f"{encoding[count] * 1e3:,.0f} ms", ""))
    report(
        f"Inference, weights {options.weights}, {len(regions)} regions per picture",
        rows,
        {
            "cold_start_seconds": starts,
            "picture_20_classes": figure,
            "picture": {name: milliseconds(values) for name, values in by_count.items()},
            "many_over_one": many,
            "same_picture": {name: milliseconds(values) for name, values in again.items()},
            "encoding_seconds": encoding,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
