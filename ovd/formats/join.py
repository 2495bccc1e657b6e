# SPDX-License-Identifier: Apache-2.0
"""Several label files as one: pictures are joined by their file, categories by their name, whatever its case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovd.formats.labels import Labels
from pretrain.data.coco import check_ground_truth, picture_file
from pretrain.data.coco_entries import CocoJson
from pretrain.engine.errors import UserError


def join_labels(several: Sequence[Labels]) -> Labels:
    """Labels of several files as one data set; ids may mean other things in each file.

    Args:
        several: one or more, of any format.

    Raises:
        UserError: a file that is not as it should be, or two that state different sizes of one picture.
    """
    if len(several) == 1:
        return several[0]
    root = Path(os.path.commonpath([labels.root.resolve() for labels in several]))
    images: dict[str, dict[str, Any]] = {}
    categories: dict[str, tuple[int, str]] = {}
    annotations: list[CocoJson] = []
    for labels in several:
        check_ground_truth(labels.content, where=labels.where)
        image_ids, category_ids = {}, {}
        for entry in labels.content["images"]:
            file = Path(os.path.abspath(labels.root.resolve() / picture_file(entry))).relative_to(root).as_posix()
            image = images.setdefault(file, {**entry, "id": len(images) + 1, "file_name": file})
            size, other = ((one.get("width"), one.get("height")) for one in (entry, image))
            if None not in (*size, *other) and size != other:
                raise UserError(
                    f"{labels.where}: {file} has {size[0]} × {size[1]} pixels, in another label file "
                    f"{other[0]} × {other[1]}"
                )
            image.update({key: value for key, value in entry.items() if image.get(key) is None})
            image_ids[entry["id"]] = image["id"]
        for category in labels.content["categories"]:
            number, _ = categories.setdefault(category["name"].casefold(), (len(categories) + 1, category["name"]))
            category_ids[category["id"]] = number
        for one in labels.content["annotations"]:
            ids = {"image_id": image_ids[one["image_id"]], "category_id": category_ids[one["category_id"]]}
            annotations.append({**one, **ids, "id": len(annotations) + 1})
    content: CocoJson = {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.values()],
    }
    notices = [notice for labels in several for notice in labels.notices]
    where = ", ".join(labels.where for labels in several)
    return Labels(content=content, root=root, kind=several[0].kind, where=where, notices=notices)
