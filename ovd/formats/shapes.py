# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures in the form that writers need: names, corners, outlines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ovd.formats.labels import PART_NAMES, Labels
from ovd.pictures import upright_size
from pretrain.data import masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CONTROLS = re.compile("[\0-\x1f\x7f]")
FINE = 2  # mask cells per pixel when its outline is followed: a quarter of a pixel is lost instead of a half


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One object.

    Attributes:
        index: of its class, from 0.
        name: of its class.
        box: x1, y1, x2, y2 in pixels.
        score: of a detection; None for a label.
        crowd: COCO's ``iscrowd``; VOC's ``difficult``.
        segmentation: COCO's polygons or run lengths, or None.
    """

    index: int
    name: str
    box: tuple[float, float, float, float]
    score: float | None = None
    crowd: bool = False
    segmentation: Any = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with its objects.

    Attributes:
        id: of the data set.
        file: path below the data set's folder, as it was read.
        target: path below its part's folder in a data set that is written: no other of this part has its stem.
        source: where the picture lies.
        size: (height, width) upright.
        part: train, val, test, or empty.
        shapes: in the order of the file.
    """

    id: int | str
    file: str
    target: str
    source: Path
    size: tuple[int, int]
    part: str
    shapes: tuple[Shape, ...]

    @property
    def path(self) -> str:
        """Below the folder of pictures of a data set whose parts have folders."""
        return (PurePosixPath(self.part) / self.target).as_posix()


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """What is written: classes in order, and pictures."""

    names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    notices: list[str] = field(default_factory=list)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts there are, in the order they are met."""
        return tuple(dict.fromkeys(picture.part for picture in self.pictures))


def labelled_pictures(labels: Labels, *, sources: Mapping[str, Path] | None = None) -> LabelledPictures:
    """The pictures of a data set.

    Args:
        labels: as read.
        sources: ``file_name`` → path, for pictures that lie in several folders; others are below ``labels.root``.

    Raises:
        UserError: see `pretrain.data.coco.check_ground_truth`; a picture without a size that cannot be read.
    """
    truth = labels.truth()
    index = {category: i for i, category in enumerate(sorted(truth.categories))}
    names = tuple(truth.categories[category] for category in index)
    shapes: dict[int | str, list[Shape]] = {}
    for one in truth.annotations:
        x, y, width, height = one["bbox"]
        shapes.setdefault(one["image_id"], []).append(
            Shape(
                index=index[one["category_id"]],
                name=truth.categories[one["category_id"]],
                box=(x, y, x + width, y + height),
                score=one.get("score"),
                crowd=bool(one["iscrowd"]),
                segmentation=one.get("segmentation"),
            )
        )
    used: set[str] = set()
    pictures = []
    for image_id, size in truth.sizes.items():
        file, part = truth.file_of(image_id), truth.parts.get(image_id, "")
        source = (sources or {}).get(file, labels.root / file)
        pictures.append(
            Picture(
                id=image_id,
                file=file,
                target=_target(file, part, used),
                source=source,
                size=size or upright_size(source),
                part=part,
                shapes=tuple(shapes.get(image_id, ())),
            )
        )
    return LabelledPictures(names=names, pictures=tuple(pictures), notices=list(truth.warnings))


def _target(file: str, part: str, used: set[str]) -> str:
    """A file's path without the folders of parts and pictures, and with a unique stem."""
    path = PurePosixPath(_CONTROLS.sub("_", file))  # lists of files have a name a line
    folders = [name for name in path.parts[:-1] if name not in ("images", "JPEGImages", "..", "/")]
    if folders and PART_NAMES.get(folders[0]) == part:
        folders = folders[1:]
    return own_path(PurePosixPath(part, *folders, path.name), used).relative_to(part).as_posix()


def own_path(path: PurePosixPath, used: set[str]) -> PurePosixPath:
    """``path``, or where an earlier one differs by its suffix or not at all, one with a number behind its stem.

    Args:
        path: of a picture; other files will have its stem.
        used: the earlier ones; this one is added.
    """
    number, stem = 1, path.stem
    while (key := (path.parent / stem).as_posix().casefold()) in used:
        number += 1
        stem = f"{path.stem}_{number}"
    used.add(key)
    return path.with_name(f"{stem}{path.suffix}")


def outlines(shape: Shape, size: tuple[int, int]) -> list[list[float]]:
    """The outer outlines of an object, x1, y1, x2, y2, … in pixels; [] where it has a box only. Holes are left out."""
    segmentation = shape.segmentation
    if not segmentation:
        return []
    if isinstance(segmentation, list):
        return [[float(v) for v in polygon] for polygon in segmentation if len(polygon) >= 6]
    return mask_outlines(masks.decode(segmentation, size, shape.name))


def mask_outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """The outer outlines of an (H, W) mask, largest first, x1, y1, x2, y2, … in pixels."""
    import cv2
    import numpy as np

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    fine = part.repeat(FINE, 0).repeat(FINE, 1)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    result = []
    for contour in sorted(contours, key=cv2.contourArea, reverse=True):
        points = (contour.reshape(-1, 2) + 0.5) / FINE + (left, top)
        if len(points) >= 3:
            result.append([round(float(v), 2) for v in points.reshape(-1)])
    return result


def joined(polygons: Sequence[Sequence[float]]) -> list[float]:
    """Several outlines as one polygon, for formats with one per object; each is entered and left at its first point."""
    if len(polygons) == 1:
        return list(polygons[0])
    forth = [value for polygon in polygons for value in [*polygon, *polygon[:2]]]
    back = [value for polygon in reversed(polygons[:-1]) for value in polygon[:2]]
    return forth + back
