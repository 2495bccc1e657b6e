# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC's labels, read: an XML file a picture, in ``Annotations/`` or beside it (LabelImg, Roboflow).

Corners count pixels from 1, the last one included, so a box begins half a pixel before its first and ends half a pixel
after its last: x from ``xmin - 1`` to ``xmax``. Some tools count from 0; where any corner is below 1 all are taken so.
``difficult`` objects, which VOC's evaluation passes over, become crowds, which COCO's passes over.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from ovd.formats.labels import PART_NAMES, PARTS, Labels, Notes, choose_parts, coco_categories
from ovd.pictures import upright_size
from pretrain.data.coco import side_in_pixels
from pretrain.data.coco_entries import CocoAnnotation, CocoImage, CocoObject
from pretrain.data.folder import EXTENSIONS
from pretrain.engine.errors import BadImageError, UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Element:
    """An XML element with the line it begins in."""

    def __init__(self, tag: str, line: int) -> None:
        self.tag, self.line, self.text = tag, line, ""
        self.children: list[Element] = []

    def find(self, path: str) -> Element | None:
        """The first element at ``a/b`` below."""
        element: Element | None = self
        for tag in path.split("/"):
            element = (
                next((child for child in element.children if child.tag == tag), None) if element is not None else None
            )
        return element

    def all(self, path: str) -> list[Element]:
        """Every element of the last name in ``a/b``, below the first of the others."""
        above, _, tag = path.rpartition("/")
        parent = self.find(above)
        return [] if parent is None else [child for child in parent.children if child.tag == tag]

    def value(self, path: str) -> str:
        """Its text; empty where it is missing."""
        element = self.find(path)
        return element.text.strip() if element is not None else ""


def parse_xml(data: bytes) -> Element:
    """The root element of a document without a document type: nothing in it can be expanded or fetched.

    Raises:
        ValueError: no XML, or a document type; ``LINE: what``.
    """
    declared = re.match(rb"\s*<\?xml[^>]*?encoding=[\"']([\w.:-]+)", data)
    if declared is not None:  # expat itself knows four encodings, and none of those that East Asian tools write
        name = declared[1].decode("ascii")
        try:
            data = data.decode(name).encode()
        except (LookupError, UnicodeError) as problem:
            raise ValueError(f"1: is not in {name}, as it says; save it as UTF-8") from problem
    parser = expat.ParserCreate("utf-8" if declared is not None else None)
    top = Element("", 0)
    stack = [top]

    def start(tag: str, _attributes: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(_tag: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        stack[-1].text += data

    def doctype(*_: object) -> None:
        raise ValueError(f"{parser.CurrentLineNumber}: has a document type (DOCTYPE), which is not read")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as problem:
        raise ValueError(f"{problem.lineno}: not XML: {expat.ErrorString(problem.code)}") from problem
    return top.children[0]


@dataclass(kw_only=True)
class _Annotation:
    """One annotation file."""

    path: Path
    root: Element
    picture: Path
    part: str
    size: tuple[int, int]


def read_voc(path: Path, *, images: Path | None = None, part: str | None = None, prefer: Sequence[str] = ()) -> Labels:
    """Read a data set in Pascal VOC's form.

    Args:
        path: a folder with ``Annotations/``, or with XML files in it or in ``train/``, ``valid/``, ``test/``.
        images: folder of the pictures; None: ``JPEGImages/`` or ``images/``, or beside the XML files.
        part, prefer: see `choose_parts`.

    Raises:
        UserError: no XML files, a picture that is not there, or objects without a name or a box, each with its line.
    """
    if not path.is_dir():
        raise UserError(f"{path}: Pascal VOC's labels are a folder of XML files; no such folder")
    files = xml_files(path)
    if not files:
        raise UserError(f"{path}: no XML files in Annotations/, train/, valid/, test/ or in the folder itself")
    notes = Notes(str(path))
    parts = _parts(path, files, notes)
    root = path if path.name != "Annotations" else path.parent
    documents = [d for file in files if (d := _open(file, root, images, parts[file], notes)) is not None]
    notes.raise_mistakes()
    names = sorted({o.value("name") for d in documents for o in _objects(d.root) if o.value("name")})
    if not any(_objects(d.root) for d in documents):
        raise UserError(f"{path}: no object in {len(files)} XML files")
    requested = choose_parts([parts[file] for file in files], part, prefer, str(path))
    shift = 0 if any(_counts_from_0(d.root) for d in documents) else 1
    folder = images or root
    pictures: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    number = {name: index + 1 for index, name in enumerate(names)}
    for image_id, document in enumerate(documents, 1):
        if document.part not in requested or not _measure(document, notes):
            continue
        height, width = document.size
        pictures.append(
            {"id": image_id, "file_name": document.picture.relative_to(folder).as_posix(),
             "height": height, "width": width, "split": document.part}
        )  # fmt: skip
        for element in _objects(document.root):
            one = _object(element, document, number, shift, notes)
            if one is not None:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **one})
    notes.raise_mistakes()
    _count_unlabelled(documents, notes)
    content = {"images": pictures, "annotations": annotations, "categories": coco_categories(names)}
    return Labels(content=content, root=folder, kind="voc", where=str(path), notices=notes.notices())


