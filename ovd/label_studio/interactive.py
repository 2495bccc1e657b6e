# SPDX-License-Identifier: Apache-2.0
"""Rectangles drawn with Label Studio's smart tool: parsing requests and building responses.

The page sends the rectangle as the ``context`` of a prediction of its one task, and shows the answer as suggestions.
When these are accepted or rejected it removes the rectangle, so the answer begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ovd.inference.arrays import Floats
from ovd.inference.example_scorers import SAME_IOU, SimilarRegions
from ovd.inference.postprocess import box_ious
from ovd.label_studio.answers import Result, Value, result_of, value_of
from pretrain.engine.errors import UserError
from pretrain.engine.stored import is_number

LABELS = ("rectanglelabels", "labels")


@dataclass(frozen=True, kw_only=True)
class RegionEntry:
    """One entry of a drawn region: with ``<Rectangle>`` and ``<Labels>`` a region has two.

    Attributes:
        control: ``from_name``.
        kind: ``type``, such as "rectanglelabels"; "rectangle" where no label was chosen.
        labels: that were chosen.
    """

    control: str
    kind: str
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnRegion:
    """A rectangle drawn by an annotator.

    Attributes:
        id: of the region.
        image: name of the ``<Image>`` that it lies on.
        parts: its entries.
        corner, size: per cent of the picture: left and top, width and height.
        rotation: degrees, clockwise about the corner.
    """

    id: str
    image: str
    parts: tuple[RegionEntry, ...]
    corner: tuple[float, float]
    size: tuple[float, float]
    rotation: float

    @property
    def name(self) -> str:
        """Its label."""
        return next((label for part in self.parts for label in part.labels), "object")

    def box(self, height: int, width: int) -> Floats:
        """(4,) the upright box around it, in pixels of a picture."""
        (x, y), (w, h) = self.corner, self.size
        across, down = np.array([w * width, 0]) / 100, np.array([0, h * height]) / 100
        turn = math.radians(self.rotation)
        matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        ends = np.stack([0 * across, matrix @ across, matrix @ down, matrix @ (across + down)])
        ends += np.array([x * width, y * height]) / 100
        return np.concatenate([ends.min(axis=0), ends.max(axis=0)]).astype(np.float32)


def read_drawn(body: Mapping[str, object]) -> DrawnRegion | None:
    """The rectangle in the context of a request for predictions; None: there is none.

    Args:
        body: of the request.

    Raises:
        UserError: something was drawn, and it is no rectangle.
    """
    params = body.get("params")
    context = params.get("context") if isinstance(params, dict) else None
    entries = context.get("result") if isinstance(context, dict) else None
    if not entries:
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("the request's context has no list of regions (params.context.result)")
    rectangles = [entry for entry in entries if entry.get("type") in ("rectangle", *LABELS) and _numbers(entry)]
    if not rectangles:
        kinds = ", ".join(sorted({str(entry.get("type"))[:40] for entry in entries}))
        raise UserError(f'what was drawn is not a rectangle ({kinds}); set smart="true" on <RectangleLabels> alone')
    last = rectangles[-1]  # of several the one that was drawn now
    entries_of_region = [entry for entry in rectangles if entry.get("id") == last.get("id")]
    x, y, width, height, rotation = _numbers(last) or (0.0,) * 5
    return DrawnRegion(
        id=str(last.get("id", "drawn"))[:100],
        image=str(last.get("to_name", "")),
        parts=tuple(_part(entry) for entry in entries_of_region),
        corner=(x, y),
        size=(width, height),
        rotation=rotation,
    )


def _numbers(entry: Mapping[str, object]) -> tuple[float, ...] | None:
    """Left, top, width, height and rotation of an entry; None: it has no such numbers."""
    value = entry.get("value")
    if not isinstance(value, dict):
        return None
    values = [value.get("rotation", 0), *(value.get(key) for key in ("x", "y", "width", "height"))]
    numbers = [float(one) for one in values if is_number(one)]
    return (*numbers[1:], numbers[0]) if len(numbers) == len(values) else None


def _part(entry: Mapping[str, object]) -> RegionEntry:
    value = entry.get("value")
    assert isinstance(value, dict)
    kind = str(entry.get("type"))
    chosen = value.get(kind) if kind in LABELS else None
    labels = tuple(str(label) for label in chosen) if isinstance(chosen, list) else ()
    return RegionEntry(control=str(entry.get("from_name", "")), kind=kind, labels=labels)


def similar_results(drawn: DrawnRegion, similar: SimilarRegions, size: tuple[int, int]) -> list[Result]:
    """The drawn rectangle, and the boxes that resemble it, as regions with its label; ``size``: (height, width)."""
    overlap = box_ious(similar.boxes, drawn.box(*size)[None])[:, 0]
    (x, y), (w, h) = drawn.corner, drawn.size
    first: Value = {"x": x, "y": y, "width": w, "height": h, "rotation": drawn.rotation}
    others = [
        (value_of(box, size), float(score))
        for box, score, same in zip(similar.boxes, similar.scores, overlap >= SAME_IOU, strict=True)
        if not same
    ]
    return [
        result_of(
            _with_labels(sides, part),
            id=f"{drawn.id}-{number}",
            control=part.control,
            image=drawn.image,
            kind=part.kind,
            size=size,
            score=score,
        )
        for number, (sides, score) in enumerate([(first, 1.0), *others])
        for part in drawn.parts
    ]


def _with_labels(sides: Value, part: RegionEntry) -> Value:
    if part.kind == "rectanglelabels":
        return {**sides, "rectanglelabels": list(part.labels)}
    return {**sides, "labels": list(part.labels)} if part.kind == "labels" else sides
