# SPDX-License-Identifier: Apache-2.0
"""Boxes in Label Studio's form."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from ovd.label_studio.config import BoxControl

if TYPE_CHECKING:
    from ovd.detections import Detections
    from ovd.inference.arrays import Floats


class _Labels(TypedDict, total=False):
    rectanglelabels: list[str]
    labels: list[str]


class Value(_Labels):
    """Corner, width and height in per cent of the picture, degrees about the corner, and the label."""

    x: float
    y: float
    width: float
    height: float
    rotation: float


class Result(TypedDict):
    """One entry of a prediction's ``result``."""

    id: str
    from_name: str
    to_name: str
    type: str
    original_width: int
    original_height: int
    image_rotation: int
    score: float
    value: Value


class Prediction(TypedDict):
    """What Label Studio stores of a task; ``score`` is that of its most doubtful box, None without any."""

    model_version: str
    score: float | None
    result: list[Result]


def prediction_of(version: str, results: list[Result]) -> Prediction:
    """A prediction by a model version."""
    scores = [result["score"] for result in results]
    return {"model_version": version, "score": min(scores, default=None), "result": results}


def results_of(control: BoxControl, detections: Detections) -> list[Result]:
    """The boxes of one control; with ``<Labels>`` each is a pair, a rectangle and its label under one id."""
    results: list[Result] = []
    for number in range(len(detections)):
        sides = value_of(detections.xyxy[number], detections.size)
        stored = [control.labels[detections.class_id[number]].stored]
        if control.rectangle is None:
            parts: list[tuple[str, str, Value]] = [
                (control.name, "rectanglelabels", {**sides, "rectanglelabels": stored})
            ]
        else:
            parts = [(control.rectangle, "rectangle", sides), (control.name, "labels", {**sides, "labels": stored})]
        results += [
            result_of(
                value,
                id=f"{control.image}-{control.name}-{number}",
                control=name,
                image=control.image,
                kind=kind,
                size=detections.size,
                score=float(detections.confidence[number]),
            )
            for name, kind, value in parts
        ]
    return results


def value_of(box: Floats, size: tuple[int, int]) -> Value:
    """A box x1, y1, x2, y2 in pixels of a picture of (height, width), without a label."""
    height, width = size
    x1, y1, x2, y2 = (float(v) for v in box)
    x1, x2 = max(0.0, x1) / width * 100, min(float(width), x2) / width * 100
    y1, y2 = max(0.0, y1) / height * 100, min(float(height), y2) / height * 100
    return {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}


def result_of(
    value: Value, *, id: str, control: str, image: str, kind: str, size: tuple[int, int], score: float
) -> Result:
    """An entry; ``size``: (height, width) of the picture."""
    return {
        "id": id,
        "from_name": control,
        "to_name": image,
        "type": kind,
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "score": round(score, 4),
        "value": value,
    }
