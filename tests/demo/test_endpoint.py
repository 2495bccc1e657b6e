# SPDX-License-Identifier: Apache-2.0
"""The named endpoint, as a program uses it, and what the server must not hand out."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.demo.conftest import Server
from tests.demo.serve import ASKERS, SLOW

httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradio_client.Client(server.url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def ask(client: Any, image: Path, classes: str, *threshold: float) -> dict[str, Any]:
    return client.predict(gradio_client.handle_file(str(image)), classes, *threshold, api_name="/detect")


def test_detect__has_the_documented_keys(client: Any, pictures: dict[str, Path]) -> None:
    answer = ask(client, pictures["good"], "red, blue, unicorn")
    assert set(answer) == {
        "schema", "size", "threshold", "floor", "classes", "detections", "notices", "negatives", "vocabulary", "model",
        "regions", "cached", "ms", "masks", "everything", "example",
    }  # fmt: skip
    assert set(answer["detections"][0]) == {"class", "score", "box", "polygons", "near"}
    assert {answer["classes"][d["class"]]["name"] for d in answer["detections"] if d["score"] > 0.5} == {"red", "blue"}


def test_detect__threshold_is_optional(client: Any, pictures: dict[str, Path]) -> None:
    words = "red, blue sea far away from here"
    assert len(ask(client, pictures["good"], words)["detections"]) == 2
    assert len(ask(client, pictures["good"], words, 0.9999)["detections"]) == 1


def test_detect__trailing_arguments_are_optional(server: Server, pictures: dict[str, Path]) -> None:
    with httpx.Client(base_url=f"{server.url}/gradio_api", timeout=60) as http:
        path = http.post("/upload", files={"files": pictures["good"].read_bytes()}).json()[0]
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for data in ([picture, "red"], [picture, "red", None, None], [picture, "red", None, None, "strict-fake"]):
            event = http.post("/call/detect", json={"data": data}).json()["event_id"]
            assert '"red"' in http.get(f"/call/detect/{event}").text


def test_queue__session_survives_many_later_sessions(client: Any, server: Server, pictures: dict[str, Path]) -> None:
    """A client keeps one session for all its requests; plain HTTP opens a new one for each."""
    http = httpx.Client(base_url=f"{server.url}/gradio_api", timeout=60)
    path = http.post("/upload", files={"files": pictures["good"].read_bytes()}).json()[0]
    payload = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "red"]}

    def others(count: int) -> list[str]:
        return [http.post("/call/detect", json=payload).json()["event_id"] for _ in range(count)]

    ask(client, pictures["good"], "red")
    for _ in range(ASKERS - 4):
        http.get(f"/call/detect/{others(1)[0]}")
    go = server.folder / "go"
    go.unlink(missing_ok=True)
    Image.new("RGB", (90, SLOW), tuple(os.urandom(3))).save(pictures["slow"])
    waiting = client.submit(gradio_client.handle_file(str(pictures["slow"])), "red", api_name="/detect")
    while not waiting.status().code.name.startswith("PROCESS"):
        assert not waiting.done()
    late = others(8)
    go.touch()
    assert waiting.result(timeout=60)["size"] == [90, SLOW]
    assert all("event: complete" in http.get(f"/call/detect/{event}").text for event in late)
    http.close()


def test_detect__weights_are_chosen_by_name(client: Any, pictures: dict[str, Path]) -> None:
    image = gradio_client.handle_file(str(pictures["good"]))
    chosen = client.predict(image, "red", weights="strict-fake", api_name="/detect")
    assert (chosen["model"]["name"], chosen["threshold"]) == ("strict-fake", 0.5)
    assert ask(client, pictures["good"], "red")["model"]["name"] == "colour-fake"
    with pytest.raises(Exception, match="no weights 'nothing'"):
        client.predict(image, "red", weights="nothing", api_name="/detect")


def test_detect__everything_returns_the_detected_words(client: Any, pictures: dict[str, Path]) -> None:
    answer = ask(client, pictures["good"], "everything")
    assert answer["everything"] and {c["name"] for c in answer["classes"]} == {"red", "blue"}
    assert [c["id"] for c in answer["classes"]] == [0, 1] and len(answer["detections"]) == 2


def test_detect__new_words_use_the_cache(client: Any, pictures: dict[str, Path]) -> None:
    ask(client, pictures["green"], "green")
    assert ask(client, pictures["green"], "blue, zebra")["cached"]


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("good", "", "Type at least one class name"),
        ("good", "x" * 101, "at most 100"),
        ("vector", "red", "cannot be used"),
        ("truncated", "red", "cannot be used"),
        ("bomb", "red", "6000x6000"),
    ],
)
def test_detect__bad_requests_do_not_affect_the_next(
    client: Any, pictures: dict[str, Path], name: str, classes: str, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        ask(client, pictures[name], classes)
    assert ask(client, pictures["good"], "red")["detections"]


def test_detect__internal_error_shows_a_ticket_only(client: Any, server: Server, pictures: dict[str, Path]) -> None:
    with pytest.raises(Exception, match="The log has the details under") as caught:
        ask(client, pictures["defect"], "red")
    assert "secret" not in str(caught.value)
    ticket = str(caught.value).split("under ")[1].split(".")[0]
    assert ticket in server.log.read_text() and "secret detail" in server.log.read_text()
    assert ask(client, pictures["good"], "red")["detections"]


def test_upload__over_the_limit_is_refused(server: Server, pictures: dict[str, Path]) -> None:
    with pictures["huge"].open("rb") as stream:
        response = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("huge.bmp", stream)}, timeout=60)
    assert response.status_code == 413


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "/proc/self/environ", "app.py"])
def test_files__of_the_server_are_not_served(server: Server, path: str) -> None:
    response = httpx.get(f"{server.url}/gradio_api/file={path}", timeout=60)
    assert response.status_code in (403, 404) and "root:" not in response.text


def test_detect__server_paths_are_refused(client: Any, server: Server) -> None:
    """A caller must not get the server to open a file that was not uploaded."""
    body = {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "red", None]}
    started = httpx.post(f"{server.url}/gradio_api/call/detect", json=body, timeout=60)
    text = started.text
    if started.status_code == 200:
        text = httpx.get(f"{server.url}/gradio_api/call/detect/{started.json()['event_id']}", timeout=60).text
        assert "event: error" in text
    assert "root:" not in text and "cannot be used" not in text


def test_endpoints__only_two_are_public(client: Any) -> None:
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/detect", "/pack"}


def test_endpoints__no_monitoring_page(server: Server) -> None:
    assert httpx.get(f"{server.url}/monitoring", timeout=60).status_code in (403, 404)


def test_uploads__are_in_a_private_folder(client: Any, server: Server, pictures: dict[str, Path]) -> None:
    ask(client, pictures["good"], "red")
    uploads = server.folder / "uploads"
    assert stat.S_IMODE(uploads.stat().st_mode) == 0o700
    assert any(uploads.rglob("*.png"))
