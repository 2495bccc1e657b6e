# SPDX-License-Identifier: Apache-2.0
"""COCO-format ground truth and results: read, checked, brought into one form.

Nothing here is silent: what cannot be evaluated is refused with the entry's position; what can be, but looks odd, is
counted and reported as a warning. Inputs are never changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ovd.data import masks
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

ImageId = int | str

BORDER = 0.5  # pixels that a box may reach over the border of its picture: what rounding does


class _Optional(TypedDict, total=False):
    segmentation: Any
    score: float


class Annotation(_Optional):
    """One object.

    ``id`` counts 1, 2, … in the order of the file; ``bbox`` is x, y, width, height in pixels; ``segmentation`` is as
    the file has it, checked (`ovd.data.masks` decodes it); ``score`` is a teacher's, in pseudo-labels.
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

    @property
    def has_masks(self) -> bool:
        """Whether every annotation has a mask (true for a file without annotations)."""
        return all("segmentation" in a for a in self.annotations)

    def file_of(self, image_id: ImageId) -> str:
        """An image's path below the picture folder.

        Raises:
            UserError: the file names none.
        """
        return self.files.get(image_id) or picture_file({"id": image_id}, where=self.where)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Checked detections: fresh dicts with `image_id`, `category_id`, `score`, and `bbox` and/or `segmentation`."""

    detections: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        """Whether every detection has a mask (true for no detections)."""
        return all("segmentation" in d for d in self.detections)


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
    if not isinstance(gt, dict):
        hint = " This looks like a results file." if isinstance(gt, list) else ""
        raise UserError(f"{where}: expected an object with images, annotations, categories; found {_kind(gt)}.{hint}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(gt.get(key), list):
            raise UserError(f"{where}: {key!r} must be a list, {'is missing' if key not in gt else _kind(gt[key])}.")
    warnings: list[str] = []
    sizes, files, parts = _images(gt["images"], where, warnings)
    categories = _categories(gt["categories"], where)
    annotations, odd = [], Counter[str]()
    for n, entry in enumerate(gt["annotations"]):
        annotations.append(_annotation(entry, n, f"{where}: annotations[{n}]", sizes, categories, odd))
    ids = Counter(a["id"] for a in gt["annotations"] if _hashable(a.get("id")))
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
        "empty": "{} annotations have a box without area",
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


def image_sizes(gt: Mapping[str, Any], *, where: str = "annotations") -> dict[ImageId, tuple[int, int] | None]:
    """(height, width) of each image as `check_ground_truth` understands it, without looking at the annotations."""
    return _images(gt["images"], where, [])[0]


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
        image_id = _key(image, "id", entry)
        if isinstance(image_id, float) and image_id.is_integer():
            image_id = int(image_id)
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise UserError(f"{entry}: id must be a number or a text, is {image_id!r}.")
        if image_id in sizes:
            raise UserError(f"{entry}: image id {image_id!r} occurs twice.")
        height, width = (_pixels(image.get(key)) for key in ("height", "width"))
        if max(height or 0, width or 0) > masks.LARGEST_SIDE:
            raise UserError(f"{entry}: {image['width']!r} × {image['height']!r} pixels is no size of a picture.")
        sizes[image_id] = (height, width) if height and width else None
        written += any(isinstance(image.get(key), str) for key in ("height", "width"))
        if name := _file_of(image):
            files[image_id] = name
        part = image.get("split")
        if isinstance(part, str) and part:
            parts[image_id] = part
    if len({type(i) for i in sizes}) > 1:
        raise UserError(f"{where}: some image ids are numbers and some are texts; use one kind.")
    if written:
        warnings.append(f"{written} images have width or height written as text")
    if unsized := sum(s is None for s in sizes.values()):
        warnings.append(f"{unsized} images without width and height: boxes there cannot be checked against the image")
    return sizes, files, parts


def picture_file(image: Mapping[str, Any], *, where: str = "images") -> str:
    """An image's path below the picture folder: ``file_name``, or the last two parts of LVIS's ``coco_url``.

    The picture folder of LVIS therefore holds ``train2017`` and ``val2017``: its validation pictures are of both.

    Raises:
        UserError: it has neither.
    """
    if name := _file_of(image):
        return name
    raise UserError(f"{where}: image {image.get('id')!r} has neither 'file_name' nor 'coco_url': it cannot be found.")


def _file_of(image: Mapping[str, Any]) -> str | None:
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name:
        return name
    if isinstance(url, str) and url.count("/") >= 2:
        return "/".join(url.split("/")[-2:])
    return None


def _pixels(value: Any) -> int | None:
    """A side in pixels, also where it is written as text or as 640.0; None for null, nonsense, zero and less."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    return int(value) if _is_number(value) and value >= 1 and float(value).is_integer() else None


