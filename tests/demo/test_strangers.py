# SPDX-License-Identifier: Apache-2.0
"""The real page among strangers: wrong and foreign requests, a full line, and what must not happen on the way."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.demo.conftest import Server
from tests.demo.serve import SLOW

httpx = pytest.importorskip("httpx")


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    with httpx.Client(base_url=f"{server.url}/gradio_api", timeout=60, trust_env=False) as client:
        yield client


def upload(http: Any, picture: Path) -> dict[str, Any]:
    path = http.post("/upload", files={"files": (picture.name, picture.read_bytes())}).json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def call(http: Any, *values: object) -> Any:
    return http.post("/call/detect", json={"data": list(values)})


def answer_of(http: Any, response: Any) -> tuple[str, Any]:
    """("complete" or "error", what came with it)."""
    assert response.status_code == 200, response.text
    text = http.get(f"/call/detect/{response.json()['event_id']}").text
    kind, _, data = text.rstrip().rpartition("event: ")[2].partition("\n")
    return kind, json.loads(data.removeprefix("data: "))


def log_of(server: Server) -> str:
    return server.log.read_text()


@pytest.mark.parametrize("name", ["text", "empty", "vector", "truncated", "bomb"])
def test_upload__not_a_picture_is_explained(http: Any, server: Server, pictures: dict[str, Path], name: str) -> None:
    before = log_of(server)
    kind, data = answer_of(http, call(http, upload(http, pictures[name]), "red", None, None))
    assert kind == "error" and data["error"].startswith("This picture cannot be used: ")
    assert log_of(server) == before


GOOD = object()
WRONG: list[tuple[list[object], str]] = [
    ([GOOD, 5, None, None], "classes must be a string"),
    ([GOOD, ["red"], None, None], "classes must be a string"),
    ([GOOD, "red", "high", None], "threshold must be a number"),
    ([GOOD, "red", True, None], "threshold must be a number"),
    ([GOOD, "red", 2, None], "threshold must be a number"),
    (["picture.jpg", "red", None, None], "uploaded"),
    ([7, "red", None, None], "uploaded"),
    ([{"path": 7}, "red", None, None], "uploaded"),
    ([{"url": "data:image/png;base64,AAAA"}, "red", None, None], "uploaded"),
    ([{"path": "x", "meta": None}, "red", None, None], "image: meta must be"),
    ([{"path": "x", "orig_name": 1}, "red", None, None], "image: orig_name must be"),
    ([{"path": "x", "is_stream": "maybe"}, "red", None, None], "image: is_stream must be"),
    ([{"path": "/etc/passwd"}, "red", None, None], "no longer on the server"),
    ([{"path": "../../etc/passwd"}, "red", None, None], "no longer on the server"),
    ([GOOD, "red", None, None, 7], "weights must be a string"),
    ([GOOD, "red", None, None, None, None], "5 values: image, classes, threshold, examples, weights"),
    ([GOOD], "5 values"),
    ([], "5 values"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_request__invalid_values_are_explained(
    http: Any, server: Server, pictures: dict[str, Path], values: list[object], message: str
) -> None:
    before = log_of(server)
    picture = upload(http, pictures["good"])
    given = [picture if value is GOOD else value for value in values]
    refused = call(http, *given)
    assert refused.status_code == 422 and message in refused.json()["detail"]
    if len(given) == 4 and not message.startswith("threshold"):  # the page's own way has no threshold
        body = {"data": [*given[:2], None], "fn_index": 0, "session_hash": "s"}
        assert http.post("/queue/join", json=body).status_code == 422
    assert log_of(server) == before


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("/call/nothing", {"data": []}, 404),
        ("/call/find", {"data": []}, 404),
        ("/call/v2/nothing", {}, 404),
        ("/call/v2/detect", {"image": None, "classes": "red", "colour": 1}, 422),
        ("/call/v2/detect", {"image": None}, 422),
        ("/run/detect", {"data": []}, 404),
        ("/run/predict", {"data": [], "fn_index": 0, "session_hash": "s"}, 404),
        ("/run/predict", {"data": [99], "fn_index": 1, "session_hash": "s"}, 422),
        ("/run/predict", {"data": ["0"], "fn_index": 1, "session_hash": "s"}, 422),
        ("/run/predict", {"data": [0], "fn_index": 1, "session_hash": "s"}, 200),
        ("/api/detect", {"data": []}, 404),
        ("/queue/join", {"data": [], "fn_index": 99, "session_hash": "s"}, 404),
        ("/queue/join", {"data": [], "fn_index": "0", "session_hash": "s"}, 404),
        ("/queue/join", {"data": [None, "red", None], "fn_index": 0}, 422),
        ("/call/pack", {"data": [[]]}, 422),
        ("/queue/join", {"data": [None, "red", None], "fn_index": 0, "session_hash": 5}, 422),
        ("/queue/join", [1], 422),
        ("/queue/join", "text", 422),
        ("/call/detect", {"data": "red"}, 422),
        ("/cancel", {"session_hash": 1}, 422),
    ],
)
def test_request__unknown_names_and_shapes_are_4xx(
    http: Any, server: Server, route: str, body: object, status: int
) -> None:
    before = log_of(server)
    assert http.post(route, json=body).status_code == status
    assert http.post("/call/detect", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert log_of(server) == before


@pytest.mark.parametrize("route", ["/../?page=x", "/info?page=x", "/call/detect/x", "/call/x/x", "/file=/etc/passwd"])
def test_request__missing_routes_are_404_or_403(http: Any, server: Server, route: str) -> None:
    before = log_of(server)
    assert http.get(route).status_code in (403, 404)
    assert '"session_not_found":true' in http.get("/queue/data?session_hash=x").text
    assert log_of(server) == before


BROKEN_FORMS = [
    b"", b"--b", b"--b\r\n\r\n", b"x", b"--b\r\nX\r\n\r\nx--b--",
    b'--b\r\nContent-Disposition: form-data; name="files"; filename=""\r\n\r\nx\r\n--b--',
    b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--',
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="' + b"a" * 9000 + b'"\r\n\r\nx\r\n--b--\r\n',
]  # fmt: skip


@pytest.mark.parametrize("body", BROKEN_FORMS)
@pytest.mark.parametrize("query", ["", "?upload_id=x"])
def test_upload__broken_form_is_400(http: Any, server: Server, body: bytes, query: str) -> None:
    before = log_of(server).count("Traceback")
    sent = http.post(f"/upload{query}", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert sent.status_code in (200, 400, 413) and (sent.status_code != 200 or isinstance(sent.json(), list))
    assert log_of(server).count("Traceback") == before


def test_request__keyword_arguments_are_accepted(http: Any, pictures: dict[str, Path]) -> None:
    response = http.post("/call/v2/detect", json={"image": upload(http, pictures["good"]), "classes": "red"})
    kind, data = answer_of(http, response)
    assert kind == "complete" and data[0]["detections"]


def test_request__urls_are_never_fetched(http: Any, server: Server) -> None:
    """Neither as a picture nor through Gradio's reverse proxy."""
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.settimeout(0.5)
        url = f"http://127.0.0.1:{inside.getsockname()[1]}/x.png"
        for value in ({"path": url}, {"path": None, "url": url}, {"path": url, "url": url, "orig_name": "a.png"}):
            assert call(http, value | {"meta": {"_type": "gradio.FileData"}}, "red", None, None).status_code == 422
        for route in (f"/proxy={url}", f"/file={url}"):
            assert http.get(route, follow_redirects=False).status_code in (302, 307, 403, 404)
        with pytest.raises(TimeoutError):
            inside.accept()


