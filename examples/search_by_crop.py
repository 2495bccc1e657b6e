# SPDX-License-Identifier: Apache-2.0
"""Search a folder for what a box in one picture shows; no word is needed.

    python examples/search_by_crop.py
    python examples/search_by_crop.py photos/ reference.jpg 30 40 120 160

The four numbers are the corners of the box in pixels: x1 y1 x2 y2.
"""

from __future__ import annotations

from pathlib import Path

from ovd import Crop, Detector
from ovd.picture_files import PictureFiles
from ovd.pictures import to_rgb
from pretrain.engine.errors import UserError, run_cli

PHOTOS = Path(__file__).resolve().parents[1] / "ovd/demo/examples/photos"


def numbers(texts: list[str]) -> list[float]:
    """The corners, as they were typed."""
    try:
        return [float(text) for text in texts]
    except ValueError as problem:
        raise UserError(f"x1 y1 x2 y2 must be numbers of pixels: {problem}") from problem


def main(argv: list[str]) -> int:
    """Embed the crop once, then rank the pictures by their best box."""
    pictures = PictureFiles.collect([Path(argv[0]) if argv else PHOTOS])
    detector = Detector.load("default", masks=False)
    if len(argv) == 6:
        reference, box = Path(argv[1]), numbers(argv[2:])
    elif not argv:
        reference = PHOTOS / "horses.jpg"
        horses = detector.find(reference, "horse")  # stands in for a box drawn by a person
        box = [float(corner) for corner in horses.xyxy[0]]
    else:
        raise UserError("give a folder, a picture and the four corners of a box in it; or nothing, for the example")
    example = Crop(to_rgb(reference), (box[0], box[1], box[2], box[3]))
    ranked = []
    for picture in pictures.paths.values():
        boxes = detector.find(picture, examples={"it": example}, threshold=0.0)
        ranked.append((float(boxes.best[0]), picture, boxes.xyxy[:1].round().astype(int).tolist()))
    for score, picture, best in sorted(ranked, reverse=True):
        print(f"{score:.2f}  {picture.name}  {best}")
    return 0


if __name__ == "__main__":
    run_cli(main)
