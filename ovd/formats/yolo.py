# SPDX-License-Identifier: Apache-2.0
"""YOLO's labels, read: ``data.yaml`` (Ultralytics', Roboflow's), or a folder with ``classes.txt``.

One text file a picture, one object a line: ``class cx cy width height``, or ``class x1 y1 x2 y2 x3 y3 …`` for an
outline, in shares of the upright picture. Labels lie where Ultralytics looks: in ``labels/`` for pictures in
``images/``, else beside the picture. A sixth number after a box is a teacher's score. With ``kpt_shape`` in the file
(poses) the first four numbers are the box and the others are left out; poses without it are refused.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ovd.formats.labels import PART_NAMES, PARTS, Labels, Notes, choose_parts, coco_categories
from ovd.formats.yolo_poses import Outlines, keypoint_shape, keypoints_hint
from ovd.pictures import upright_size
from ovd.plain_yaml import read_plain_yaml
from pretrain.data import masks
from pretrain.data.coco_entries import CocoAnnotation, CocoImage, CocoObject
from pretrain.data.folder import EXTENSIONS, ImageListing, backslash_hint, find_images
from pretrain.engine.errors import BadImageError, UserError, absent, shorten
from pretrain.engine.files import read_text

NOTHING = ("", "~", "null", "Null", "NULL")
"""How YAML writes that a key has no value."""

TOLERANCE = 0.01  # by which a number may leave [0, 1]: what rounding and Ultralytics allow


class _Source(NamedTuple):
    """Content of a data.yaml or a folder."""

    names: dict[int, str]
    pictures: list[tuple[str, Path]]  # (part, path)
    root: Path
    poses: bool
    skipped_notices: list[str]  # pictures in formats that are not read


def read_yolo(path: Path, *, part: str | None = None, prefer: Sequence[str] = ()) -> Labels:
    """Read a data set in YOLO's form.

    Args:
        path: its ``data.yaml``, or a folder with one, or with ``classes.txt``.
        part, prefer: see `choose_parts`.

    Raises:
        UserError: no names, no pictures, no labels, or lines that are none, each with file and line.
    """
    file = yaml_of(path)
    where = str(file or path)
    source = _from_yaml(file) if file is not None else _from_folder(path)
    requested = choose_parts([p for p, _ in source.pictures], part, prefer, where)
    notes = Notes(where)
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    outlines = Outlines()
    labelled = 0
    owners: dict[Path, str] = {}
    for number, (belongs, picture) in enumerate(source.pictures, 1):
        if belongs not in requested:
            continue
        try:
            height, width = upright_size(picture)
        except BadImageError as problem:
            notes.odd("pictures cannot be read and are left out", f"{picture}: {problem.reason}")
            continue
        name = os.path.relpath(picture, source.root).replace(os.sep, "/")
        images.append({"id": number, "file_name": name, "height": height, "width": width, "split": belongs})
        labels = label_file(picture)
        if labels is None:
            notes.odd("pictures have no label file: nothing is in them", name)
            continue
        labelled += 1
        if labels in owners:
            notes.odd("pictures share a label file with another one", f"{name} and {owners[labels]}: {labels}")
        owners[labels] = name
        for line in _read_lines(labels, notes):
            one = _object(line, source, (height, width), notes, outlines)
            if one is not None:
                annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **one})
    notes.raise_mistakes()
    _count_ownerless(source.pictures, notes)
    poses_notice = outlines.poses_notice()
    if outlines.are_poses:
        raise UserError(f"{where}: {poses_notice}")
    if not labelled:
        expected = next((str(_label_candidates(p)[0]) for _, p in source.pictures), "nowhere")
        raise UserError(f"{where}: no picture has a label file; looked for {expected} and so on")
    content = {"images": images, "annotations": annotations, "categories": coco_categories(source.names)}
    notices = [*notes.notices(), *([] if poses_notice is None else [poses_notice]), *source.skipped_notices]
    return Labels(content=content, root=source.root, kind="yolo", where=where, notices=notices)


def yaml_of(path: Path) -> Path | None:
    """The file itself, or the ``data.yaml`` (or only ``.yaml``) of a folder; None where it has none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: {absent(path)}")
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (path / name).is_file():
            return path / name
    others = sorted(p for p in [*path.glob("*.yaml"), *path.glob("*.yml")] if not p.name.startswith("."))
    return others[0] if len(others) == 1 else None


def label_file(picture: Path) -> Path | None:
    """The label file of a picture, if there is one."""
    return next((candidate for candidate in _label_candidates(picture) if candidate.is_file()), None)


