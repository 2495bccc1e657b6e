# SPDX-License-Identifier: Apache-2.0
"""COCO files of objects and of captions: the one reader, which checks and normalises them.

What cannot be used is refused with the entry's position; what can be, but looks odd, is counted in a warning. Inputs
are never changed.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from pretrain.data import masks
from pretrain.data.coco_boxes import checked_box, over_border, require_pixels
from pretrain.data.coco_entries import CocoJson, ImageId
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.engine.stored import is_number

_HALVES = re.compile("[\ud800-\udfff]")  # of characters that were cut in two: no file can hold them
_NUMBER = re.compile("[0-9]{1,9}([.]0*)?")
OTHER_KINDS = {"segments_info": "of a panoptic segmentation", "caption": "a caption"}
"""Keys of COCO's other annotation files, and what their entries are."""


class _Optional(TypedDict, total=False):
    segmentation: Any
    score: float


class Annotation(_Optional):
    """One object.

    ``id`` counts 1, 2, … in the order of the file; ``bbox`` is x, y, width, height in pixels; ``segmentation`` is as
    the file has it, checked (`pretrain.data.masks` decodes it); ``score`` is a teacher's, in pseudo-labels.
    """

    id: int
    image_id: ImageId
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Checked ground truth.

    Attributes:
        sizes: image id -> (height, width) in pixels, or None where the file does not say; ascending by id.
        files: image id -> path below the picture folder, for images that name one; in the order of the file.
        parts: image id -> ``split`` of the image (train, val, …), for images that have one.
        scenes: files of those images that their ``content`` calls a scene of several things.
        categories: category id -> name.
        annotations: of all images, crowds included.
        warnings: what was odd.
        where: the file, for messages.
    """

    sizes: Mapping[ImageId, tuple[int, int] | None]
    files: Mapping[ImageId, str]
    parts: Mapping[ImageId, str]
    categories: Mapping[int, str]
    annotations: list[Annotation]
    scenes: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)
    where: str = "annotations"

    def file_of(self, image_id: ImageId) -> str:
        """An image's path below the picture folder.

        Raises:
            UserError: the file names none.
        """
        return self.files.get(image_id) or picture_file({"id": image_id}, where=self.where)


def read_ground_truth(path: str | Path, *, hint: str = "") -> GroundTruth:
    """The annotations of a COCO file, ``.json`` or ``.json.gz``, checked; see `check_ground_truth`."""
    return check_ground_truth(read_json(path, hint=hint), where=str(path))


def check_ground_truth(gt: Any, *, where: str = "annotations") -> GroundTruth:
    """Ground truth in COCO format, checked.

    Annotation ids are replaced: COCO's evaluation takes id 0 for "unmatched", so a file that counts from 0 would lose
    an object.

    Args:
        gt: an object with lists `images`, `annotations`, `categories`. Missing `area` and `iscrowd` are filled in.
        where: the file, for messages.

    Raises:
        UserError: a missing list or key, a duplicate or unknown id, a box that is not four finite numbers, has negative
            size or lies wholly outside its image, boxes given as corners, a segmentation that cannot be decoded, or two
            categories of one name that both have annotations.
    """
    _require_lists(gt, ("images", "annotations", "categories"), where)
    warnings: list[str] = []
    sizes, files, parts = _images(gt["images"], where, warnings)
    categories = category_names(gt["categories"], where)
    annotations, odd = [], Counter[str]()
    for n, entry in enumerate(gt["annotations"]):
        annotations.append(_annotation(entry, n, f"{where}: annotations[{n}]", sizes, categories, odd))
    require_pixels((a["bbox"] for a in annotations), where)
    odd["twice"] = len(annotations) - len({(a["image_id"], a["category_id"], *a["bbox"]) for a in annotations})
    ids = Counter(a["id"] for a in gt["annotations"] if is_id(a.get("id")))
    if ids[0]:
        warnings.append(
            "annotation id 0: pycocotools would count that object as never found; here it is renumbered and counts"
        )
    if repeated := ids.total() - len(ids):
        warnings.append(f"{repeated} annotation ids occur more than once; all of them are counted")
    if odd["over"] > len(annotations) / 4 and odd["corners"] > 0.95 * odd["over"]:
        raise UserError(
            f"{where}: {odd['over']} of {len(annotations)} boxes reach over the border of their image and would fit as "
            "corners x1, y1, x2, y2. COCO's boxes are x, y, width, height: subtract the first two from the last two."
        )
    texts = {
        "over": "{} of {total} boxes reach over the border of their image",
        "no_area": "{} annotations without area: taken from the mask, else from the box",
        "ignore": "{} annotations have 'ignore' set without iscrowd: COCO's evaluation counts them all the same",
        "flat": "{} annotations have an area below 1 px and a larger box: COCO's evaluation counts them as small",
        "wide": "{} annotations have an area larger than their box: COCO's evaluation takes their size from it",
        "turned": "{} boxes are turned by an angle (CVAT's 'rotation'), which is not read: they are taken as upright",
        "hollow": "{} masks have no area",
        "astray": "{} masks lie mostly outside of their boxes: points as shares, y before x, or run lengths of rows?",
        "empty": "{} annotations have a box without area",
        "twice": "{} annotations repeat class and box of another one of their image; all of them are counted",
        "lines": "{} polygons of two points are left out of their masks",
    }
    warnings += [text.format(odd[key], total=len(annotations)) for key, text in texts.items() if odd[key]]
    used = {a["category_id"] for a in annotations}
    categories = _without_twins(categories, used, where, warnings)
    ordered = {i: sizes[i] for i in sorted(sizes)}  # one kind of id, checked above
    return GroundTruth(
        sizes=ordered,
        files=files,
        parts=parts,
        categories=categories,
        annotations=annotations,
        scenes=frozenset(
            name for entry in gt["images"] if entry.get("content") == "scene" and (name := _file_of(entry))
        ),
        warnings=warnings,
        where=where,
    )


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions of images, in the order in which the file first has one of each.

    Attributes:
        files: paths below the picture folder.
        texts: at least one of each.
        without: number of images that have none.
    """

    files: tuple[str, ...]
    texts: list[list[str]]
    without: int