def _count_unlabelled(documents: Sequence[_Annotation], notes: Notes) -> None:
    """Note pictures beside those of the data set that have no XML file."""
    labelled = {document.picture for document in documents}
    for folder in sorted({picture.parent for picture in labelled}):
        for path in _visible_files(folder.iterdir(), folder):
            if path.suffix.lower() in EXTENSIONS and path not in labelled:
                notes.odd("pictures have no XML file and are left out", str(path))


def xml_files(path: Path) -> list[Path]:
    """The annotation files of a data set, in the order of its parts and names."""
    if (path / "Annotations").is_dir():
        return _visible_files((path / "Annotations").rglob("*.xml"), path)
    below = [folder for name in PART_NAMES if (folder := path / name).is_dir()]
    inside = [file for folder in below for file in _visible_files(folder.rglob("*.xml"), path)]
    return inside or _visible_files(path.glob("*.xml"), path)


def _visible_files(files: Iterable[Path], folder: Path) -> list[Path]:
    """Sorted, without hidden files and folders (macOS's ``._a.xml``)."""
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _parts(path: Path, files: Sequence[Path], notes: Notes) -> dict[Path, str]:
    """The part of each file: the folder it lies in, or the list of ``ImageSets/Main`` that names it."""
    parts = {}
    for file in files:
        below = file.relative_to(path).parts
        parts[file] = PART_NAMES.get(below[0], "") if len(below) > 1 else ""
    lists = (path if path.name != "Annotations" else path.parent) / "ImageSets" / "Main"
    by_name = {file.stem: file for file in files}
    for name in PARTS:
        listed = lists / f"{name}.txt"
        lines = os.fsdecode(listed.read_bytes()).removeprefix("\ufeff").splitlines() if listed.is_file() else []
        for number, line in enumerate(lines, 1):
            stem = line.strip() if line.strip() in by_name else "".join(line.split()[:1])  # spaces, or VOC's columns
            if stem in by_name:
                parts[by_name[stem]] = name
            elif stem:
                notes.odd("names in ImageSets/Main have no XML file", f"{listed}:{number}")
    return parts


