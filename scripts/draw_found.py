# SPDX-License-Identifier: Apache-2.0
"""Draw what UP-DETR's transformer finds when a crop of another picture is shown to it; no label was ever seen.

    python scripts/draw_found.py --weights runs/updetr/exported --out docs/images

Validation scenes of one seed, in their order: the first things that were in an earlier scene too. The crop stands left
of the picture, the one most certain box in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovd.detector import Detector
from ovd.drawing import draw_detections
from pretrain.data.scenes import SceneSource, coco_objects
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import run_cli

SIDE, CROP, MARGIN, COLOURS = 256, 80, 10, 256
LEAST = 900  # square pixels of a thing that is shown
SEED, PER_ROW, ROWS = 5, 4, 2


def shown_again(source: SceneSource, count: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """(crop, picture) of the first things that an earlier scene showed too, cut from there."""
    seen: dict[int, tuple[int, list[float]]] = {}
    pairs = []
    for index in range(len(source)):
        scene = source.scene(index)
        for thing in coco_objects(scene, image_id=index + 1, first_annotation_id=1)[1]:
            if thing["area"] < LEAST:
                continue
            before = seen.get(thing["category_id"])
            if before is not None and before[0] != index:
                x, y, width, height = (int(value) for value in before[1])
                pairs.append((source.scene(before[0]).image[y : y + height, x : x + width], scene.image))
                if len(pairs) == count:
                    return pairs
            seen[thing["category_id"]] = index, thing["bbox"]
    return pairs


def drawn(detector: Detector, crop: NDArray[np.uint8], picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The crop on white beside the picture with its best box."""
    found = detector.find(picture, examples={"found": [crop]}, threshold=0.0, limit=1)
    column = np.full((SIDE, CROP + 2 * MARGIN, 3), 255, dtype=np.uint8)
    top = (SIDE - CROP) // 2
    column[top : top + CROP, MARGIN : MARGIN + CROP] = np.asarray(Image.fromarray(crop).resize((CROP, CROP)))
    return np.concatenate([column, draw_detections(picture, found, masks=False)], axis=1)


def main(argv: list[str]) -> int:
    """Write ``updetr-find.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="exported folder of a pretext")
    parser.add_argument("--out", type=Path, required=True, help="folder of the picture")
    args = parser.parse_args(argv)
    detector = Detector.load(args.weights)
    source = SceneSource(Stickers.load(), split="val", seed=SEED, size=SIDE, length=500)
    cells = [drawn(detector, crop, picture) for crop, picture in shown_again(source, PER_ROW * ROWS)]
    rows = [np.concatenate(cells[i : i + PER_ROW], axis=1) for i in range(0, len(cells), PER_ROW)]
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).quantize(COLOURS).save(args.out / "updetr-find.png")
    return 0


if __name__ == "__main__":
    run_cli(main)
