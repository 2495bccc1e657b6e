# SPDX-License-Identifier: Apache-2.0
"""Find objects by name in one picture, then ask the same regions for other words.

    python examples/find_words.py
    python examples/find_words.py desk.jpg "dog, mug: cup, coffee mug, -poster"

Synonyms stand after a colon; a word with a minus in front is a negative.
"""

from __future__ import annotations

from pathlib import Path

from ovd import Detections, Detector
from pretrain.engine.errors import run_cli

PICTURE = Path(__file__).resolve().parents[1] / "ovd/demo/examples/photos/horses.jpg"


def show(detections: Detections) -> None:
    """Print one line per box, best first, and one per class without a box."""
    for name, score, box in zip(detections.class_name, detections.confidence, detections.xyxy, strict=True):
        x1, y1, x2, y2 = box.round().astype(int)
        print(f"{name:20} {score:.2f}  from ({x1}, {y1}) to ({x2}, {y2})")
    for name, best in detections.not_found:
        print(f"{name:20} not found (best score {best:.2f})")


def main(argv: list[str]) -> int:
    """Run the network once and classify its regions twice."""
    picture = Path(argv[0]) if argv else PICTURE
    words = argv[1] if len(argv) > 1 else "horse, dog, car"
    detector = Detector.load("default", masks=False)
    regions = detector.embed(picture)  # boxes and their embeddings: the expensive part
    show(regions.classify(words))
    print("other words, same regions:")
    show(regions.classify(["animal", "lorry: truck"], threshold=0.2))
    return 0


if __name__ == "__main__":
    run_cli(main)
