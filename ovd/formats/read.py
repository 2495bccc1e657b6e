# SPDX-License-Identifier: Apache-2.0
"""Reading labelled data sets: COCO, YOLO and Pascal VOC files, by name or recognised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ovd.formats.labels import PART_NAMES, Labels, choose_parts
from ovd.formats.spec import Kind, LabelSpec
from ovd.formats.voc import read_voc, xml_files
from ovd.formats.yolo import read_yolo, yaml_of
from pretrain.data.coco import check_ground_truth, picture_file
from pretrain.data.coco_entries import CocoJson
from pretrain.data.folder import backslash_hint
from pretrain.engine.errors import UserError, absent
from pretrain.engine.files import read_json

ROBOFLOW = "_annotations.coco.json"
NAME_FOLDER = "name the folder of the pictures (--images, data.images=, or --data coco:FOLDER:FILE)"
FIRST = 20  # pictures that are looked for in each candidate folder, as one may be missing


def read_labels(
    path: str | Path,
    *,
    kind: Kind | None = None,
    images: Path | None = None,
    part: str | None = None,
    prefer: Sequence[str] = (),
) -> Labels:
    """Read a labelled data set into COCO's form.

    Args:
        path: a COCO file, a ``data.yaml``, or the folder of a data set.
        kind: of its files; None: recognised.
        images: folder of the pictures, for COCO and VOC; None: looked for where tools put it.
        part: train, val, test or all; a data set's own words for them will do.
        prefer: the part that is taken when none is named; all of them where it has none of these.

    Raises:
        UserError: nothing that can be recognised or read; mistakes are named with file and line.
    """
    path = Path(path)
    kind = kind or recognise(path)
    if kind == "yolo":
        if images is not None:
            raise UserError(f"{images}: {path} itself says where its pictures are; name no folder of pictures")
        return read_yolo(path, part=part, prefer=prefer)
    if kind == "voc":
        return read_voc(path, images=images, part=part, prefer=prefer)
    return _read_coco(path, images, part, prefer)


def read_spec(spec: LabelSpec, *, prefer: Sequence[str] = ()) -> Labels:
    """Read what a command line names; see `read_labels`."""
    return read_labels(spec.path, kind=spec.kind, part=spec.part, prefer=prefer)


def recognise(path: Path) -> Kind:
    """What a file or folder holds.

    Raises:
        UserError: nothing that is known.
    """
    if path.is_file():
        if path.name.lower().endswith((".json", ".json.gz")):
            return "coco"
        if path.suffix.lower() in (".yaml", ".yml"):
            return "yolo"
    elif path.is_dir():
        if yaml_of(path) is not None or (path / "classes.txt").is_file():
            return "yolo"
        if _coco_files(path):
            return "coco"
        if xml_files(path):
            return "voc"
    else:
        raise UserError(f"{path}: {absent(path)}")
    raise UserError(
        f"{path}: no labels that are known: give a COCO .json, a YOLO data.yaml, or a folder with one of them or with "
        "Pascal VOC's XML files"
    )


def _coco_files(folder: Path) -> dict[str, Path]:
    """Part → annotation file: Roboflow's folders, or COCO's own ``annotations/instances_PART….json``."""
    if (folder / ROBOFLOW).is_file():
        return {"": folder / ROBOFLOW}
    files = {PART_NAMES[name]: file for name in PART_NAMES if (file := folder / name / ROBOFLOW).is_file()}
    for file in sorted((folder / "annotations").glob("instances_*.json")) if not files else ():
        name = file.stem.removeprefix("instances_").rstrip("0123456789")
        files["" if name == "all" else PART_NAMES.get(name, name)] = file
    return files


def _read_coco(path: Path, images: Path | None, part: str | None, prefer: Sequence[str]) -> Labels:
    if path.is_dir():
        files = _coco_files(path)
        if not files:
            raise UserError(f"{path}: neither {ROBOFLOW} nor annotations/instances_….json in it")
        chosen = choose_parts(files, part, prefer, str(path))
        opened = [(name, _read_file(file, images)) for name, file in files.items() if name in chosen]
        return _joined(path, opened) if len(opened) > 1 else opened[0][1]
    labels = _read_file(path, images)
    if part is None and not prefer:
        return labels
    check_ground_truth(labels.content, where=labels.where)
    entries = labels.content["images"]
    parts = [str(entry.get("split") or "") for entry in entries]
    if not any(parts) and part is None:
        return labels
    requested = choose_parts(parts, part, prefer, str(path))
    if requested >= set(parts):
        return labels
    selected = [entry for entry in entries if str(entry.get("split") or "") in requested]
    ids = {entry["id"] for entry in selected}
    annotations = [one for one in labels.content["annotations"] if one["image_id"] in ids]
    content = {**labels.content, "images": selected, "annotations": annotations}
    return Labels(content=content, root=labels.root, kind="coco", where=labels.where)


def _read_file(file: Path, images: Path | None) -> Labels:
    content = read_json(file, hint="expected a COCO annotation file")
    if tool := _other_tool(content):
        raise UserError(f"{file}: is {tool}, which is not read; export COCO, YOLO or Pascal VOC there")
    root = images if images is not None else _pictures_of(file, content)
    return Labels(content=content, root=root, kind="coco", where=str(file))


_OTHER_TABLES = {
    ("shapes", "imagePath"): "a file of LabelMe's",
    ("_via_img_metadata",): "a project of VIA's",
    ("metainfo", "data_list"): "MMDetection's own JSON",
    ("labels", "classes"): "FiftyOne's own JSON",
    ("objects", "size"): "a file of Supervisely's",
}
_OTHER_LISTS = {
    ("image", "annotations"): "CreateML's JSON",
    ("image", "label"): "Label Studio's own JSON",
    ("name", "labels"): "BDD100K's JSON",
    ("filename", "regions"): "an export of VIA's",
}
"""Keys of a file, or of its first entry, and the tool that writes them."""


def _other_tool(content: object) -> str | None:
    """The tool that wrote labels in a form that is not read; None: they may be COCO's."""
    if isinstance(content, dict) and "images" not in content:
        first = next(iter(content.values()), None)
        tables = [name for keys, name in _OTHER_TABLES.items() if content.keys() >= set(keys)]
    else:
        first = content[0] if isinstance(content, list) and content else None
        tables = []
    if isinstance(first, dict) and isinstance(first.get("data"), dict):
        return "Label Studio's own JSON"
    lists = [name for keys, name in _OTHER_LISTS.items() if isinstance(first, dict) and first.keys() >= set(keys)]
    return next(iter((*tables, *lists)), None)


