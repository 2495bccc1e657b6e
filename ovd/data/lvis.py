# SPDX-License-Identifier: Apache-2.0
"""LVIS v1 annotation files (Gupta et al., arXiv:1908.03195) are COCO files with four things more, read here.

* Categories carry a ``frequency``: rare, common or frequent by the number of training images that show them. ViLD's
  split is base = frequent and common (866 of v1), novel = rare (337).
* Labels are *federated*: per image only the categories of its annotations and of ``neg_category_ids`` are verified.
* Categories of ``not_exhaustive_category_ids`` were found in the image, but not every object of them is labelled.
* Pictures are COCO's, named by ``coco_url`` instead of ``file_name``: ``…/train2017/000000391895.jpg``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovd.data.splits import Split, lvis_split
from pretrain.data.coco import ImageId, check_ground_truth
from pretrain.engine.errors import UserError

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


def split_of(spec: str, content: Any, *, where: str) -> Split:
    """The split that ``spec`` names for an annotation file.

    Args:
        spec: see :meth:`Split.load`; besides, ``lvis`` reads the groups off the file's own frequencies, and ``all``
            makes every category a base one.
        content: of the annotation file.
        where: its name, for messages.

    Raises:
        UserError: a file that is not COCO's form, or categories without a frequency for ``lvis``.
    """
    categories = check_ground_truth(content, where=where).categories
    if spec == "lvis":
        return lvis_split(content["categories"])
    if spec == "all":
        return Split.everything(categories)
    return Split.load(spec, categories=categories)


@dataclass(frozen=True, kw_only=True)
class Federated:
    """The categories that were annotated in each picture.

    Attributes:
        judged: image id -> categories whose presence or absence is known: detections of others are not judged.
        incomplete: image id -> categories of which some objects may be unlabelled: there an unmatched detection is
            neither right nor wrong.
        frequency: category id -> ``r``, ``c`` or ``f``.
    """

    judged: Mapping[ImageId, frozenset[int]]
    incomplete: Mapping[ImageId, frozenset[int]]
    frequency: Mapping[int, str]

    @classmethod
    def of(cls, content: Mapping[str, Any], *, where: str = "annotations") -> Federated:
        """Read it off an LVIS file.

        Raises:
            UserError: an image without the two lists, or a category without a frequency.
        """
        present: dict[ImageId, set[int]] = {}
        for annotation in content["annotations"]:
            present.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
        judged, incomplete = {}, {}
        for n, image in enumerate(content["images"]):
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                if not isinstance(image.get(key), list):
                    raise UserError(
                        f"{where}: images[{n}] has no list {key!r}, which LVIS's protocol needs; evaluate with "
                        "--protocol coco, or use an LVIS v1 file"
                    )
            judged[image["id"]] = frozenset(image["neg_category_ids"]) | present.get(image["id"], set())
            incomplete[image["id"]] = frozenset(image["not_exhaustive_category_ids"])
        lvis_split(content["categories"])  # refuses a category without a frequency
        return cls(
            judged=judged, incomplete=incomplete, frequency={c["id"]: c["frequency"] for c in content["categories"]}
        )


def is_lvis(content: Any) -> bool:
    """Whether an annotation file is federated: whether its images have ``neg_category_ids``."""
    images = content.get("images") if isinstance(content, Mapping) else None
    return (
        bool(images) and isinstance(images, list) and isinstance(images[0], Mapping) and "neg_category_ids" in images[0]
    )