def _label_candidates(picture: Path) -> list[Path]:
    sibling = picture.with_suffix(".txt")
    parts = list(sibling.parts)
    at = [i for i, name in enumerate(parts[:-1]) if name == "images"]
    if not at:
        return [sibling]
    parts[at[-1]] = "labels"
    return [Path(*parts), sibling]


def _count_ownerless(pictures: Sequence[tuple[str, Path]], notes: Notes) -> None:
    """Note label files that no picture has: it was renamed or deleted, or their names are spelt otherwise.

    Only folders called ``labels`` are looked into: beside pictures there are texts of other kinds.
    """
    candidates = [(picture, _label_candidates(picture)) for _, picture in pictures]
    expected = {labels[0] for _, labels in candidates if len(labels) > 1}
    folders = {labels[0].parent: picture.parent for picture, labels in candidates if len(labels) > 1}
    for folder, beside in sorted(folders.items()):
        stems = {path.stem for path in beside.iterdir()}  # of all pictures, those that no part lists among them
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            ours = file.suffix.lower() == ".txt" and not file.name.startswith(".") and file.name != "classes.txt"
            if ours and file not in expected and (file.stem not in stems or file.suffix != ".txt"):
                notes.odd("label files belong to no picture: their objects are left out", str(file))


def _from_yaml(file: Path) -> _Source:
    try:
        content = read_plain_yaml(read_text(file))
    except ValueError as problem:
        raise UserError(f"{file}: {problem}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected the keys names, train, val, …; it is a YOLO data.yaml?")
    names = _names(content, file)
    root = file.parent
    if isinstance(base := content.get("path"), str) and base:
        root = next((p for p in (file.parent / base, Path(base)) if p.is_dir()), file.parent)
    pictures: list[tuple[str, Path]] = []
    skipped_notices: list[str] = []
    for key in dict.fromkeys([*PARTS, *PART_NAMES]):
        entries = content.get(key)
        if entries in (None, *NOTHING):
            continue
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, str):
                raise UserError(
                    f"{file}: {key}: expected a folder or a text file of paths, found {shorten(reprlib.repr(entry))}"
                )
            listing = _pictures_at(entry, root, file, key)
            pictures += [(PART_NAMES[key], path) for path in listing.paths]
            skipped_notices += [f"{key}: {listing}"] if str(listing) else []
    if not pictures:
        raise UserError(f"{file}: none of train, val and test names a folder of pictures")
    return _Source(names, _without_repeats(pictures), root, "kpt_shape" in content, skipped_notices)


def _names(content: Mapping[str, object], file: Path) -> dict[int, str]:
    listed = content.get("names")
    if isinstance(listed, list):
        listed = dict(enumerate(listed))
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{file}: names: expected the list of classes")
    names = {}
    for index, name in listed.items():
        if not re.fullmatch("[0-9]{1,9}", str(index)) or not isinstance(name, str) or not name.strip():
            # Aliases make a short YAML endless when it is written out.
            given = f"{shorten(reprlib.repr(index))}: {shorten(reprlib.repr(name))}"
            raise UserError(f"{file}: names: {given} is not a class index with its name")
        names[int(index)] = name
    count = content.get("nc")
    if isinstance(count, str) and count.isdecimal() and int(count) != len(names):
        raise UserError(f"{file}: nc is {count}, but names has {len(names)} classes")
    return names


def _pictures_at(entry: str, root: Path, file: Path, key: str) -> ImageListing:
    """The pictures that one entry of a data.yaml names.

    Roboflow writes ``../train/images`` where the pictures are in ``train/images`` beside the file.
    """
    tried = [root / entry, file.parent / entry]
    if entry.startswith("../"):
        tried += [root / entry[3:], file.parent / entry[3:]]
    source = next((path for path in tried if path.exists()), None)
    if source is None:
        hint = backslash_hint(entry)
        raise UserError(f"{file}: {key}: {entry}: no such folder (looked for {tried[0]}).{hint}")
    if source.is_dir():
        return find_images(source)
    hint = f"{key} in {file.name} names a folder of pictures or a text file with their paths"
    lines = [line.strip() for line in read_text(source, hint=hint).splitlines()]
    paths = [source.parent / line if not Path(line).is_absolute() else Path(line) for line in lines if line]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{source}:{paths.index(missing[0]) + 1}: {missing[0]}: no such picture.{backslash_hint(missing[0])}"
        )
    read = [path for path in paths if path.suffix.lower() in EXTENSIONS]
    return ImageListing(read, Counter(path.suffix.lower() for path in paths if path not in read))


