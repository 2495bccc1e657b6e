# SPDX-License-Identifier: Apache-2.0
"""A rectangle drawn with the smart tool: the request as Label Studio's page and server put it together (1.23), with
the region as its editor writes one, and the suggestions that the page takes from the answer.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from ovd.inference.example_scorers import similar_regions
from ovd.inference.scoring import RegionSet
from ovd.label_studio.interactive import read_drawn
from pretrain.engine.errors import UserError
from tests.detector.fakes import picture
from tests.label_studio.test_backend import CONFIG, PAIRS, Ask, backend, data_uri

RED = [(10, 20, 50, 70), (60, 20, 100, 70), (110, 20, 150, 70)]
PHOTO = data_uri(picture([*(("red", *box) for box in RED), ("blue", 10, 80, 60, 115)]))  # 160 × 120


def region(kind: str = "rectanglelabels", control: str = "label", **value: Any) -> dict[str, Any]:
    """What the editor writes of a rectangle about the first red thing."""
    sides = {"x": 10 / 1.6, "y": 20 / 1.2, "width": 40 / 1.6, "height": 50 / 1.2, "rotation": 0}
    return {
        "original_width": 160,
        "original_height": 120,
        "image_rotation": 0,
        "value": sides | value,
        "id": "Dx_aB91ISN",
        "from_name": control,
        "to_name": "image",
        "type": kind,
        "origin": "manual",
    }


def request(*regions: dict[str, Any], config: str = CONFIG, photo: str = PHOTO) -> dict[str, Any]:
    task = {
        "id": 7,
        "data": {"photo": photo},
        "annotations": [],
        "predictions": [],
        "drafts": [],
        "project": 2,
        "meta": {},
    }
    context = {"result": list(regions), "project_credentials_login": None, "project_credentials_password": None}
    return {
        "tasks": [task],
        "model_version": None,
        "project": "2.1795970204",
        "label_config": config,
        "params": {"login": None, "password": None, "context": context},
    }


def corners(result: dict[str, Any]) -> tuple[int, ...]:
    x, y, width, height = (result["value"][key] for key in ("x", "y", "width", "height"))
    return round(x * 1.6), round(y * 1.2), round((x + width) * 1.6), round((y + height) * 1.2)


def test_interactive__similar_objects_get_the_drawn_label(ask: Ask) -> None:
    answer = ask("POST", "/predict", request(region(rectanglelabels=["r"]))).body
    (prediction,) = answer["results"]  # one object, from whose "result" the page reads
    assert prediction["model_version"] == answer["model_version"]
    found = prediction["result"]
    assert {result["type"] for result in found} == {"rectanglelabels"}
    assert {tuple(result["value"]["rectanglelabels"]) for result in found} == {("r",)}
    assert sorted(corners(result) for result in found) == RED  # not the blue one, and the drawn one only once
    assert corners(found[0]) == RED[0]  # the page removes what was drawn
    assert len({result["id"] for result in found}) == 3 and all(r["id"].startswith("Dx_aB91ISN") for r in found)


def test_rectangles__without_a_label_come_back_without_one(ask: Ask) -> None:
    (prediction,) = ask("POST", "/predict", request(region(kind="rectangle"))).body["results"]
    assert sorted(corners(result) for result in prediction["result"]) == RED
    assert all(result["type"] == "rectangle" and "rectanglelabels" not in result["value"]
               for result in prediction["result"])  # fmt: skip


def test_rectangles__come_in_pairs_with_their_labels(ask: Ask) -> None:
    pair = (region("rectangle", "box"), region("labels", "label", labels=["blue"]))
    (prediction,) = ask("POST", "/predict", request(*pair, config=PAIRS)).body["results"]
    kinds = [(result["from_name"], result["type"]) for result in prediction["result"]]
    assert kinds == [("box", "rectangle"), ("label", "labels")] * 3
    assert [result["value"].get("labels") for result in prediction["result"]] == [None, ["blue"]] * 3


def test_interactive__rotated_rectangle_uses_its_upright_bounds() -> None:
    # The corner is the top right one now: a quarter turn, width runs down and height to the left.
    turned = region(x=50 / 1.6, width=50 / 1.6, height=40 / 1.2, rotation=90, rectanglelabels=["r"])
    drawn = read_drawn(request(turned))
    assert drawn is not None and drawn.name == "r"
    assert drawn.box(120, 160).tolist() == pytest.approx([10, 20, 50, 70], abs=1e-4)


@pytest.mark.parametrize("context", [None, {}, {"result": []}])
def test_interactive__no_drawing_searches_words(ask: Ask, context: object) -> None:
    body = request()
    body["params"]["context"] = context
    ((prediction,),) = ask("POST", "/predict", body).body["results"]
    assert {label for one in prediction["result"] for label in one["value"]["rectanglelabels"]} == {"r", "blue"}


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([region(kind="keypointlabels")], "what was drawn is not a rectangle (keypointlabels)"),
        ([region(x=None)], "what was drawn is not a rectangle"),
        ([region(control="other", rectanglelabels=["r"])], "drawn with 'other', which takes no boxes"),
        ([region(width=1, rectanglelabels=["r"])], "example 'r' is 2×50 pixels; at least 8×8"),
        (["r"], "no list of regions"),
    ],
)
def test_interactive__what_cannot_be_searched_for_is_reported(ask: Ask, regions: list[Any], message: str) -> None:
    answer = ask("POST", "/predict", request(*regions))
    assert answer.status == 422 and message in answer.body["error"], answer.body


def test_interactive__a_second_drawing_on_a_picture_runs_no_network_again() -> None:
    one = backend()
    drawn = read_drawn(json.loads(json.dumps(request(region(rectanglelabels=["r"])))))
    from ovd.label_studio.backend import StudioTask

    task = StudioTask(id=7, data={"photo": PHOTO})
    assert drawn is not None
    one.predict(CONFIG, [task], since=time.monotonic())
    runs = one._detector.runs
    assert len(one.similar(CONFIG, task, drawn)["result"]) == 3
    assert one._detector.runs == runs


def test_interactive__needs_an_image_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovd.label_studio.backend import StudioTask

    one = backend()
    monkeypatch.setattr(one._detector, "examples", None)
    drawn = read_drawn(request(region(x=50, y=60, rectanglelabels=["r"])))  # where no region is
    assert drawn is not None
    with pytest.raises(UserError, match="cannot search by example"):
        one.similar(CONFIG, StudioTask(id=7, data={"photo": PHOTO}), drawn)


def test_interactive__regions_are_scored_by_embedding_and_objectness() -> None:
    boxes = np.array([[0, 0, 20, 20], [30, 0, 50, 20], [60, 0, 80, 20], [31, 0, 51, 20], [90, 0, 110, 20]], np.float32)
    rows = np.array([[1, 0], [0.9, 0.4359], [1, 0], [0.85, 0.5268], [0, 1]], np.float32)
    objectness = np.array([0.5, 0.9, 0.2, 0.9, 0.9], np.float32)
    regions = RegionSet(boxes=boxes, objectness=objectness, text=rows, image=None, masks=None, size=(60, 120))
    similar = similar_regions(regions, np.array([1, 1, 20, 20], np.float32))
    assert similar is not None
    # Itself, the one that points the same way; not the lesser object, the second box of one thing, or another thing.
    assert similar.boxes.tolist() == boxes[:2].tolist()
    assert similar.scores.tolist() == pytest.approx([1, 0.9], abs=1e-3)
    assert similar_regions(regions, np.array([0, 30, 20, 50], np.float32)) is None
