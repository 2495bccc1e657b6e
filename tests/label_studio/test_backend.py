# SPDX-License-Identifier: Apache-2.0
"""The backend over HTTP with a detector of colours: what Label Studio's client gets, and what others get."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd import serve
from ovd.demo.address import listen
from ovd.demo.hosts import AllowedHosts
from ovd.demo.serving import Server
from ovd.label_studio.app import BackendGate, build_app
from ovd.label_studio.backend import Backend, StudioTask
from ovd.label_studio.pictures import PictureSource
from ovd.label_studio.reason import with_reasons
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture

CONFIG = """<View><Image name="image" value="$photo"/><RectangleLabels name="label" toName="image">
<Label value="Rot" alias="r" predicted_values="red"/><Label value="blue"/></RectangleLabels></View>"""
PAIRS = """<View><Image name="image" value="$photo"/><Rectangle name="box" toName="image"/>
<Labels name="label" toName="image"><Label value="blue"/></Labels></View>"""


def data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PHOTO = data_uri(picture())  # 160 × 120, red at 10 20 50 70, blue at 80 30 150 110
EMPTY = data_uri(picture([("yellow", 5, 5, 60, 60)]))


@dataclass
class Answer:
    status: int
    reason: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


Ask = Callable[..., Answer]


def backend(**options: Any) -> Backend:
    return Backend(make_detector(masks=False), PictureSource(), name="colours", **options)


def served(gate: BackendGate) -> tuple[Server, Ask]:
    listener = listen("127.0.0.1", 0)
    server = Server(gate, listener=listener, protocol=with_reasons)
    server.start()
    port = listener.getsockname()[1]

    def ask(method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection.request(method, path, body=data, headers={"Content-Type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return Answer(reply.status, reply.reason, json.loads(content), dict(reply.headers))

    return server, ask


def request(*photos: str, config: str = CONFIG) -> dict[str, object]:
    tasks = [{"id": n, "data": {"photo": photo}} for n, photo in enumerate(photos, 1)]
    return {"tasks": tasks, "project": "1.1700000000", "label_config": config, "params": {"context": None}}


def test_endpoints__health_setup_and_versions(ask: Ask) -> None:
    assert ask("GET", "/health").body["status"] == "UP"
    version = ask("POST", "/setup", {"project": "1.1", "schema": CONFIG, "hostname": "http://x"}).body["model_version"]
    assert version.startswith("colours-") and version in ask("GET", "/versions").body["versions"]
    other = ask("POST", "/setup", {"project": "1.1", "schema": CONFIG.replace("red", "green")}).body["model_version"]
    assert other != version  # predictions of other words are old ones


def test_boxes__are_in_per_cent_and_named_as_the_configuration_stores_them(ask: Ask) -> None:
    answer = ask("POST", "/predict", request(PHOTO)).body
    ((prediction,),) = answer["results"]
    assert prediction["model_version"] == answer["model_version"]
    found = {result["value"]["rectanglelabels"][0]: result for result in prediction["result"]}
    assert set(found) == {"r", "blue"} and len({result["id"] for result in found.values()}) == 2
    red = found["r"]
    assert (red["from_name"], red["to_name"], red["type"]) == ("label", "image", "rectanglelabels")
    assert (red["original_width"], red["original_height"], red["image_rotation"]) == (160, 120, 0)
    sides = [red["value"][key] for key in ("x", "y", "width", "height", "rotation")]
    assert sides == pytest.approx([10 / 1.6, 20 / 1.2, 40 / 1.6, 50 / 1.2, 0])
    scores = [result["score"] for result in prediction["result"]]
    assert prediction["score"] == min(scores) and 0.3 <= prediction["score"] <= 1


def test_labels__beside_a_rectangle_come_in_pairs(ask: Ask) -> None:
    ((prediction,),) = ask("POST", "/predict", request(PHOTO, config=PAIRS)).body["results"]
    box, label = prediction["result"]
    assert (box["type"], box["from_name"], label["type"], label["from_name"]) == ("rectangle", "box", "labels", "label")
    assert box["id"] == label["id"] and label["value"] == {**box["value"], "labels": ["blue"]}


def test_predict__answers_each_task_and_none_for_a_bad_picture(ask: Ask) -> None:
    results = ask("POST", "/predict", request(EMPTY, "http://elsewhere.test/a.jpg", PHOTO)).body["results"]
    assert [[len(p["result"]) for p in predictions] for predictions in results] == [[0], [], [2]]
    assert results[0][0]["score"] is None


@pytest.mark.parametrize(
    "named", ["http://[::1", "//[x", "http://\u2100.com/a", "\ud800", "/data/\ud800.jpg", "s3://b/\ud800", "a\x07b.jpg"]
)
def test_predict__a_wrong_address_concerns_one_task_only(named: str, ask: Ask) -> None:
    results = ask("POST", "/predict", request(named, PHOTO)).body["results"]
    assert [len(predictions) for predictions in results] == [0, 1]
    assert ask("POST", "/predict", request(named)).status == 422


def test_drawn_label__half_a_surrogate_pair_comes_back(ask: Ask) -> None:
    value = {"x": 6.25, "y": 16, "width": 25, "height": 42, "rotation": 0, "rectanglelabels": ["\ud83d"]}
    drawn = {"id": "1", "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}
    answer = ask("POST", "/predict", request(PHOTO) | {"params": {"context": {"result": [drawn]}}})
    assert answer.status == 200
    assert answer.body["results"][0]["result"][0]["value"]["rectanglelabels"] == ["\ud83d"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/predict", request("http://elsewhere.test/a.jpg"), "is on another host than Label Studio,"),
        ("/predict", request("data:image/png;base64,AAAA"), "its picture: cannot be read"),
        ("/predict", {"tasks": [{"id": 1, "data": {"img": PHOTO}}], "label_config": CONFIG}, "has no 'photo', where"),
        ("/predict", {"tasks": [], "label_config": CONFIG}, "the request has no tasks"),
        ("/predict", {"tasks": [1], "label_config": CONFIG}, "a task of the request has no data"),
        ("/predict", {"tasks": [{"data": {}}]}, "no labelling configuration (label_config)"),
        ("/setup", {"schema": PAIRS.replace("<Rectangle name", "<Ellipse name")}, "<Labels> and no <Rectangle>"),
        ("/setup", {"schema": "<View/>"}, "no <Image>"),
        ("/setup", [], "not a JSON object"),
        ("/setup", b"\xff", "not JSON"),
        ("/webhook", {"action": "START_TRAINING", "project": {}}, "wordbox train --config photos/finetune.yaml"),
    ],
)
def test_backend__errors_are_in_the_reason_phrase(path: str, body: object, message: str, ask: Ask) -> None:
    answer = ask("POST", path, body)
    assert 400 <= answer.status < 600 and message in answer.reason and message in answer.body["error"]
    assert "x-reason-phrase" not in {name.lower() for name in answer.headers}


def test_webhook__annotation_events_are_accepted(ask: Ask) -> None:
    assert ask("POST", "/webhook", {"action": "ANNOTATION_CREATED", "annotation": {}}).body == {"status": "ok"}


def test_requests__foreign_names_large_bodies_and_other_methods_are_refused(ask: Ask) -> None:
    assert ask("GET", "/health", headers={"Host": "evil.test"}).status == 421
    assert ask("POST", "/predict", {}, headers={"Origin": "http://evil.test"}).status == 403
    assert ask("POST", "/predict", b"x" * 200_001).status == 413


def test_authentication__basic_holds_for_all_endpoints() -> None:
    gate = BackendGate(build_app(backend()), names=AllowedHosts.of("127.0.0.1"), credentials=("me", "pass:word"))
    server, ask_with_password = served(gate)
    right = {"Authorization": "Basic " + base64.b64encode(b"me:pass:word").decode()}
    wrong = {"Authorization": "Basic " + base64.b64encode(b"me:pass").decode()}
    try:
        assert ask_with_password("GET", "/health", headers=right).status == 200
        for headers in (wrong, {}, {"Authorization": "Bearer me"}):
            refused = ask_with_password("GET", "/health", headers=headers)
            assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Basic")
            assert ask_with_password("POST", "/predict", request(PHOTO), headers=headers).status == 401
    finally:
        server.close()


def test_time_limit__later_tasks_get_no_prediction_and_the_first_always_one() -> None:
    tasks = [StudioTask(id=n, data={"photo": PHOTO}) for n in range(3)]
    late = backend(seconds=5).predict(CONFIG, tasks, since=time.monotonic() - 60)
    assert [len(predictions) for predictions in late] == [1, 0, 0]
    assert [len(p) for p in backend(seconds=60).predict(CONFIG, tasks, since=time.monotonic())] == [1, 1, 1]


@pytest.mark.parametrize(("threshold", "attribute", "count"), [(1.0, "", 0), (1.0, "0.3", 2), (None, "1", 0)])
def test_threshold__of_a_control_comes_before_the_commands(threshold: float | None, attribute: str, count: int) -> None:
    config = CONFIG.replace('toName="image"', f'toName="image" model_score_threshold="{attribute}"')
    task = StudioTask(id=1, data={"photo": PHOTO})
    ((prediction,),) = backend(threshold=threshold).predict(config, [task], since=time.monotonic())
    assert len(prediction["result"]) == count


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "wordbox serve --label-studio"),
        (["--label-studio", "--user", "me"], "needs both --user and --password"),
        (["--label-studio", "--label-studio-url", "localhost"], "give the full URL"),
    ],
)
def test_serve__mistakes_are_reported_before_anything_is_loaded(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "BASIC_AUTH_USER", "BASIC_AUTH_PASS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        serve.main(argv)
