# SPDX-License-Identifier: Apache-2.0
"""The answers of many pictures as one zip of labels, in a format that other tools read."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ovd.formats.names import FORMATS
from pretrain.data.coco_entries import CocoAnnotation, CocoImage, CocoJson
from pretrain.engine.errors import UserError, did_you_mean
from pretrain.engine.files import fitting_name

MOST_PICTURES = 200
MOST_BOXES = 60_000  # 300 in each
ROOM = "_123456.json"  # what formats, and a number that makes it unique, add to a picture's name
STAMP = (1980, 1, 1, 0, 0, 0)  # of all files in the zip: the same answers give the same bytes


def pack(answers: Any, form: Any) -> bytes:
    """A zip of labels without pictures.

    Args:
        answers: as a program or the page sent it: a list of ``{"name": "cat.jpg", "size": [width, height], "boxes":
            [{"name", "score", "box": [x1, y1, x2, y2], "polygons": [[x, y, …]]}]}``.
        form: one of `ovd.formats.names.FORMATS`.

    Returns:
        the file's bytes.

    Raises:
        UserError: what is sent is not that, or too much.
    """
    if form not in FORMATS:
        hint = did_you_mean(form, FORMATS) if isinstance(form, str) else ""
        raise UserError(f"there is no format {str(form)[:40]!r}{hint}; there is {', '.join(FORMATS)}")
    content = _content(answers)
    from ovd.formats.labels import Labels
    from ovd.formats.shapes import labelled_pictures
    from ovd.formats.write import write_labels

    # In the page's own folder, which goes with the page, or at the next start.
    with tempfile.TemporaryDirectory(prefix="pack-", dir=os.environ.get("GRADIO_TEMP_DIR") or None) as folder:
        out = Path(folder)
        # The pictures are where the zip is opened: LabelMe's files name them by a relative path.
        labels = Labels(content=content, root=out, kind="coco", where="the answers")
        write_labels(labelled_pictures(labels), out, form, picture_mode="none")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in out.rglob("*") if p.is_file()):
                archive.writestr(zipfile.ZipInfo(path.relative_to(out).as_posix(), STAMP), path.read_bytes(),
                                 zipfile.ZIP_DEFLATED)  # fmt: skip
    return buffer.getvalue()


def _content(answers: Any) -> CocoJson:
    """COCO's annotation file of the answers; the writers check the rest."""
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise UserError('the answers must be a list like [{"name": "cat.jpg", "size": [640, 480], "boxes": […]}]')
    if not 0 < len(answers) <= MOST_PICTURES:
        raise UserError(f"labels of {len(answers)} pictures; 1 to {MOST_PICTURES} go into one zip")
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    numbers: dict[str, int] = {}
    used: set[str] = set()
    for number, one in enumerate(answers, 1):
        name = _file_name(one.get("name"), number, used)
        width, height = _numbers(one.get("size"), 2, f"size of {name}")
        if min(width, height) < 1:
            raise UserError(f"size of {name}: expected 2 numbers above 0")
        images.append({"id": number, "file_name": name, "width": int(width), "height": int(height)})
        boxes = one.get("boxes")
        if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
            raise UserError(f"{name}: boxes must be a list of objects")
        if len(annotations) + len(boxes) > MOST_BOXES:
            raise UserError(f"more than {MOST_BOXES:,} boxes; send fewer pictures at once")
        for box in boxes:
            x1, y1, x2, y2 = _numbers(box.get("box"), 4, f"box of {name}")
            row: CocoAnnotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": numbers.setdefault(_class_name(box.get("name"), name), len(numbers) + 1),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": _numbers([box.get("score")], 1, f"score of {name}")[0],
            }
            if polygons := box.get("polygons"):
                row["segmentation"] = polygons
            annotations.append(row)
    categories = [{"id": i, "name": name} for name, i in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories or [{"id": 1, "name": "nothing"}]}


def _file_name(value: Any, number: int, used: set[str]) -> str:
    """A name without folders that no other picture has."""
    text = str(value or "").replace("\\", "/").rsplit("/", 1)[-1]
    text = "".join(c for c in text if c.isprintable())[-200:].lstrip(".") or f"picture {number}"
    path, extra = Path(text), 1
    text = fitting_name(path.stem, f"{path.suffix[:20]}{ROOM}").removesuffix(ROOM)
    path = Path(text)
    while text.casefold() in used:
        extra += 1
        text = f"{path.stem}_{extra}{path.suffix}"
    used.add(text.casefold())
    return text


def _class_name(value: Any, picture: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 100:
        raise UserError(f"{picture}: a box needs a name of 1 to 100 letters")
    return value


def _numbers(value: Any, count: int, what: str) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise UserError(f"{what}: expected {count} numbers")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6 for v in value):
        raise UserError(f"{what}: expected {count} numbers")
    return [float(v) for v in value]
