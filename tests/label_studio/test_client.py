# SPDX-License-Identifier: Apache-2.0
"""What Label Studio's own client sends, and whether Label Studio's own reader takes what comes back.

``requests.json`` holds what Label Studio 1.23.2 sent to this backend, through a proxy that wrote it down, when a
project was connected, *Retrieve Predictions* chosen, an annotation saved and a training started; tokens and the mail
address are changed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ovd.demo.hosts import AllowedHosts
from ovd.label_studio.app import BackendGate, build_app
from ovd.label_studio.backend import Backend, StudioTask
from ovd.label_studio.pictures import PictureSource
from tests.detector.fakes import make_detector, picture
from tests.label_studio.test_backend import CONFIG, PAIRS, PHOTO, served

RECORDED = json.loads((Path(__file__).parent / "requests.json").read_text(encoding="utf-8"))["requests"]


class Elsewhere(PictureSource):
    """A folder's picture for every address of Label Studio's, none for other hosts."""

    def __init__(self, file: Path) -> None:
        super().__init__(url="http://localhost:8080")
        self.file = file

    def _fetch(self, where: str, shown: str) -> bytes:
        return self.file.read_bytes()


def test_label_studio__its_requests_are_answered(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    backend = Backend(make_detector(masks=False), Elsewhere(tmp_path / "a.png"), name="colours")
    server, ask = served(BackendGate(build_app(backend), names=AllowedHosts.of("127.0.0.1")))
    try:
        answers = {
            (r["path"], (r["body"] or {}).get("action")): ask(r["method"], r["path"], r["body"], r["headers"])
            for r in sorted(RECORDED, key=lambda r: r["path"] == "/versions")
        }
    finally:
        server.close()
    assert answers.pop(("/webhook", "START_TRAINING")).status == 501
    assert {answer.status for answer in answers.values()} == {200} and len(answers) == 5
    version = answers["/setup", None].body["model_version"]
    assert answers["/versions", None].body == {"versions": [version]}
    first, second, third = answers["/predict", None].body["results"]  # one for each task, in order
    assert first == [] and [one["model_version"] for one in (*second, *third)] == [version] * 2


@pytest.mark.parametrize("config", [CONFIG, PAIRS])
def test_label_studio_sdk__takes_the_predictions(config: str) -> None:
    """Runs where ``pip install label-studio-sdk`` was done: it asks for too much to be installed for one test."""
    sdk = pytest.importorskip("label_studio_sdk.label_interface")
    backend = Backend(make_detector(masks=False), PictureSource(), name="colours")
    ((prediction,),) = backend.predict(config, [StudioTask(id=1, data={"photo": PHOTO})], since=time.monotonic())
    interface = sdk.LabelInterface(config)
    wrong: Any = json.loads(json.dumps(prediction).replace('"blue"', '"green"'))
    assert interface.validate_prediction(prediction) and not interface.validate_prediction(wrong)
