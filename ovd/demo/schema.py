# SPDX-License-Identifier: Apache-2.0
"""Schema of an answer of the page and of ``/detect``, described in docs/guide/python.md. Boxes are in pixels."""

from __future__ import annotations

from typing import TypedDict


class AnsweredClass(TypedDict, total=False):
    """A class of the query; ``best`` is its best score anywhere in the picture, the rest is how it is drawn.

    ``synonyms`` and ``crops`` (how many) are of what was typed and shown for it.
    """

    id: int
    name: str
    best: float
    colour: str
    ink: str
    dash: list[int]
    synonyms: list[str]
    crops: int


DetectionRow = TypedDict(
    "DetectionRow",
    {"class": int, "score": float, "box": list[float], "polygons": list[list[float]], "near": list[str]},
    total=False,
)
"""A detection: ``class`` is the id of its class, ``box`` x1, y1, x2, y2, ``near`` the words that it looks most like."""


class Answer(TypedDict, total=False):
    """The whole answer; ``ms`` is how long its parts took, ``preview`` a data URL. With an ``error`` there is nothing
    else."""

    schema: int
    size: list[int]
    threshold: float
    floor: float
    classes: list[AnsweredClass]
    detections: list[DetectionRow]
    masks: bool
    notices: list[str]
    negatives: list[str]
    vocabulary: str
    everything: bool
    model: dict[str, object]
    regions: int
    cached: bool
    ms: dict[str, float]
    example: str | None
    preview: str
    error: str