def read_captions(path: str | Path, *, hint: str = "") -> Captions:
    """The captions of a COCO file, ``.json`` or ``.json.gz``; empty ones are left out.

    Args:
        path: the file.
        hint: which file it should be, as a sentence without its end; closes the messages.

    Raises:
        UserError: a missing list or key, a duplicate or unknown id, an image without a file, a caption that is no text.
    """
    content, closing = read_json(path, hint=hint), f"; {hint}" if hint else ""
    _require_lists(content, ("images", "annotations"), str(path))
    sizes, files, _ = _images(content["images"], str(path), [])
    texts: dict[ImageId, list[str]] = {}
    for n, annotation in enumerate(content["annotations"]):
        entry = f"{path}: annotations[{n}]"
        image_id = require_id(required(annotation, "image_id", entry), sizes, f"{entry}: image_id")
        if not isinstance(caption := annotation.get("caption"), str):
            raise UserError(
                f"{entry}: {'caption is not a string' if 'caption' in annotation else 'no caption'}{closing}."
            )
        if text := caption.strip():
            texts.setdefault(image_id, []).append(text)
    named = (files.get(image_id) or picture_file({"id": image_id}, where=str(path)) for image_id in texts)
    return Captions(files=tuple(named), texts=list(texts.values()), without=len(sizes) - len(texts))


def _require_lists(content: Any, keys: Sequence[str], where: str) -> None:
    """Refuse content that is not an object with these lists."""
    if not isinstance(content, dict):
        hint = " This looks like a results file." if isinstance(content, list) else ""
        raise UserError(f"{where}: expected an object with {', '.join(keys)}; found {kind_of(content)}.{hint}")
    for key in keys:
        if not isinstance(content.get(key), list):
            what = "is missing" if key not in content else kind_of(content[key])
            raise UserError(f"{where}: {key!r} must be a list, {what}.")


def image_sizes(gt: CocoJson) -> dict[ImageId, tuple[int, int] | None]:
    """(height, width) of each image as `check_ground_truth` understands it, without looking at the annotations."""
    return _images(gt["images"], "annotations", [])[0]


