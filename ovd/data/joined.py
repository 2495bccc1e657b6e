# SPDX-License-Identifier: Apache-2.0
"""Joins COCO files of the same images, and separates objects from doubtful boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.coco import Annotation, GroundTruth, ImageId
from pretrain.engine.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class JoinedImages:
    """Images of all files, in the order in which they first occur.

    Attributes:
        files: image id -> path below the picture folder.
        sizes: image id -> (height, width) in pixels, or None where the first file does not say.
        parts: image id -> its ``split``, for images that have one.
    """

    files: dict[ImageId, str]
    sizes: dict[ImageId, tuple[int, int] | None]
    parts: dict[ImageId, str]

    def of_part(self, part: str | None) -> list[ImageId]:
        """The images whose ``split`` is ``part``; None or "all": all of them."""
        return [i for i in self.files if part in (None, "all") or self.parts.get(i) == part]


def join_images(truths: Sequence[GroundTruth]) -> JoinedImages:
    """The images of several files.

    Raises:
        UserError: an image has another file name in another file.
    """
    joined = JoinedImages(files={}, sizes={}, parts={})
    for truth in truths:
        for image_id, file in truth.files.items():
            if joined.files.setdefault(image_id, file) != file:
                raise UserError(
                    f"{truth.where}: image {image_id!r} is {file}, in another annotation file "
                    f"{joined.files[image_id]}; files that are joined must number the same images the same way"
                )
            joined.sizes.setdefault(image_id, truth.sizes[image_id])
        joined.parts.update(truth.parts)
    return joined


def is_object(annotation: Annotation, *, confident: float, doubtful: float) -> bool | None:
    """Whether a box is an object; False: doubtful or a crowd, neither object nor background; None: nothing.

    Args:
        annotation: without a ``score`` it is confident.
        confident, doubtful: lowest scores of either.
    """
    score = float(annotation.get("score", 1.0))
    if score < doubtful or min(annotation["bbox"][2:]) <= 0:
        return None
    return score >= confident and not annotation["iscrowd"]


def corners_of(boxes: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """(n, 4) x1, y1, x2, y2 of COCO's x, y, width, height."""
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners


def no_such_part(part: str | None, parts: Iterable[str]) -> UserError:
    """The message about a part without images."""
    there = ", ".join(sorted(set(parts))) or "none"
    return UserError(f"data.part {part}: no image has this split (there: {there}); 'all' takes all pictures")


def check_withheld(withheld: Collection[str], truths: Sequence[GroundTruth]) -> None:
    """Refuse names that no file has a category of.

    Raises:
        UserError: there is such a name.
    """
    names = {name for truth in truths for name in truth.categories.values()}
    for name in withheld:
        if name not in names:
            raise UserError(f"data.withheld: no annotation file has a category {name!r}{did_you_mean(name, names)}")