def _from_folder(folder: Path) -> _Source:
    """``images/``, ``labels/`` and ``classes.txt``, as LabelImg and Label Studio write them."""
    listed = next((folder / name for name in ("classes.txt", "labels/classes.txt") if (folder / name).is_file()), None)
    if listed is None:
        raise UserError(f"{folder}: neither a data.yaml nor a classes.txt: the names of YOLO's classes are not known")
    lines = read_text(listed).splitlines()
    names = {index: line.strip() for index, line in enumerate(lines) if line.strip()}
    if not names:
        raise UserError(f"{listed}: is empty; write the names of the classes there, one a line")
    inside = folder / "images" if (folder / "images").is_dir() else folder
    listing = find_images(inside)
    pictures = [(_part_of(path.relative_to(inside)), path) for path in listing.paths]
    return _Source(names, pictures, folder, poses=False, skipped_notices=[str(listing)] if str(listing) else [])


def _part_of(below: Path) -> str:
    return PART_NAMES.get(below.parts[0], "") if len(below.parts) > 1 else ""


def _without_repeats(pictures: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Each picture once, in the first part that lists it."""
    first_entry: dict[str, tuple[str, Path]] = {}
    for part, path in pictures:
        first_entry.setdefault(os.path.realpath(path), (part, path))
    return list(first_entry.values())


class _Line(NamedTuple):
    location: str  # file:line
    words: list[str]


def _read_lines(file: Path, notes: Notes) -> Iterator[_Line]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        notes.mistake(str(file), f"cannot be read: {problem}")
        return
    lines: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if line in lines:
            notes.odd("lines occur twice in their file and count once", f"{file}:{number}")
            continue
        lines.add(line)
        yield _Line(f"{file}:{number}", words)


def _object(line: _Line, source: _Source, size: tuple[int, int], notes: Notes, outlines: Outlines) -> CocoObject | None:
    """COCO's annotation of a line without its ids; None after a mistake."""
    try:
        numbers = [float(word) for word in line.words]
    except ValueError:
        notes.mistake(line.location, f"{' '.join(line.words)[:60]!r}: expected numbers: class cx cy width height")
        return None
    index, values = numbers[0], numbers[1:]
    if not index.is_integer() or int(index) not in source.names:
        last = max(source.names)
        notes.mistake(line.location, f"class {line.words[0]} is not in names (0 to {last})")
        return None
    if source.poses:
        values = values[:4]
    shape = keypoint_shape(values)
    score = values.pop() if len(values) == 5 else None
    if len(values) < 4 or len(values) % 2:
        hint = "" if shape is None else f"; keypoints? Then {keypoints_hint(shape)}"
        notes.mistake(line.location, f"{len(line.words)} numbers are neither a box (5) nor an outline (7, 9, …){hint}")
        return None
    if not all(math.isfinite(v) and -TOLERANCE <= v <= 1 + TOLERANCE for v in values):
        hint = "are these pixels?" if shape is None else f"keypoints? Then {keypoints_hint(shape)}"
        notes.mistake(line.location, f"coordinates must be shares of the picture, from 0 to 1; {hint}")
        return None
    if score is not None and not 0 <= score <= 1:
        notes.mistake(line.location, f"the sixth number, {score}, is not a score from 0 to 1")
        return None
    if len(values) == 4 and min(values[2:]) < 0:
        notes.mistake(line.location, f"the box has a negative width or height ({values[2]:g} × {values[3]:g})")
        return None
    height, width = size
    one: CocoObject = {"category_id": int(index) + 1}
    if len(values) == 4:
        cx, cy, w, h = values
        corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    else:
        outlines.add(values)
        corners = [min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])]
        outline = [min(max(v, 0.0), 1.0) * (width, height)[i % 2] for i, v in enumerate(values)]
        one["segmentation"] = [[round(v, 3) for v in outline]]
    if min(corners) < -TOLERANCE or max(corners) > 1 + TOLERANCE:
        notes.odd("boxes reach over the border and are cut there", line.location)
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) * (width, height)[i % 2] for i, v in enumerate(corners))
    if not (x2 > x1 and y2 > y1):
        notes.odd("boxes without area", line.location)
    one["bbox"] = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
    if "segmentation" in one:
        one["area"] = masks.area(one["segmentation"], size, line.location)
    else:
        one["area"] = round(one["bbox"][2] * one["bbox"][3], 3)
    if score is not None:
        one["score"] = score
    return one