def _images(
    entries: list[Any], where: str, warnings: list[str]
) -> tuple[dict[ImageId, tuple[int, int] | None], dict[ImageId, str], dict[ImageId, str]]:
    """Sizes, files and parts of the images, by id."""
    sizes: dict[ImageId, tuple[int, int] | None] = {}
    files: dict[ImageId, str] = {}
    parts: dict[ImageId, str] = {}
    written = 0
    for n, image in enumerate(entries):
        entry = f"{where}: images[{n}]"
        image_id = required(image, "id", entry)
        if isinstance(image_id, float) and image_id.is_integer():
            image_id = int(image_id)
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise UserError(f"{entry}: id must be a number or a string, is {image_id!r}.")
        if image_id in sizes:
            raise UserError(f"{entry}: image id {image_id!r} occurs twice.")
        height, width = (side_in_pixels(image.get(key)) for key in ("height", "width"))
        if max(height or 0, width or 0) > masks.LARGEST_SIDE:
            raise UserError(f"{entry}: {image['width']!r} × {image['height']!r} pixels is not the size of a picture.")
        sizes[image_id] = (height, width) if height and width else None
        written += any(isinstance(image.get(key), str) for key in ("height", "width"))
        if name := _file_of(image):
            files[image_id] = _name_on_disk(name, entry)
        part = image.get("split")
        if isinstance(part, str) and part:
            parts[image_id] = part
    if len({type(i) for i in sizes}) > 1:
        raise UserError(f"{where}: some image ids are numbers and some are strings; use one type.")
    named = Counter(map(os.path.normpath, files.values()))
    if repeated := len(files) - len(named):
        twice = next(name for name, count in named.items() if count > 1)
        warnings.append(
            f"{repeated} images name a file that another image names, too (first: {twice}): the objects of one are "
            "background in the other; give them one id"
        )
    if written:
        warnings.append(f"{written} images have width or height written as a string")
    if unsized := sum(s is None for s in sizes.values()):
        warnings.append(f"{unsized} images without width and height: boxes there cannot be checked against the image")
    return sizes, files, parts


def picture_file(image: CocoJson, *, where: str = "images") -> str:
    """An image's path below the picture folder: ``file_name``, or the last two parts of LVIS's ``coco_url``.

    The picture folder of LVIS therefore holds ``train2017`` and ``val2017``: its validation pictures are of both.

    Raises:
        UserError: it has neither.
    """
    if name := _file_of(image):
        return name
    raise UserError(f"{where}: image {image.get('id')!r} has neither 'file_name' nor 'coco_url': it cannot be found.")


def _file_of(image: CocoJson) -> str | None:
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name:
        return name
    if isinstance(url, str) and url.count("/") >= 2:
        return "/".join(url.split("/")[-2:])
    return None


def _name_on_disk(name: str, entry: str) -> str:
    try:
        if b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:
        pass
    raise UserError(f"{entry}: file_name {name!r} is not a valid file name.")


