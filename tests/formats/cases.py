# SPDX-License-Identifier: Apache-2.0
"""A small data set by hand: three pictures in two parts, three classes, a mask, a crowd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovd.formats.labels import Labels
from pretrain.data.coco import GroundTruth

NAMES = ("cat", "red cell", "zebra: crossing")
SIZES = {"a.jpg": (60, 80), "sub/b.png": (50, 40), "c.jpg": (64, 64)}  # height, width
PARTS = {"a.jpg": "train", "sub/b.png": "train", "c.jpg": "val"}
BOXES: dict[str, list[tuple[int, list[float]]]] = {
    "a.jpg": [(0, [10, 20, 30, 25]), (2, [0, 0, 80, 60]), (1, [70, 55, 10, 5])],
    "sub/b.png": [(1, [5, 6, 7, 8])],
    "c.jpg": [],
}


def make_pictures(folder: Path) -> None:
    for name, (height, width) in SIZES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(name))
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


def coco_content() -> dict[str, Any]:
    images, annotations = [], []
    for number, (name, (height, width)) in enumerate(SIZES.items(), 1):
        images.append({"id": number, "file_name": name, "height": height, "width": width, "split": PARTS[name]})
        for index, box in BOXES[name]:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": index + 1}
            annotations.append({**ids, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco(folder: Path) -> Path:
    make_pictures(folder / "photos")
    file = folder / "labels.json"
    file.write_text(json.dumps(coco_content()))
    return file


Objects = dict[str, list[tuple[str, tuple[float, ...]]]]


def objects(labels: Labels) -> Objects:
    """Picture by its stem → (class, x1, y1, x2, y2) of each object, sorted: what must survive any conversion."""
    truth: GroundTruth = labels.truth()
    found: Objects = {Path(truth.file_of(i)).stem.removeprefix("sub_"): [] for i in truth.sizes}
    for one in truth.annotations:
        x, y, w, h = one["bbox"]
        stem = Path(truth.file_of(one["image_id"])).stem.removeprefix("sub_")
        found[stem].append((truth.categories[one["category_id"]], (x, y, x + w, y + h)))
    return {stem: sorted(rows) for stem, rows in found.items()}


EXPECTED: Objects = {
    Path(name).stem: sorted((NAMES[i], (b[0], b[1], b[0] + b[2], b[1] + b[3])) for i, b in rows)
    for name, rows in BOXES.items()
}


def same(one: Objects, other: Objects, *, within: float) -> bool:
    """Whether both hold the same pictures, classes and, within some pixels, boxes."""
    if one.keys() != other.keys():
        return False
    for stem in one:
        if [name for name, _ in one[stem]] != [name for name, _ in other[stem]]:
            return False
        pairs = zip(one[stem], other[stem], strict=True)
        if any(abs(a - b) > within for (_, p), (_, q) in pairs for a, b in zip(p, q, strict=True)):
            return False
    return True
