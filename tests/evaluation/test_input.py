# SPDX-License-Identifier: Apache-2.0
"""What is refused, what is counted, and the messages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_tools

from ovd.evaluation.coco import evaluate
from ovd.evaluation.results import check_results
from pretrain.data.coco import check_ground_truth
from pretrain.data.masks import to_rle
from pretrain.engine.errors import UserError
from tests.evaluation.cases import rectangle

GT: dict[str, Any] = {
    "images": [{"id": 11, "width": 100, "height": 80}, {"id": 4, "width": 50, "height": 50}],
    "annotations": [{"id": 1, "image_id": 11, "category_id": 7, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}],
    "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "dog"}],
}
GOOD = {"image_id": 11, "category_id": 7, "bbox": [10, 10, 20, 20], "score": 0.9}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    "bad, message",
    [
        (without("image_id"), "'image_id' is missing"),
        (without("category_id"), "'category_id' is missing"),
        (without("score"), "'score' is missing"),
        (without("bbox"), "neither bbox nor segmentation"),
        (GOOD | {"image_id": 12}, "image_id 12 is not in the ground truth"),
        (GOOD | {"image_id": "11"}, "written as a string; the ground truth has 11"),
        (GOOD | {"image_id": None}, "image_id None is not"),
        (GOOD | {"image_id": [11]}, r"image_id \[11\] is not"),
        (GOOD | {"image_id": True}, "image_id True is not"),
        (GOOD | {"category_id": 8}, "category_id 8 is not in the ground truth"),
        (GOOD | {"score": math.nan}, "score must be a finite number"),
        (GOOD | {"score": math.inf}, "score must be a finite number"),
        (GOOD | {"score": 10**400}, "score must be a finite number"),
        (GOOD | {"bbox": [1, 2, 3, 10**400]}, "four finite numbers"),
        (GOOD | {"segmentation": [[1, 1, 10**400, 5, 7, 8]]}, "no finite number"),
        (GOOD | {"score": "0.9"}, "score must be a finite number"),
        (GOOD | {"score": True}, "score must be a finite number"),
        (GOOD | {"bbox": [1, 2, 3]}, "four finite numbers"),
        (GOOD | {"bbox": [1, 2, 3, math.nan]}, "four finite numbers"),
        (GOOD | {"bbox": [1, 2, 3, None]}, "four finite numbers"),
        (GOOD | {"bbox": "1 2 3 4"}, "four finite numbers"),
        (GOOD | {"bbox": [30, 10, -20, 20]}, "negative width or height"),
        (GOOD | {"bbox": [101, 10, 20, 20]}, "wholly outside image 11 of 100×80 px"),
        (GOOD | {"bbox": [10, -30, 20, 20]}, "wholly outside"),
        (
            GOOD | {"segmentation": {"size": [100, 80], "counts": "1"}},
            r"\[height, width\] is \[100, 80\], its image's \[80, 100\]",
        ),
        (GOOD | {"segmentation": {"size": [80, 100], "counts": "0é"}}, "damaged run lengths"),
        (GOOD | {"segmentation": {"size": [80, 100], "counts": "0\x00"}}, "damaged run lengths"),
        (GOOD | {"segmentation": {"size": [80, 100], "counts": "o"}}, "damaged run lengths"),
        (GOOD | {"segmentation": {"size": [80, 100], "counts": [8001]}}, "add up to height × width"),
        (GOOD | {"segmentation": {"size": [80, 100], "counts": [8000.0]}}, "add up to height × width"),
        (GOOD | {"segmentation": {"size": [80, 100]}}, "neither polygons nor an object"),
        (GOOD | {"segmentation": [[1, 2, 3]]}, "neither polygons"),
        (GOOD | {"segmentation": [["a", "b", "c", "d"]]}, "neither polygons"),
        (GOOD | {"segmentation": "mask"}, "neither polygons"),
        ("text", "expected an object, found a string"),
        (None, "expected an object, found null"),
    ],
)
def test_results__bad_entry_is_named_by_position(bad: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"predictions\[2\].*{message}"):
        evaluate(GT, [GOOD, GOOD, bad])


@pytest.mark.parametrize(
    "results, message",
    [
        ({"annotations": []}, "found an object. This looks like a ground-truth file"),
        ({}, "expected a list of detections, found an object"),
        (None, "found null"),
        ("x", "found a string"),
    ],
)
def test_results__must_be_a_list(results: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(GT, results)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    gt = copy.deepcopy(GT)
    change(gt)
    return gt


@pytest.mark.parametrize(
    "gt, message",
    [
        ([GOOD], "found a list. This looks like a results file"),
        ({}, "'images' must be a list, is missing"),
        (changed(lambda g: g.update(annotations=None)), "'annotations' must be a list, null"),
        (changed(lambda g: g["images"].append({"id": 11})), r"images\[2\]: image id 11 occurs twice"),
        (changed(lambda g: g["images"].append({"id": "a"})), "some image ids are numbers and some are strings"),
        (changed(lambda g: g["images"].append({"file_name": "a"})), r"images\[2\]: 'id' is missing"),
        (changed(lambda g: g["images"].append({"id": 1.5})), "id must be a number or a string"),
        (changed(lambda g: g["categories"].append({"id": 7, "name": "x"})), "category id 7 occurs twice"),
        (changed(lambda g: g["categories"].append({"id": 8})), r"categories\[2\]: 'name' is missing"),
        (changed(lambda g: g["categories"].append({"id": "8", "name": "x"})), "id must be a whole number"),
        (changed(lambda g: g["annotations"][0].update(image_id=5)), r"annotations\[0\]: image_id 5 is not"),
        (changed(lambda g: g["annotations"][0].update(category_id=5)), r"annotations\[0\]: category_id 5 is not"),
        (changed(lambda g: g["annotations"][0].pop("bbox")), r"annotations\[0\]: 'bbox' is missing"),
        (changed(lambda g: g["annotations"][0].update(bbox=[0, 0, -1, 5])), "negative width"),
        (changed(lambda g: g["annotations"][0].update(area="big")), "area must be a number"),
        (changed(lambda g: g["annotations"][0].update(iscrowd=2)), "iscrowd must be 0 or 1"),
    ],
)
def test_ground_truth__bad_entry_is_named_by_position(gt: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(gt, [])


def test_boxes__across_the_border_are_kept_and_counted() -> None:
    truth = check_ground_truth(GT)
    checked = check_results([GOOD, GOOD | {"bbox": [80, 60, 30, 30]}, GOOD | {"bbox": [-0.3, 0, 5, 5]}], truth)
    assert checked.detections[1]["bbox"] == [80, 60, 30, 30]
    assert any("1 of 3 boxes reach over the border" in w for w in checked.warnings)


def test_boxes__that_look_like_corners_are_pointed_out() -> None:
    truth = check_ground_truth(GT)
    corners = [GOOD | {"bbox": [40 + n, 40, 90, 75]} for n in range(4)]
    assert any("x1, y1, x2, y2" in w for w in check_results(corners, truth).warnings)


def test_boxes__relative_coordinates_are_refused_and_repeats_counted() -> None:
    with pytest.raises(UserError, match="predictions: all boxes lie between 0 and 1"):
        check_results([GOOD | {"bbox": [0.1, 0.1, 0.2, 0.2]}] * 2, check_ground_truth(GT))
    one_pixel = check_results([GOOD | {"bbox": [0, 0, 1, 1]}], check_ground_truth(GT))
    assert len(one_pixel.detections) == 1 and not one_pixel.warnings
    checked = check_results([GOOD, GOOD | {"score": 0.8}, GOOD], check_ground_truth(GT))
    assert len(checked.detections) == 3 and "1 detections repeat image, class, box and score" in checked.warnings[0]


def test_boxes__without_area_match_nothing_and_are_counted() -> None:
    truth = check_ground_truth(GT)
    assert any("no area" in w for w in check_results([GOOD | {"bbox": [100, 80, 0, 0]}], truth).warnings)
    assert evaluate(GT, [GOOD | {"bbox": [10, 10, 0, 20]}]).values["bbox/AR100@50"] == 0


def test_image_size__missing_skips_the_border_check() -> None:
    gt = changed(lambda g: [i.pop("width") for i in g["images"]])
    metrics = evaluate(gt, [GOOD | {"bbox": [5000, 5000, 10, 10]}])
    assert any("without width and height" in w for w in metrics.warnings)


def test_annotations__missing_area_and_iscrowd_are_filled_in() -> None:
    def strip(g: dict[str, Any]) -> None:
        del g["annotations"][0]["area"], g["annotations"][0]["iscrowd"]

    truth = check_ground_truth(changed(strip))
    assert truth.annotations[0]["area"] == 400
    assert truth.annotations[0]["iscrowd"] == 0
    assert any("without area" in w for w in truth.warnings)


def test_image_ids__may_be_text() -> None:
    gt = copy.deepcopy(GT)
    for image in gt["images"]:
        image["id"] = f"img{image['id']}"
    gt["annotations"][0]["image_id"] = "img11"
    assert evaluate(gt, [GOOD | {"image_id": "img11"}]).values["bbox/AP50"] == pytest.approx(1)


def test_categories__undefined_in_the_ground_truth_are_dropped_and_counted() -> None:
    truth = check_ground_truth(GT)
    checked = check_results([GOOD, GOOD | {"category_id": 37}], truth, outside={37})
    assert len(checked.detections) == 1
    assert any("1 detections of categories" in w for w in checked.warnings)


def test_masks__requested_but_missing_are_refused() -> None:
    with pytest.raises(UserError, match=r"annotations\[0\] has no segmentation; evaluate boxes only"):
        evaluate(GT, [GOOD], None, ("segm",))
    gt = changed(lambda g: g["annotations"][0].update(segmentation=rectangle([10, 10, 20, 20], (80, 100))))
    with pytest.raises(UserError, match="a detection of image 11 has no segmentation"):
        evaluate(gt, [GOOD], None, ("segm",))


def test_masks__on_some_detections_only_are_ignored_with_a_warning() -> None:
    mask = rectangle([10, 10, 20, 20], (80, 100))
    gt = changed(lambda g: g["annotations"][0].update(segmentation=mask))
    metrics = evaluate(gt, [GOOD, GOOD | {"segmentation": mask}])
    assert "segm/AP" not in metrics.values
    assert any("masks are not evaluated: 1 detections" in w for w in metrics.warnings)


def test_masks__all_forms_give_the_same_run_lengths() -> None:
    rle = rectangle([10, 20, 30, 40], (80, 100))
    polygon = [[10, 20, 40, 20, 40, 60, 10, 60]]
    binary = mask_tools.decode({"size": rle["size"], "counts": rle["counts"].encode()})
    flat = binary.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    forms = [rle, rle | {"counts": rle["counts"].encode()}, {"size": [80, 100], "counts": runs}, polygon]
    masks = [mask_tools.decode(to_rle(form, (80, 100), "x")) for form in forms]
    assert all((m == binary).all() for m in masks)


def test_masks__polygons_need_an_image_size() -> None:
    with pytest.raises(UserError, match="polygons need the image's width and height"):
        to_rle([[1, 2, 3, 4, 5, 6]], None, "x")