def side_in_pixels(value: Any) -> int | None:
    """A side in pixels, also if written as text or as 640.0; None for null, zero, negative and invalid values."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return int(value) if is_number(value) and value >= 1 and float(value).is_integer() else None


def category_names(entries: list[Any], where: str) -> dict[int, str]:
    """Category id -> name of a file's ``categories``.

    Raises:
        UserError: an entry without a whole number or a name, or an id that occurs twice.
    """
    categories: dict[int, str] = {}
    for n, category in enumerate(entries):
        entry = f"{where}: categories[{n}]"
        category_id, name = required(category, "id", entry), required(category, "name", entry)
        if isinstance(category_id, float) and category_id.is_integer():
            category_id = int(category_id)
        if isinstance(category_id, bool) or not isinstance(category_id, int):
            raise UserError(f"{entry}: id must be a whole number, is {category_id!r}.")
        if category_id in categories:
            raise UserError(f"{entry}: category id {category_id} occurs twice.")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{entry}: name must be a string, is {name!r}.")
        categories[category_id] = _HALVES.sub("\ufffd", name)
    return categories


def _without_twins(categories: dict[int, str], used: set[int], where: str, warnings: list[str]) -> dict[int, str]:
    """The categories without those that share a name and have no annotation (Roboflow's root category).

    Raises:
        UserError: two categories of one name both have annotations.
    """
    by_name: dict[str, list[int]] = {}
    for category_id, name in categories.items():
        by_name.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), []).append(category_id)
    unique = dict(categories)
    for ids in by_name.values():
        labelled = [i for i in ids if i in used]
        if len(labelled) > 1:
            raise UserError(
                f"{where}: categories {labelled[0]} and {labelled[1]} are both named {categories[labelled[0]]!r} and "
                "both have annotations; give one of them another name, or its annotations the other's id."
            )
        keep = labelled[0] if labelled else ids[0]
        for i in ids:
            if i != keep:
                del unique[i]
                warnings.append(f"category {i} is named {categories[i]!r} like category {keep} and has no annotation")
    return unique


def _annotation(
    a: Any,
    n: int,
    entry: str,
    sizes: Mapping[ImageId, tuple[int, int] | None],
    categories: Mapping[int, str],
    odd: Counter[str],
) -> Annotation:
    """One annotation, checked; oddities are counted in ``odd``."""
    image_id = require_id(required(a, "image_id", entry), sizes, f"{entry}: image_id")
    if "bbox" not in a and (what := next((OTHER_KINDS[key] for key in OTHER_KINDS if key in a), None)):
        raise UserError(f"{entry}: is {what}, not of an object with its box; give the file instances_….json.")
    category_id = require_id(required(a, "category_id", entry), categories, f"{entry}: category_id")
    box, size = checked_box(required(a, "bbox", entry), entry), sizes[image_id]
    odd["empty"] += box[2] == 0 or box[3] == 0
    if size is not None:
        over, corners = over_border(box, size, f"{entry}: bbox {box}", image_id)
        odd["over"] += over
        odd["corners"] += corners
    height, width = size or (masks.LARGEST_SIDE, masks.LARGEST_SIDE)
    if box[0] < -width or box[1] < -height or box[0] + box[2] > 2 * width or box[1] + box[3] > 2 * height:
        raise UserError(f"{entry}: bbox {box} reaches far outside image {image_id!r} of {width}×{height} px.")
    crowd = a.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise UserError(f"{entry}: iscrowd must be 0 or 1, is {crowd!r}.")
    odd["ignore"] += bool(a.get("ignore", 0)) and not crowd
    attributes = a.get("attributes")
    turn: Any = attributes.get("rotation") if isinstance(attributes, dict) else None
    odd["turned"] += is_number(turn) and turn % 360 != 0
    one = Annotation(id=n + 1, image_id=image_id, category_id=category_id, bbox=box, area=0.0, iscrowd=int(crowd))
    if a.get("segmentation"):
        extent = masks.check_segmentation(a["segmentation"], size, entry)
        odd["lines"] += extent.lines
        odd["hollow"] += extent.bounds is None
        odd["astray"] += extent.mostly_outside(box)
        one["segmentation"] = a["segmentation"]
    area = a.get("area")
    if area is None:
        odd["no_area"] += 1
        area = masks.area(a["segmentation"], size, entry) if "segmentation" in one else box[2] * box[3]
    elif not is_number(area) or area < 0:
        raise UserError(f"{entry}: area must be a number ≥ 0, is {area!r}.")
    odd["flat"] += area < 1 < box[2] * box[3]
    odd["wide"] += area > 1.1 * box[2] * box[3] + 1 > 1
    one["area"] = area
    if (score := a.get("score")) is not None:
        if not is_number(score) or not 0 <= score <= 1:
            raise UserError(f"{entry}: score must be between 0 and 1, is {score!r}.")
        one["score"] = float(score)
    return one


def required(entry: Any, key: str, where: str) -> Any:
    """The value of an entry's key.

    Raises:
        UserError: the entry is no object or lacks the key.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {kind_of(entry)}.")
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing.")
    return entry[key]


def is_id(value: Any) -> bool:
    """Whether a value has the type of an id."""
    return isinstance(value, (int, str, float)) and not isinstance(value, bool)


def require_id(value: Any, ids: Mapping[Any, Any], where: str) -> Any:
    """An id that refers to one of ``ids``; 1.0 means 1.

    Raises:
        UserError: it is not there, or written as another type.
    """
    if is_id(value):
        if value in ids:
            return int(value) if isinstance(value, float) else value
        other: Any = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else str(value)
        if other in ids:
            raise UserError(f"{where} {value!r} is written as {kind_of(value)}; the ground truth has {other!r}.")
    raise UserError(f"{where} {value!r} is not in the ground truth.")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true/false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
