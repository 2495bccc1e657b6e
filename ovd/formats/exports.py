# SPDX-License-Identifier: Apache-2.0
"""Files that annotation tools import, and tables: LabelMe, CVAT, Label Studio, CSV."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from ovd.formats.shapes import LabelledPictures, Picture, Shape, outlines
from ovd.formats.xml import xml_document
from pretrain.engine.files import fitting_name, write_atomically, write_json

CSV_COLUMNS = ("file", "width", "height", "class", "score", "x1", "y1", "x2", "y2")
LABELME_VERSION = "5.5.0"
LABEL_STUDIO_ROOT = "/data/local-files/?d="  # how Label Studio names files of a local storage


def write_csv(labelled: LabelledPictures, out: Path) -> None:
    """``detections.csv``: a line an object, corners in pixels."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_COLUMNS)
    for picture in labelled.pictures:
        height, width = picture.size
        for shape in picture.shapes:
            score = "" if shape.score is None else round(shape.score, 5)
            table.writerow([picture.file, width, height, shape.name, score, *(round(v, 2) for v in shape.box)])
    write_atomically(out / "detections.csv", text.getvalue().encode("utf-8", "surrogateescape"))


def write_labelme(labelled: LabelledPictures, out: Path) -> None:
    """One ``.json`` per picture, in a folder per part, named by its stem: as LabelMe looks for it."""
    for picture in labelled.pictures:
        height, width = picture.size
        target = out / picture.path
        file = target.with_name(fitting_name(target.stem, ".json"))
        content: dict[str, object] = {
            "version": LABELME_VERSION,
            "flags": {},
            "shapes": [one for shape in picture.shapes for one in _labelme_shapes(shape, picture)],
            "imagePath": os.path.relpath(picture.source, file.parent).replace(os.sep, "/"),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_json(file, content, indent=1)


def _labelme_shapes(shape: Shape, picture: Picture) -> list[dict[str, object]]:
    x1, y1, x2, y2 = shape.box
    polygons = outlines(shape, picture.size)
    forms: list[tuple[str, list[list[float]]]] = [
        ("polygon", [[p[i], p[i + 1]] for i in range(0, len(p), 2)]) for p in polygons
    ]
    common: dict[str, object] = {"label": shape.name, "group_id": None, "description": "", "flags": {}}
    common |= {} if shape.score is None else {"score": shape.score}
    return [
        {**common, "shape_type": kind, "points": points}
        for kind, points in forms or [("rectangle", [[x1, y1], [x2, y2]])]
    ]


def write_cvat(labelled: LabelledPictures, out: Path) -> None:
    """``annotations.xml``, CVAT for images 1.1: upload it to a task that has the same pictures."""
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    task = SubElement(SubElement(root, "meta"), "task")
    SubElement(task, "size").text = str(len(labelled.pictures))
    listed = SubElement(task, "labels")
    for name in labelled.names:
        SubElement(SubElement(listed, "label"), "name").text = name
    for number, picture in enumerate(labelled.pictures):
        height, width = picture.size
        sides = {"width": str(width), "height": str(height)}
        element = SubElement(root, "image", {"id": str(number), "name": picture.file, **sides})
        for shape in picture.shapes:
            common = {"label": shape.name, "source": "auto", "occluded": "0", "z_order": "0"}
            polygons = outlines(shape, picture.size)
            for points in polygons:
                pairs = ";".join(f"{points[i]:.2f},{points[i + 1]:.2f}" for i in range(0, len(points), 2))
                SubElement(element, "polygon", {**common, "points": pairs})
            if not polygons:
                corners = zip(("xtl", "ytl", "xbr", "ybr"), shape.box, strict=True)
                SubElement(element, "box", {**common, **{key: f"{value:.2f}" for key, value in corners}})
    text = b'<?xml version="1.0" encoding="utf-8"?>\n' + xml_document(root)
    write_atomically(out / "annotations.xml", text)


def write_label_studio(labelled: LabelledPictures, out: Path) -> None:
    """``tasks.json`` with the objects as pre-annotations, and ``label_config.xml`` for the project.

    Pictures are named below Label Studio's local storage; its document root is the folder of the pictures.
    """
    tasks = []
    for picture in labelled.pictures:
        results = [one for n, shape in enumerate(picture.shapes) for one in _studio_results(shape, picture, n)]
        scores = [shape.score for shape in picture.shapes if shape.score is not None]
        prediction: dict[str, object] = {"model_version": "wordbox", "result": results}
        prediction |= {"score": min(scores)} if scores else {}
        tasks.append({"data": {"image": LABEL_STUDIO_ROOT + picture.file}, "predictions": [prediction]})
    write_json(out / "tasks.json", tasks, indent=1)
    view = Element("View")
    SubElement(view, "Image", {"name": "image", "value": "$image"})
    for tag, name in (("RectangleLabels", "label"), ("PolygonLabels", "outline")):
        group = SubElement(view, tag, {"name": name, "toName": "image"})
        for value in labelled.names:
            SubElement(group, "Label", {"value": value})
    write_atomically(out / "label_config.xml", xml_document(view))


def _studio_results(shape: Shape, picture: Picture, number: int) -> list[dict[str, object]]:
    """Label Studio's results of one object: corners and sides in per cent of the picture."""
    height, width = picture.size
    common: dict[str, object] = {
        "to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0
    }  # fmt: skip
    common |= {} if shape.score is None else {"score": shape.score}
    polygons = outlines(shape, picture.size)
    if polygons:
        return [
            {
                **common,
                "id": f"{picture.id}-{number}-{part}",
                "from_name": "outline",
                "type": "polygonlabels",
                "value": {
                    "points": [[p[i] / width * 100, p[i + 1] / height * 100] for i in range(0, len(p), 2)],
                    "polygonlabels": [shape.name],
                },
            }
            for part, p in enumerate(polygons)
        ]
    x1, y1, x2, y2 = shape.box
    sides = {"x": x1 / width, "y": y1 / height, "width": (x2 - x1) / width, "height": (y2 - y1) / height}
    value = {**{key: side * 100 for key, side in sides.items()}, "rotation": 0, "rectanglelabels": [shape.name]}
    return [{**common, "id": f"{picture.id}-{number}", "from_name": "label", "type": "rectanglelabels", "value": value}]