def _categories(entries: list[Any], where: str) -> dict[int, str]:
    """Category id -> name."""
    categories: dict[int, str] = {}
    for n, category in enumerate(entries):
        entry = f"{where}: categories[{n}]"
        category_id, name = _key(category, "id", entry), _key(category, "name", entry)
        if isinstance(category_id, float) and category_id.is_integer():
            category_id = int(category_id)
        if isinstance(category_id, bool) or not isinstance(category_id, int):
            raise UserError(f"{entry}: id must be a whole number, is {category_id!r}.")
        if category_id in categories:
            raise UserError(f"{entry}: category id {category_id} occurs twice.")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{entry}: name must be a text, is {name!r}.")
        categories[category_id] = name
    return categories


def _without_twins(categories: dict[int, str], used: set[int], where: str, warnings: list[str]) -> dict[int, str]:
    """The categories without those that share a name and have no annotation (Roboflow's root category).

    Raises:
        UserError: two categories of one name both have annotations.
    """
    by_name: dict[str, list[int]] = {}
    for category_id, name in categories.items():
        by_name.setdefault(name.strip().casefold(), []).append(category_id)
    kept = dict(categories)
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
                del kept[i]
                warnings.append(f"category {i} is named {categories[i]!r} like category {keep} and has no annotation")
    return kept


def _annotation(
    a: Any,
    n: int,
    entry: str,
    sizes: Mapping[ImageId, tuple[int, int] | None],
    categories: Mapping[int, str],
    odd: Counter[str],
) -> Annotation:
    """One annotation, checked; oddities are counted in ``odd``."""
    image_id = _known(_key(a, "image_id", entry), sizes, f"{entry}: image_id")
    category_id = _known(_key(a, "category_id", entry), categories, f"{entry}: category_id")
    box, size = _box(_key(a, "bbox", entry), entry), sizes[image_id]
    odd["empty"] += box[2] == 0 or box[3] == 0
    if size is not None:
        over, corners = _over_border(box, size, f"{entry}: bbox {box}", image_id)
        odd["over"] += over
        odd["corners"] += corners
    height, width = size or (masks.LARGEST_SIDE, masks.LARGEST_SIDE)
    if box[0] < -width or box[1] < -height or box[0] + box[2] > 2 * width or box[1] + box[3] > 2 * height:
        raise UserError(f"{entry}: bbox {box} reaches far outside image {image_id!r} of {width}×{height} px.")
    crowd = a.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise UserError(f"{entry}: iscrowd must be 0 or 1, is {crowd!r}.")
    odd["ignore"] += bool(a.get("ignore", 0)) and not crowd
    one = Annotation(id=n + 1, image_id=image_id, category_id=category_id, bbox=box, area=0.0, iscrowd=int(crowd))
    if a.get("segmentation"):
        odd["lines"] += masks.check_segmentation(a["segmentation"], size, entry)
        one["segmentation"] = a["segmentation"]
    area = a.get("area")
    if area is None:
        odd["no_area"] += 1
        area = masks.area(a["segmentation"], size, entry) if "segmentation" in one else box[2] * box[3]
    elif not _is_number(area) or area < 0:
        raise UserError(f"{entry}: area must be a number ≥ 0, is {area!r}.")
    one["area"] = area
    if (score := a.get("score")) is not None:
        if not _is_number(score) or not 0 <= score <= 1:
            raise UserError(f"{entry}: score must be between 0 and 1, is {score!r}.")
        one["score"] = float(score)
    return one


def _over_border(box: Iterable[float], size: tuple[int, int], what: str, image_id: ImageId) -> tuple[bool, bool]:
    """Whether a box reaches over the border of its image, and whether it would fit as corners.

    Raises:
        UserError: it lies wholly outside.
    """
    x, y, w, h = box
    height, width = size
    if x > width or y > height or x + w < 0 or y + h < 0:
        raise UserError(f"{what} lies wholly outside image {image_id!r} of {width}×{height} px.")
    over = x < -BORDER or y < -BORDER or x + w > width + BORDER or y + h > height + BORDER
    return over, over and x < w <= width + 1 and y < h <= height + 1