@pytest.mark.parametrize("route", ["/upload", "/queue/join", "/call/detect"])
def test_origin__other_sites_can_neither_post_nor_read(http: Any, server: Server, route: str) -> None:
    files = sum(1 for _ in (server.folder / "uploads").rglob("*"))
    evil = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    refused = http.post(route, files={"files": ("a.png", b"x")}, headers=evil)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    preflight = evil | {"Access-Control-Request-Method": "POST"}
    assert http.options(route, headers=preflight).status_code == 403
    assert http.post(route, files={"files": ("a.png", b"x")}, headers={"Host": "evil.example"}).status_code == 421
    assert sum(1 for _ in (server.folder / "uploads").rglob("*")) == files


def test_request__leaves_one_picture_at_most(http: Any, server: Server) -> None:
    def size() -> int:
        return sum(f.stat().st_size for f in (server.folder / "uploads").rglob("*") if f.is_file())

    before = size()
    several = [("files", (f"{i}.jpg", bytes(9_000_000))) for i in range(3)]
    refused = http.post("/upload", files=several)
    assert refused.status_code == 413 and "A picture may have 10 MB" in refused.json()["detail"]
    assert size() == before


def test_body__large_one_gets_an_answer_that_arrives(http: Any, pictures: dict[str, Path]) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"data": ["'
        for _ in range(30):
            yield b"a" * 1_000_000

    for content in (b"a" * 30_000_000, chunks()):
        refused = http.post("/queue/join", content=content, headers={"content-type": "application/json"})
        assert refused.status_code == 413 and "MB" in refused.json()["detail"]
    assert answer_of(http, call(http, upload(http, pictures["good"]), "red", None, None))[0] == "complete"


def test_upload__file_name_is_sanitised(http: Any, server: Server, pictures: dict[str, Path]) -> None:
    for name in (
        "<script>alert(1)</script>.png",
        "../../../outside.png",
        "..\\outside.png",
        "a/b.png",
        "\u202egnp.exe",
    ):
        path = Path(http.post("/upload", files={"files": (name, pictures["good"].read_bytes())}).json()[0])
        assert path.resolve().is_relative_to((server.folder / "uploads").resolve()) and "<" not in path.name
        shown = http.get(f"/file={path}")
        assert shown.status_code == 200 and shown.headers["content-type"] in ("image/png", "application/octet-stream")
    assert not (server.folder / "outside.png").exists() and not (server.folder.parent / "outside.png").exists()


@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml"])
def test_upload__html_is_not_served_as_a_page(http: Any, kind: str) -> None:
    name = "evil.html" if kind == "text/html" else "evil.svg"
    path = http.post("/upload", files={"files": (name, b"<script>alert(1)</script>", kind)}).json()[0]
    shown = http.get(f"/file={path}")
    assert "attachment" in shown.headers.get("content-disposition", "") or shown.headers["content-type"] == "text/plain"


def test_upload__dropped_connection_leaves_no_file(http: Any, server: Server, pictures: dict[str, Path]) -> None:
    uploads = server.folder / "uploads"
    place = urlsplit(server.url)
    before, log = {f for f in uploads.rglob("*") if f.is_file()}, log_of(server)
    for _ in range(20):
        with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
            head = (
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9000000\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
                'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            )
            connection.sendall(head.encode() + os.urandom(100_000))
    deadline = time.monotonic() + 60
    while {f for f in uploads.rglob("*") if f.is_file()} != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {f for f in uploads.rglob("*") if f.is_file()} == before
    assert log_of(server) == log
    assert answer_of(http, call(http, upload(http, pictures["good"]), "red", None, None))[0] == "complete"


def wait_for_empty_queue(http: Any) -> None:
    """The queue is first in, first out: once it has answered a request, it has answered all before it."""
    deadline = time.monotonic() + 60
    while (late := call(http, None, "red", None, None)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer_of(http, late)[0] == "error"  # no picture


@pytest.fixture
def full_queue(http: Any, server: Server, pictures: dict[str, Path]) -> Iterator[list[Any]]:
    """One request at the model and 16 behind it, until the test is over."""
    wait_for_empty_queue(http)
    go = server.folder / "go"
    go.unlink(missing_ok=True)
    Image.new("RGB", (90, SLOW), tuple(os.urandom(3))).save(pictures["slow"])  # not one that is remembered
    picture = upload(http, pictures["slow"])
    requests = [call(http, picture, f"red, word{i}", None, None) for i in range(17)]
    yield requests
    go.touch()
    assert {answer_of(http, one)[0] for one in requests} == {"complete"}


def test_queue__the_eighteenth_is_refused_with_length_and_retry_after(
    http: Any, full_queue: list[Any], pictures: dict[str, Path]
) -> None:
    assert [one.status_code for one in full_queue] == [200] * 17
    picture = upload(http, pictures["good"])
    for refused in (
        call(http, picture, "red", None, None),
        http.post("/call/v2/detect", json={"image": picture, "classes": "red"}),
        http.post("/queue/join", json={"data": [picture, "red", None], "fn_index": 0, "session_hash": "x"}),
    ):
        seconds = int(refused.headers["retry-after"])
        assert refused.status_code == 503 and seconds >= 1
        assert refused.json()["detail"].startswith(
            f"The queue is full: 16 requests wait. Try again in {seconds} second"
        )


@pytest.mark.browser
def test_page__full_queue_replaces_the_old_answer(
    browser: Any, http: Any, server: Server, pictures: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    from tests.demo.test_page import Tab

    tab = Tab(browser.new_page(), server.url)
    tab.find(pictures["good"], "red")
    request.getfixturevalue("full_queue")
    tab.find(None, "blue", wait=".wordbox-alert:not([hidden])")
    assert "The queue is full: 16 requests wait." in tab.page.locator(".wordbox-alert").inner_text()
    assert (
        tab.page.locator(".wordbox-detections").is_hidden() and tab.page.get_by_text("Error", exact=True).count() == 0
    )
    (server.folder / "go").touch()
    wait_for_empty_queue(http)
    tab.find(None, "blue")
    assert tab.names() == ["blue"] and tab.page.locator(".wordbox-alert").is_hidden()
    tab.page.close()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["text", "empty"])
def test_page__error_hides_the_old_answer(browser: Any, server: Server, pictures: dict[str, Path], name: str) -> None:
    from tests.demo.test_page import Tab

    tab = Tab(browser.new_page(), server.url)
    tab.find(pictures["good"], "red")
    tab.page.get_by_label("Remove Image").click()
    tab.page.locator("#ovd-image input[type=file]").set_input_files(str(pictures[name]))
    tab.page.locator("#ovd-image img").first.wait_for(state="attached")
    tab.page.locator("#ovd-find").click()
    tab.page.locator(".wordbox-alert:not([hidden])").wait_for()
    assert "cannot be used" in tab.page.locator(".wordbox-alert").inner_text()
    assert (
        tab.page.locator(".wordbox-detections").is_hidden() and tab.page.get_by_text("Error", exact=True).count() == 0
    )
    tab.page.close()