def _open(file: Path, root: Path, images: Path | None, part: str, notes: Notes) -> _Annotation | None:
    try:
        document = parse_xml(file.read_bytes())
    except OSError as problem:
        notes.mistake(str(file), f"cannot be read: {problem.strerror}")
        return None
    except ValueError as problem:
        line, _, text = str(problem).partition(": ")
        notes.mistake(f"{file}:{line}", text)
        return None
    if document.tag != "annotation":
        notes.mistake(f"{file}:{document.line}", f"<{document.tag}> is not a Pascal VOC annotation")
        return None
    named = Path(document.value("filename").replace("\\", "/")).name
    folders = [images] if images is not None else [root / "JPEGImages", root / "images", file.parent, root]
    endings = [*EXTENSIONS, *map(str.upper, EXTENSIONS)]
    names = [name for name in (named, *(file.stem + ending for ending in endings)) if name]
    candidates = [folder / name for folder in folders for name in names]
    # VOC's own programs go by the file's name; a file that was copied or renamed still names its old picture.
    own = (p for p in candidates if p.stem == file.stem and os.path.isfile(p))
    others = (p for p in candidates if p.stem != file.stem and os.path.isfile(p))
    picture = next(own, None)
    if picture is None:
        picture = next(others, None)
    elif Path(named).stem != file.stem and next(others, None) is not None:
        notes.odd("XML files name the picture of another one; the picture of their own name is taken", str(file))
    if picture is None:
        notes.mistake(str(file), f"its picture {named or file.stem} is not in {folders[0]} nor beside it")
        return None
    return _Annotation(path=file, root=document, picture=picture, part=part, size=(0, 0))


def _measure(document: _Annotation, notes: Notes) -> bool:
    """Note the size of the upright picture; false where it cannot be read."""
    try:
        document.size = upright_size(document.picture)
    except BadImageError as problem:
        notes.odd("pictures cannot be read and are left out", f"{document.picture}: {problem.reason}")
        return False
    size = document.root.find("size")
    stated = tuple(document.root.value(f"size/{side}") for side in ("height", "width"))
    sides = tuple(side_in_pixels(text) for text in stated)
    if size is not None and None not in sides and sides != document.size:
        height, width = document.size
        notes.mistake(
            f"{document.path}:{size.line}",
            f"says {stated[1]} × {stated[0]} pixels, {document.picture.name} has {width} × {height} upright",
        )
        return False
    return True


def _objects(root: Element) -> list[Element]:
    return [child for child in root.children if child.tag == "object"]


def _counts_from_0(root: Element) -> bool:
    return any(_below_1(o.value(f"bndbox/{corner}")) for o in _objects(root) for corner in ("xmin", "ymin"))


def _turns(angle: str) -> bool:
    try:
        return float(angle) % 360 != 0
    except ValueError:
        return False


def _below_1(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _object(
    element: Element, document: _Annotation, number: dict[str, int], shift: int, notes: Notes
) -> CocoObject | None:
    """COCO's annotation of an object without its ids; None after a mistake."""
    location = f"{document.path}:{element.line}"
    name = element.value("name")
    if not name:
        notes.mistake(location, "object without a name")
        return None
    if sum(child.tag == "bndbox" for child in element.children) > 1:
        notes.mistake(location, f"{name}: more than one bndbox; write an object for each")
        return None
    box = element.find("bndbox")
    try:
        x1, y1, x2, y2 = (float(element.value(f"bndbox/{corner}")) for corner in CORNERS)
    except ValueError:
        notes.mistake(location, f"{name}: bndbox needs the numbers {', '.join(CORNERS)}")
        return None
    if box is not None:
        location = f"{document.path}:{box.line}"
    if any(a.value("name") == "rotation" and _turns(a.value("value")) for a in element.all("attributes/attribute")):
        notes.odd("boxes are turned by an angle (CVAT's 'rotation'), which is not read: taken as upright", location)
    height, width = document.size
    x1, y1 = x1 - shift, y1 - shift
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
        notes.mistake(location, f"{name}: bndbox from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is not a box")
        return None
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        notes.mistake(location, f"{name}: bndbox lies outside the picture of {width} × {height} pixels")
        return None
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
        notes.odd("boxes reach over the border and are cut there", location)
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    difficult = element.value("difficult").lower() in ("1", "true")
    if difficult:
        notes.odd("objects are difficult: not trained on, and neither right nor wrong in evaluation", location)
    w, h = x2 - x1, y2 - y1
    return {"category_id": number[name], "bbox": [x1, y1, w, h], "area": w * h, "iscrowd": int(difficult)}
