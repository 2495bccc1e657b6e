# SPDX-License-Identifier: Apache-2.0
"""Boxes with scores: which are objects, which are doubt, which are nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ovd.data.boxes import BoxedImages, BoxSource
from ovd.data.mapper import TrainingTransform
from pretrain.engine.errors import UserError


def annotation(image: int, box: list[float], score: float | None, category: int = 1, **more: Any) -> dict[str, Any]:
    scored = {} if score is None else {"score": score}
    return {"id": 1, "image_id": image, "category_id": category, "bbox": box, **scored, **more}


def write(path: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 60, "height": 40, "split": "train"},
            {"id": 2, "file_name": "b.png", "width": 60, "height": 40, "split": "val"},
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cup"}],
        "annotations": [{**a, "id": n + 1} for n, a in enumerate(annotations)],
        **changes,
    }
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(*files: Path, **options: Any) -> BoxedImages:
    given: dict[str, Any] = {"part": None, "confident": 0.3, "doubtful": 0.1, **options}
    return BoxedImages(folder=files[0].parent, annotations=files, **given)


@pytest.fixture
def pseudo(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((40, 60, 3), 90, np.uint8))
    boxes = [
        annotation(1, [0, 0, 10, 10], 0.9),
        annotation(1, [20, 0, 10, 10], 0.3, category=2),
        annotation(1, [30, 0, 10, 10], 0.29),
        annotation(1, [40, 0, 10, 10], 0.09),
        annotation(1, [0, 20, 10, 10], 0.9, iscrowd=1),
        annotation(2, [5, 5, 20, 20], 0.8),
    ]
    return write(tmp_path / "pseudo.json.gz", boxes)


def test_boxes__scores_separate_objects_from_doubtful_ones(pseudo: Path) -> None:
    sure, unsure = read(pseudo).boxes(0)
    assert sure.tolist() == [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert unsure.tolist() == [[30, 0, 40, 10], [0, 20, 10, 30]]  # a crowd is no object, and no background


def test_boxes__part_withheld_and_second_file(pseudo: Path) -> None:
    assert read(pseudo, part="val").image_ids == [2]
    sure, unsure = read(pseudo, withheld=("cup",)).boxes(0)
    assert sure.tolist() == [[0, 0, 10, 10]] and len(unsure) == 2
    people = write(pseudo.parent / "true.json", [annotation(1, [2, 2, 30, 30], None)])
    assert read(pseudo, people).boxes(0)[0].tolist()[-1] == [2, 2, 32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "test"}, "train, val"),
        ({"withheld": ("dgo",)}, "did you mean 'dog'"),
        ({"confident": 0.95, "doubtful": 0.95}, "no image has a box with a score of at least 0.95"),
    ],
)
def test_boxes__unusable_labels_are_refused(pseudo: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(pseudo, **options)


def test_boxes__files_with_other_image_ids_are_refused(pseudo: Path) -> None:
    images = [{"id": 1, "file_name": "other.png", "width": 60, "height": 40}]
    other = write(pseudo.parent / "true.json", [annotation(1, [2, 2, 30, 30], None)], images=images)
    with pytest.raises(UserError, match="same images the same way"):
        read(pseudo, other)


def test_box_source__sample_depends_on_its_draw_and_moves_boxes(pseudo: Path) -> None:
    images = read(pseudo)
    transform = TrainingTransform(short_side=120, long_side=120, flip=1.0)
    source = BoxSource(images=images, transform=transform, seed=3)
    one, again = source.sample(0, 5), source.sample(0, 5)
    assert one["image"].equal(again["image"]) and one["image"].shape == (3, 80, 120)
    truth = one["instances"]
    assert truth.gt_classes.tolist() == [0, 0, -1, -1]
    assert truth.gt_boxes.tensor[0].tolist() == [100, 0, 120, 20]  # twice as large, mirrored
