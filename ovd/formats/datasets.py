# SPDX-License-Identifier: Apache-2.0
"""Writers of data sets for training: COCO, YOLO, Pascal VOC. Pictures are copied, linked, or left out."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree.ElementTree import Element, SubElement

from ovd.formats.labels import coco_categories
from ovd.formats.shapes import LabelledPictures, Picture, Shape, joined, outlines, own_path
from ovd.formats.xml import xml_document
from pretrain.data.coco_entries import CocoAnnotation, CocoImage, CocoObject
from pretrain.engine.errors import UserError
from pretrain.engine.files import fitting_name, write_atomically, write_json

PictureMode = Literal["copy", "link", "none"]
"""Whether the pictures of a data set that is written are copied, linked or left out."""


def write_coco(labelled: LabelledPictures, out: Path, *, picture_mode: PictureMode = "copy") -> None:
    """``annotations/instances_PART.json`` (``instances_all.json`` without parts) and ``images/PART/``."""
    annotation_id = 0
    for part in labelled.parts:
        images: list[CocoImage] = []
        annotations: list[CocoAnnotation] = []
        for number, picture in enumerate((p for p in labelled.pictures if p.part == part), 1):
            height, width = picture.size
            name = put_picture(picture, picture.path, out / "images", picture_mode)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for shape in picture.shapes:
                annotation_id += 1
                annotations.append({"id": annotation_id, "image_id": number, **_coco_object(shape)})
        content = {"images": images, "annotations": annotations, "categories": coco_categories(labelled.names)}
        write_json(out / "annotations" / f"instances_{part or 'all'}.json", content)


def _coco_object(shape: Shape) -> CocoObject:
    x1, y1, x2, y2 = shape.box
    box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
    one: CocoObject = {"category_id": shape.index + 1, "bbox": box, "iscrowd": int(shape.crowd)}
    if shape.segmentation:
        one["segmentation"] = shape.segmentation  # its area is left out: the reader counts the pixels of the mask
    else:
        one["area"] = round(box[2] * box[3], 3)
    if shape.score is not None:
        one["score"] = shape.score
    return one


def write_yolo(
    labelled: LabelledPictures, out: Path, *, picture_mode: PictureMode = "copy", outline: bool = False
) -> None:
    """``data.yaml``, ``images/PART/``, ``labels/PART/``. Crowds are left out: YOLO knows none.

    Args:
        labelled: what is written.
        out: folder.
        picture_mode: see `PictureMode`.
        outline: outlines in place of boxes; the corners of the box where there is none. Readers take a file that has
            both forms for outlines of two points.
    """
    for picture in labelled.pictures:
        name = put_picture(picture, picture.path, out / "images", picture_mode)
        lines = [_yolo_line(shape, picture.size, outline) for shape in picture.shapes if not shape.crowd]
        write_atomically((out / "labels" / name).with_suffix(".txt"), "".join(lines).encode())
    parts = [part for part in ("train", "val", "test") if part in labelled.parts]
    folders = {part: f"images/{part}" for part in parts}
    first = next(iter(folders.values()), "images")
    lines = [f"{part}: {folders.get(part, first)}" for part in dict.fromkeys(("train", "val", *parts))]
    lines += [
        "names:",
        *(f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(labelled.names)),
    ]
    write_atomically(out / "data.yaml", ("\n".join(lines) + "\n").encode())


def _yolo_line(shape: Shape, size: tuple[int, int], outline: bool) -> str:
    height, width = size
    x1, y1, x2, y2 = shape.box
    if outline:
        polygons = outlines(shape, size) or [[x1, y1, x2, y1, x2, y2, x1, y2]]
        values = [value / (width, height)[i % 2] for i, value in enumerate(joined(polygons))]
    else:
        values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    return " ".join([str(shape.index), *(f"{min(max(value, 0.0), 1.0):.6f}" for value in values)]) + "\n"


def write_voc(labelled: LabelledPictures, out: Path, *, picture_mode: PictureMode = "copy") -> None:
    """``Annotations/``, ``JPEGImages/`` and, for the parts, ``ImageSets/Main/``; names are made flat, as VOC's are.

    All parts share the folders, so a name that two of them have gets a number.
    """
    stems: dict[str, list[str]] = {}
    used: set[str] = set()
    for picture in labelled.pictures:
        path = PurePosixPath(picture.target.replace("/", "_"))
        flat = own_path(PurePosixPath(fitting_name(path.stem, path.suffix)), used)
        name = put_picture(picture, flat.as_posix(), out / "JPEGImages", picture_mode)
        stem = flat.stem
        stems.setdefault(picture.part, []).append(stem)
        write_atomically(out / "Annotations" / f"{stem}.xml", _voc_file(picture, name))
    for part, listed in stems.items():
        if part:
            write_atomically(out / "ImageSets/Main" / f"{part}.txt", os.fsencode("".join(f"{s}\n" for s in listed)))


def _voc_file(picture: Picture, name: str) -> bytes:
    height, width = picture.size
    root = Element("annotation")
    _texts(root, {"folder": "JPEGImages", "filename": name})
    _texts(SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
    _texts(root, {"segmented": 0})
    for shape in picture.shapes:
        x1, y1, x2, y2 = shape.box
        left, top = min(max(round(x1) + 1, 1), width), min(max(round(y1) + 1, 1), height)
        element = SubElement(root, "object")
        _texts(element, {"name": shape.name, "pose": "Unspecified", "truncated": 0, "difficult": int(shape.crowd)})
        corners = {"xmin": left, "ymin": top, "xmax": max(left, min(round(x2), width)),
                   "ymax": max(top, min(round(y2), height))}  # fmt: skip
        _texts(SubElement(element, "bndbox"), corners)
    return xml_document(root)


def _texts(parent: Element, values: Mapping[str, str | int]) -> None:
    for tag, value in values.items():
        SubElement(parent, tag).text = str(value)


def put_picture(picture: Picture, name: str, folder: Path, picture_mode: PictureMode) -> str:
    """Put a picture into a folder under a name; returns the name.

    Raises:
        UserError: it cannot be copied or linked.
    """
    target = folder / name
    if picture_mode == "none":
        return name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if picture_mode == "link":
            target.unlink(missing_ok=True)
            target.symlink_to(os.path.abspath(picture.source))
        elif not (target.is_file() and _same_file(picture.source, target)):
            partial = target.with_name(fitting_name(f".{target.name}", f".{uuid.uuid4().hex}.part"))
            try:
                shutil.copyfile(picture.source, partial)
                shutil.copystat(picture.source, partial)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(f"{target}: cannot be written: {problem.strerror or problem}") from problem
    return name


def _same_file(one: Path, other: Path) -> bool:
    """Whether an earlier run's copy is unchanged, by size and time."""
    a, b = one.stat(), other.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