def check_results(
    results: Any, gt: GroundTruth, *, outside: Collection[int] = (), where: str = "predictions", classes: bool = True
) -> Results:
    """Detections in COCO's results format, checked against the ground truth.

    Args:
        results: a list of `{"image_id", "category_id", "score", "bbox": [x, y, w, h]}` with `"segmentation"` beside or
            in place of `bbox`.
        gt: checked ground truth.
        outside: category ids known without being in `gt.categories`; their detections are dropped and counted.
        where: the file, for messages.
        classes: False for class-agnostic proposals, which need no `category_id`.

    Boxes that reach over the border are kept as they are and counted (clipping would change the digits).

    Raises:
        UserError: not a list, a missing key, an unknown image or category id, a score or box that is not finite, a box
            of negative size or wholly outside its image, a mask of another size than the image; the message names the
            entry.
    """
    if not isinstance(results, list):
        hint = ""
        if isinstance(results, dict) and isinstance(results.get("annotations"), list):
            hint = " This looks like a ground-truth file; predictions are a plain list."
        raise UserError(f"{where}: expected a list of detections, found {_kind(results)}.{hint}")
    fresh: list[dict[str, Any]] = []
    over = flat = dropped = corners = 0
    for n, d in enumerate(results):
        entry = f"{where}[{n}]"
        image_id = _known(_key(d, "image_id", entry), gt.sizes, f"{entry}: image_id")
        one: dict[str, Any] = {"image_id": image_id, "category_id": 0}
        if classes:
            category_id = _key(d, "category_id", entry)
            if _hashable(category_id) and category_id in outside and category_id not in gt.categories:
                dropped += 1
                continue
            one["category_id"] = _known(category_id, gt.categories, f"{entry}: category_id")
        score = _key(d, "score", entry)
        if not _is_number(score):
            raise UserError(f"{entry}: score must be a finite number, is {score!r}.")
        one["score"] = score
        size = gt.sizes[image_id]
        if d.get("segmentation"):
            one["segmentation"] = masks.to_rle(d["segmentation"], size, entry)
        if d.get("bbox"):
            one["bbox"] = _box(d["bbox"], entry)
            flat += one["bbox"][2] == 0 or one["bbox"][3] == 0
            if size is not None:
                reaches, fits = _over_border(one["bbox"], size, f"{entry}: box {one['bbox']}", image_id)
                over += reaches
                corners += fits
        elif "segmentation" not in one:
            raise UserError(f"{entry}: neither bbox nor segmentation.")
        fresh.append(one)
    warnings = []
    if dropped:
        warnings.append(f"{dropped} detections of categories that the ground truth does not define are left out")
    if over:
        hint = ""
        if over > len(fresh) / 4 and corners > 0.95 * over:
            hint = "; are they x1, y1, x2, y2? COCO's are x, y, width, height"
        warnings.append(f"{over} of {len(fresh)} boxes reach over the border of their image (kept as they are){hint}")
    if flat:
        warnings.append(f"{flat} boxes have no area and can match nothing")
    if not fresh:
        warnings.append("no detections: every precision and recall is 0")
    return Results(detections=fresh, warnings=warnings)


def _key(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {_kind(entry)}.")
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing.")
    return entry[key]


def _hashable(value: Any) -> bool:
    return isinstance(value, (int, str, float)) and not isinstance(value, bool)


def _known(value: Any, known: Mapping[Any, Any], where: str) -> Any:
    if _hashable(value):
        if value in known:
            return int(value) if isinstance(value, float) else value
        other: Any = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else str(value)
        if other in known:
            raise UserError(f"{where} {value!r} is written as {_kind(value)}; the ground truth has {other!r}.")
    raise UserError(f"{where} {value!r} is not in the ground truth.")


def _box(value: Any, entry: str) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(_is_number(v) for v in value):
        raise UserError(f"{entry}: bbox must be four finite numbers x, y, width, height; is {value!r}.")
    if value[2] < 0 or value[3] < 0:
        raise UserError(f"{entry}: bbox {list(value)} has a negative width or height.")
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true/false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
