# SPDX-License-Identifier: Apache-2.0
"""A detection data set of your own: a CSV of boxes (file,x1,y1,x2,y2,name) becomes a COCO instances file."""

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.engine.errors import UserError, run_cli


def convert(table: Path, images: Path) -> dict[str, Any]:
    """The content of an instances file; boxes are x, y, width, height."""
    if not table.is_file():
        raise UserError(f"{table}: no such file; give a CSV of file,x1,y1,x2,y2,name")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["name"] for row in rows})
    files = sorted({row["file"] for row in rows})
    if missing := [name for name in files if not (images / name).is_file()]:
        raise UserError(f"{table}: no picture {images / missing[0]}; correct the column 'file' or the folder")
    sizes = {name: Image.open(images / name).size for name in files}
    annotations = []
    for n, row in enumerate(rows, 1):
        x1, y1, x2, y2 = (float(row[key]) for key in ("x1", "y1", "x2", "y2"))
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "id": n}
        annotations.append(
            {**box, "image_id": files.index(row["file"]) + 1, "category_id": names.index(row["name"]) + 1}
        )
    return {
        "images": [
            {"id": n, "file_name": f, "width": sizes[f][0], "height": sizes[f][1]} for n, f in enumerate(files, 1)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
        "annotations": annotations,
    }


if __name__ == "__main__":
    run_cli(lambda argv: print(json.dumps(convert(Path(argv[0]), Path(argv[1])))))
