# SPDX-License-Identifier: Apache-2.0
"""One reader of COCO files: what training, embedding and evaluation understand, count or refuse."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools

from ovd.data.catalog import CocoImages
from ovd.data.splits import Split
from pretrain.data.coco import check_ground_truth, read_ground_truth
from pretrain.data.masks import decode, to_rle, unpacked
from pretrain.engine.errors import BadImageError, UserError

HEIGHT, WIDTH = 80, 100
SQUARE = [[10, 10, 40, 10, 40, 30, 10, 30]]


def content(change: Callable[[dict[str, Any]], Any] | None = None, count: int = 4) -> dict[str, Any]:
    made: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, count + 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0,
             "segmentation": copy.deepcopy(SQUARE)}
            for i in range(1, count + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip
    if change is not None:
        change(made)
    return made


def every(key: str, value: Any, where: str = "annotations") -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        for entry in made[where]:
            entry[key] = value

    return change


def first(key: str, value: Any, where: str = "annotations") -> Callable[[dict[str, Any]], None]:
    return lambda made: made[where][0].update({key: value})


@pytest.fixture
def images_of(tmp_path: Path) -> Callable[[dict[str, Any]], CocoImages]:
    noise = np.random.default_rng(0)
    for i in range(1, 7):
        Image.fromarray(noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")

    def read(made: dict[str, Any], **options: Any) -> CocoImages:
        path = tmp_path / "gt.json"
        path.write_text(json.dumps(made))
        split = Split.everything(read_ground_truth(path).categories)
        return CocoImages(images=tmp_path, annotations=path, split=split, labels="all", **options)

    return read


REFUSED = {
    "outside": (first("bbox", [500, 500, 30, 20]), r"annotations\[0\]: bbox .* lies wholly outside image 1 of 100×80"),
    "corners": (every("bbox", [60, 40, 95, 75]), r"4 of 4 boxes .* corners x1, y1, x2, y2"),
    "shares": (every("bbox", [0.25, 0, 0.5, 1]), r"all boxes lie between 0 and 1, as shares of a picture"),
    "endless": (first("bbox", [10, 10, 1e300, 20]), r"annotations\[0\]: bbox .* reaches far outside image 1"),
    "impossible picture size": (first("width", 10**9, "images"), r"images\[0\]: .* is not the size of a picture"),
    "null box": (first("bbox", None), r"annotations\[0\]: bbox must be four finite numbers"),
    "two points only": (first("segmentation", [[10, 10, 40, 30]]), r"annotations\[0\]: .* no polygon of three points"),
    "empty polygon": (first("segmentation", [[]]), r"annotations\[0\]: segmentation is neither polygons"),
    "flat list": (first("segmentation", [10, 10, 40, 10, 40, 30]), r"annotations\[0\]: segmentation is neither"),
    "odd numbers": (first("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), r"annotations\[0\]: segmentation is neither"),
    "NaN": (first("segmentation", [[10, 10, float("nan"), 10, 40, 30]]), r"annotations\[0\]: .* no finite number"),
    "far": (first("segmentation", [[10, 10, 2e8, 3e8, 40, 30]]), r"annotations\[0\]: .* reaches to \(2e\+08, 3e\+08\)"),
    "other size": (
        first("segmentation", {"size": [WIDTH, HEIGHT], "counts": [8000]}),
        r"annotations\[0\]: the mask's \[height, width\] is \[100, 80\], its image's \[80, 100\]",
    ),
    "no size": (first("segmentation", {"counts": [8000]}), r"annotations\[0\]: .* an object with size and counts"),
    "short": (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [0, 80]}), "add up to height × width"),
    "words": (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "not run lengths"}), "damaged run lengths"),
    "score": (first("score", 1.5), r"annotations\[0\]: score must be between 0 and 1"),
    "twins": (
        lambda made: (
            made["categories"].append({"id": 3, "name": "Dog "}),
            made["annotations"][0].update(category_id=3),
        ),
        r"categories 2 and 3 are both named 'dog'",
    ),
    "nameless category": (first("name", " ", "categories"), r"categories\[0\]: name must be a string"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_coco__invalid_entry_is_refused_by_position(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=rf"gt\.json: .*{message}"):
        check_ground_truth(content(change), where="gt.json")


COUNTED = {
    "sizes as text": (every("width", "100", "images"), "4 images have width or height written as a string"),
    "no sizes": (every("width", None, "images"), "4 images without width and height"),
    "sizes of 0": (every("height", 0, "images"), "4 images without width and height"),
    "over the border": (first("bbox", [80, 60, 30, 30]), "1 of 4 boxes reach over the border"),
    "a line beside a polygon": (first("segmentation", [*SQUARE, [1, 2, 3, 4]]), "1 polygons of two points are left"),
    "ids that repeat": (every("id", 7), "3 annotation ids occur more than once"),
    "root category": (
        lambda made: made["categories"].insert(0, {"id": 0, "name": "dog"}),
        "category 0 is named 'dog' like category 2 and has no annotation",
    ),
    "no area": (every("area", None), "4 annotations without area"),
    "area of 0": (first("area", 0), "1 annotations have an area below 1 px and a larger box"),
    "area as a share": (every("area", 0.07), "4 annotations have an area below 1 px and a larger box"),
    "area of the picture": (first("area", 8000), "1 annotations have an area larger than their box"),
    "turned in CVAT": (first("attributes", {"occluded": False, "rotation": 30.0}), "1 boxes are turned by an angle"),
    "mask of shares": (first("segmentation", [[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]]), "1 masks lie mostly outside"),
    "mask along rows": (
        first("segmentation", {"size": [80, 100], "counts": [1010, *[30, 70] * 19, 30, 5060]}),
        "1 masks lie mostly outside",
    ),
    "mask inside out": (
        first("segmentation", {"size": [80, 100], "counts": [0, 810, *[20, 60] * 29, 20, 4850]}),
        "1 masks lie mostly outside",
    ),
    "empty mask": (first("segmentation", {"size": [80, 100], "counts": [8000]}), "1 masks have no area"),
    "mask of one point": (first("segmentation", [[10, 10] * 3]), "1 masks have no area"),
    "objects written twice": (
        lambda made: made["annotations"].__setitem__(2, dict(made["annotations"][0], id=3)),
        "1 annotations repeat class and box of another one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_coco__oddities_are_counted(case: str) -> None:
    change, message = COUNTED[case]
    truth = check_ground_truth(content(change), where="gt.json")
    assert any(message in warning for warning in truth.warnings), truth.warnings
    assert len(truth.annotations) == 4


@pytest.mark.parametrize("attributes", [None, [], [1], "rotation", {"rotation": "30"}, {"rotation": 360.0}, {}])
def test_coco__attributes_of_other_tools_are_no_turns(attributes: object) -> None:
    assert not check_ground_truth(content(first("attributes", attributes))).warnings


def test_coco__masks_of_hidden_objects_are_smaller_than_their_boxes() -> None:
    """No warning: boxes of whole objects (amodal), masks of what is seen."""
    assert not check_ground_truth(content(first("segmentation", [[30, 20, 40, 20, 40, 30, 30, 30]]))).warnings


def test_coco__sizes_may_be_text_or_floats() -> None:
    for value in ("100", 100.0, " 100 "):
        assert check_ground_truth(content(every("width", value, "images"))).sizes[1] == (HEIGHT, WIDTH)


def test_coco__ids_may_be_whole_floats() -> None:
    made = json.loads(json.dumps(content()).replace('"id": 1,', '"id": 1.0,').replace('_id": 1,', '_id": 1.0,'))
    truth = check_ground_truth(made)
    assert list(truth.sizes) == [1, 2, 3, 4] and list(truth.categories) == [1, 2]
    assert {(type(a["image_id"]), type(a["category_id"])) for a in truth.annotations} == {(int, int)}


def test_coco__gzip_is_read(tmp_path: Path) -> None:
    made = content(every("score", 0.5))
    (tmp_path / "gt.json.gz").write_bytes(gzip.compress(json.dumps(made).encode()))
    truth = read_ground_truth(tmp_path / "gt.json.gz")
    assert truth.files == {i: f"{i}.png" for i in range(1, 5)} and truth.annotations[0]["score"] == 0.5
    whole = (tmp_path / "gt.json.gz").read_bytes()
    for damaged in (whole[:-9], whole[:40], b"no gzip"):
        (tmp_path / "gt.json.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"gt\.json\.gz: not a whole gzip file"):
            read_ground_truth(tmp_path / "gt.json.gz")


# --- training


def test_coco__crowds_and_empty_pictures_are_counted(images_of: Callable[..., CocoImages]) -> None:
    made = content(count=6)
    made["annotations"] = made["annotations"][:3]
    made["annotations"][2]["iscrowd"] = 1
    images = images_of(made)
    assert len(images) == 2 and images.image_ids == [1, 2]
    text = "\n".join(images.notices)
    assert "1 crowd annotations (iscrowd 1) are not trained on" in text
    assert "4 of 6 images have no object left and are not used" in text
    with pytest.raises(UserError, match="6 are crowds"):
        images_of(content(every("iscrowd", 1), count=6))


def test_coco__masks_equal_the_files(images_of: Callable[..., CocoImages]) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 7:31] = 1
    packed = mask_tools.encode(np.asfortranarray(mask))["counts"].decode()
    images = images_of(content(first("segmentation", {"size": [HEIGHT, WIDTH], "counts": packed})))
    assert (images.load(0).masks[0] == mask).all()
    assert int(images.load(1).masks.sum()) == 600, "a polygon of 30 × 20 pixels"
    del (made := content())["annotations"][0]["segmentation"]
    assert int(images_of(made).load(0).masks.sum()) == 600, "the box stands for it"


def test_coco__parts_follow_images_split(images_of: Callable[..., CocoImages]) -> None:
    made = content()
    for entry, part in zip(made["images"], ("train", "val", "train", None), strict=True):
        entry["split"] = part
    assert images_of(made, part="train").image_ids == [1, 3]
    assert images_of(made, part="val").image_ids == [2]
    assert len(images_of(made)) == 4
    with pytest.raises(UserError, match=r"data\.part test: no image .* \(there: train, val\)"):
        images_of(made, part="test")


def test_coco__box_outside_a_picture_of_unstated_size_is_found(images_of: Callable[..., CocoImages]) -> None:
    made = content(every("width", None, "images"))
    for one in made["annotations"]:
        del one["segmentation"]
    made["annotations"][0]["bbox"] = [150, 10, 20, 20]
    images = images_of(made)
    assert images.load(1).boxes.tolist() == [[10, 10, 40, 30]]
    with pytest.raises(BadImageError, match="has a box outside"):
        images.load(0)


# --- run lengths


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, column by column, first of 0."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [2]])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges])).tolist()
    return lengths if flat[1] == 0 else [0, *lengths[1:]]


def test_run_lengths__unpacked_as_pycocotools_packs_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 50, 2)
        mask = (random.random((height, width)) < random.random()).astype(np.uint8)
        counts = mask_tools.encode(np.asfortranarray(mask))["counts"]
        assert unpacked(counts) == runs(mask)


def test_run_lengths__flipped_bit_never_reaches_the_decoder() -> None:
    """Either it is refused, or the mask is another one that fills the picture: nothing is left unwritten."""
    random = np.random.default_rng(1)
    mask = (random.random((20, 30)) < 0.3).astype(np.uint8)
    counts = bytearray(mask_tools.encode(np.asfortranarray(mask))["counts"])
    refused = 0
    for place in range(len(counts)):
        for bit in range(8):
            changed = bytes(c ^ (1 << bit if i == place else 0) for i, c in enumerate(counts))
            try:
                rle = to_rle({"size": [20, 30], "counts": changed}, (20, 30), "x")
            except UserError as error:
                refused += "damaged run lengths" in str(error)
                continue
            assert sum(unpacked(rle["counts"]) or [-1]) == 600
            first_time, again = decode(rle, (20, 30), "x"), decode(rle, (20, 30), "x")
            assert (first_time == again).all()
    assert refused > 100
