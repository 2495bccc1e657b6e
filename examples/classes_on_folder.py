# SPDX-License-Identifier: Apache-2.0
"""Look for your own classes in every picture of a folder and write the boxes in COCO's results format.

    python examples/classes_on_folder.py
    python examples/classes_on_folder.py photos/ "dog, mug: cup, -poster" results.json

`python -m ovd.predict` does the same with drawings, masks where the weights have them, and resuming.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from ovd import Detector
from ovd.picture_files import PictureFiles
from pretrain.engine.errors import run_cli
from pretrain.engine.files import write_atomically

PHOTOS = Path(__file__).resolve().parents[1] / "ovd/demo/examples/photos"


def main(argv: list[str]) -> int:
    """Detect, count per class, and write one entry per box."""
    folder = Path(argv[0]) if argv else PHOTOS
    words = argv[1] if len(argv) > 1 else "dog, horse, bird, car, chair"
    out = Path(argv[2]) if len(argv) > 2 else Path("results.json")
    pictures = PictureFiles.collect([folder])
    detector = Detector.load("default", masks=False)
    detector.set_classes(words)
    results, counts = [], Counter[str]()
    for image_id, picture in enumerate(pictures.paths.values(), 1):
        detections = detector.detect(picture)
        counts.update(detections.class_name)
        results += detections.to_coco(image_id=image_id)
    write_atomically(out, json.dumps(results).encode())
    for name, count in counts.most_common():
        print(f"{name}: {count}")
    print(f"{len(results)} boxes in {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