def _pictures_of(file: Path, content: object) -> Path:
    """The folder that holds most of a file's first pictures, of those where tools put them."""
    truth = check_ground_truth(content, where=str(file))
    if not truth.sizes:
        return file.parent
    names = [truth.file_of(image_id) for image_id in islice(truth.sizes, FIRST)]
    part = file.name.partition(".")[0].removeprefix("instances_")
    above = file.parent.parent
    tried = [file.parent, file.parent / "images", file.parent / part, above / part]
    tried += [above / "images", above / "images" / part, above]
    counts = [sum((folder / name).is_file() for name in names) for folder in tried]
    if not any(counts):
        text = f"{file}: its picture {names[0]} is not in {file.parent}; {NAME_FOLDER}."
        raise UserError(text + backslash_hint(names[0]))
    return tried[counts.index(max(counts))]


def _joined(folder: Path, opened: list[tuple[str, Labels]]) -> Labels:
    """Parts of one data set as one: images and annotations are numbered anew, categories must agree."""
    first = opened[0][1]
    images: list[CocoJson] = []
    annotations: list[CocoJson] = []
    for part, labels in opened:
        check_ground_truth(labels.content, where=labels.where)
        if labels.content["categories"] != first.content["categories"]:
            raise UserError(f"{labels.where}: its categories differ from those of {first.where}")
        number = {}
        for entry in labels.content["images"]:
            number[entry["id"]] = len(images) + 1
            name = os.path.relpath(labels.root / picture_file(entry), folder).replace(os.sep, "/")
            images.append({**entry, "id": len(images) + 1, "file_name": name, "split": part})
        for one in labels.content["annotations"]:
            annotations.append({**one, "id": len(annotations) + 1, "image_id": number[one["image_id"]]})
    content = {**first.content, "images": images, "annotations": annotations}
    return Labels(content=content, root=folder, kind="coco", where=str(folder))
