# SPDX-License-Identifier: Apache-2.0
"""One-shot evaluation: where the crops come from, and whose scores are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd.evaluate import main
from ovd.evaluation.examples import CROP_SIDE, coco_crops, example_predictor, sticker_crops
from ovd.examples import Crop
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError
from tests.detector.fakes import COLOURS, make_detector, picture


def test_sticker_crops__are_fixed_and_extend_with_count() -> None:
    stickers = Stickers.load()
    wanted = frozenset({0, 7, 100})
    one, three = (sticker_crops(stickers, count=n, classes=wanted) for n in (1, 3))
    assert set(one) == set(three) == wanted
    for label in wanted:
        assert len(one[label]) == 1 and len(three[label]) == 3
        first, again, other = one[label][0].pixels, three[label][0].pixels, three[label][1].pixels
        assert first.shape == (CROP_SIDE, CROP_SIDE, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again)
        assert not np.array_equal(again, other)


def test_examples__scores_equal_the_detectors() -> None:
    detector = make_detector()
    crop = np.full((30, 30, 3), COLOURS["blue"], dtype=np.uint8)
    query = detector.query(None, {"b": crop})
    predictor = example_predictor(detector, {5: [Crop(crop)]})
    best = predictor(picture(), 1)[0]
    regions = detector.embed(picture())
    expected, _ = regions.scores(query)
    assert best["category_id"] == 5 and best["bbox"] == [80, 30, 70, 80]
    assert best["score"] == pytest.approx(float(expected.max()), rel=1e-5)
    np.testing.assert_allclose(predictor.scorer(regions.regions), expected, rtol=1e-6)


def cells(tmp_path: Path) -> dict[str, Any]:
    """Four pictures: reds in three of them, blues in two, a speck and a crowd that no one should be shown."""
    boxes = {
        1: [("red", [0, 0, 20, 20]), ("red", [20, 10, 30, 30])],
        2: [("blue", [5, 5, 4, 40]), ("red", [0, 0, 60, 60])],
        3: [("blue", [10, 10, 20, 20])],
        4: [("blue", [0, 0, 30, 30]), ("red", [30, 30, 20, 20])],
    }
    ids = {"red": 7, "blue": 9}
    for n in boxes:
        Image.fromarray(np.full((60, 60, 3), 10 * n, dtype=np.uint8)).save(tmp_path / f"{n}.png")
    annotations = [
        {"image_id": n, "category_id": ids[name], "bbox": box, "iscrowd": int(box[2] == 60)}
        for n, given in boxes.items()
        for name, box in given
    ]
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 60} for n in boxes],
        "annotations": [{"id": k + 1, "area": 1, **one} for k, one in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }


def test_coco_crops__largest_boxes_of_the_first_pictures(tmp_path: Path) -> None:
    gt = cells(tmp_path)
    crops, rest = coco_crops(gt, tmp_path, count=1)
    assert crops[7][0].box == (20, 10, 50, 40) and int(crops[7][0].pixels[0, 0, 0]) == 10
    assert crops[9][0].box == (10, 10, 30, 30) and int(crops[9][0].pixels[0, 0, 0]) == 30  # not the speck of picture 2
    assert [image["id"] for image in rest["images"]] == [2, 4]
    assert {one["image_id"] for one in rest["annotations"]} == {2, 4} and len(gt["images"]) == 4


def test_coco_crops__too_few_annotations_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--examples 3: too few pictures have boxes of 8 pixels of 'red'.*; ask for .* --split"
    ):
        coco_crops(cells(tmp_path), tmp_path, count=3)
    gt = cells(tmp_path)
    gt["images"] = [image for image in gt["images"] if image["id"] == 4]
    gt["annotations"] = [one for one in gt["annotations"] if one["image_id"] == 4]
    few = "--examples 3: too few pictures have boxes of 8 pixels of 'red'.*; ask for fewer, .* --split"
    with pytest.raises(UserError, match=few):
        coco_crops(cells(tmp_path), tmp_path, count=3)
    gt = cells(tmp_path)
    gt["images"] = [image for image in gt["images"] if image["id"] == 4]
    gt["annotations"] = [one for one in gt["annotations"] if one["image_id"] == 4]
    with pytest.raises(UserError, match="every picture is needed for the crops"):
        coco_crops(gt, tmp_path, count=1)


def test_present__searches_each_picture_for_its_own_classes() -> None:
    detector = make_detector()
    crops = {5: [Crop(np.full((30, 30, 3), COLOURS["blue"], dtype=np.uint8))],
             6: [Crop(np.full((30, 30, 3), COLOURS["red"], dtype=np.uint8))]}  # fmt: skip
    every = example_predictor(detector, crops)
    some = example_predictor(detector, crops, present={1: frozenset({6}), 2: frozenset({5, 6}), 3: frozenset({99})})
    assert some(picture(), 1) == [one for one in every(picture(), 1) if one["category_id"] == 6] != []
    assert [{**one, "image_id": 1} for one in some(picture(), 2)] == every(picture(), 1)
    assert some(picture(), 3) == []


def test_coco_crops__clips_boxes_and_skips_other_categories(
    tmp_path: Path,
) -> None:
    gt = cells(tmp_path)
    gt["annotations"][1]["bbox"] = [40, -5, 70, 30]  # of picture 1
    gt["categories"].append({"id": 1, "name": "animals"})
    crops, _ = coco_crops(gt, tmp_path, count=1)
    assert set(crops) == {7, 9} and crops[7][0].box == (40, 0, 60, 25)
    only, rest = coco_crops(gt, tmp_path, count=1, categories=frozenset({9}))
    assert set(only) == {9} and [image["id"] for image in rest["images"]] == [1, 2, 4]


def test_present__needs_examples_and_excludes_word_queries() -> None:
    with pytest.raises(UserError, match="cannot be combined with --queries words"):
        main(
            [
                "--weights",
                "vild-sticker",
                "--data",
                "stickers-val:1",
                "--examples",
                "1",
                "--present",
                "--queries",
                "words",
            ]
        )
    with pytest.raises(UserError, match="--present is a protocol of --examples"):
        main(["--weights", "vild-sticker", "--data", "stickers-val:1", "--present"])


def test_examples__need_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--examples describes classes by crops"):
        main(["--predictions", "r.json", "--annotations", "gt.json", "--examples", "1"])
