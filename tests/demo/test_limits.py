# SPDX-License-Identifier: Apache-2.0
"""The gate before Gradio, driven by hand: whom it lets in, what it reads, and what it says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ovd.demo.bodies import Limits
from ovd.demo.endpoints import BadRequest
from ovd.demo.hosts import AllowedHosts
from ovd.demo.limits import PageGate
from ovd.demo.uploads import Uploads

T = TypeVar("T")
SMALL = Limits(request=1000, small=100, together=1500, upload=1000, other=50, grace=0.2, rate=1e9, drain=0.05)
STALLED = object()  # among chunks: nothing more comes


class JumpingClock(selectors.DefaultSelector):
    """Where an event loop would wait, its clock jumps: the seconds of a test do not depend on a busy machine."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


def run(work: Coroutine[Any, Any, T]) -> T:
    """In a thread: Playwright keeps a loop running in this one."""
    clock = JumpingClock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as thread, contextlib.closing(loop):
        return thread.submit(loop.run_until_complete, work).result()


@dataclass
class FakeQueue:
    """As long as a test wants it."""

    waiting: int = 16
    full: bool = False
    full_for_large: bool = False
    inside: int = 0
    entries: int = 0

    def is_full(self, *, large: bool = False) -> bool:
        return self.full or (large and self.full_for_large)

    def expected_seconds(self) -> int:
        return 8

    def has_event(self, event: str) -> bool:
        return event == "known"

    def enter(self) -> None:
        self.inside += 1
        self.entries += 1

    def entered(self) -> None:
        self.inside -= 1

    def wake(self) -> None:
        pass


class FakeEndpoints:
    """Knows /detect and refuses bodies that say so."""

    names = ("detect",)

    def check_name(self, name: str) -> None:
        if name != "detect":
            raise BadRequest(f"no endpoint /{name}", status=404)

    def check(self, body: bytes, **_: object) -> bytes:
        if body == b"bad":
            raise BadRequest("bad")
        return body


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def detail(self) -> str:
        return json.loads(self.body)["detail"]


class Scene:
    """A gate, what stands behind it, and one way to ask."""

    def __init__(
        self, folder: Path, *, limits: Limits = SMALL, names: AllowedHosts | None = None, room: int = 10_000
    ) -> None:
        self.queue, self.seen = FakeQueue(), []
        self.uploads = Uploads(folder, most_bytes=room)
        self.gate = PageGate(
            self._behind,
            names=names or AllowedHosts.of("127.0.0.1"),
            queue=self.queue,  # type: ignore[arg-type]
            endpoints=FakeEndpoints(),  # type: ignore[arg-type]
            uploads=self.uploads,
            limits=limits,
        )

    async def _behind(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client is gone")  # as Starlette does
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def ask_async(
        self, path: str, chunks: Iterable[object] = (), *, headers: Mapping[str, str] = {}, method: str = "POST"
    ) -> Answer:  # fmt: skip
        answer, waiting = Answer(), list(chunks)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            if waiting and waiting[0] is STALLED:
                await asyncio.sleep(60)
            chunk = waiting.pop(0) if waiting else b""
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        given = {"host": "127.0.0.1:7860", "content-type": "multipart/form-data; boundary=b"} | dict(headers)
        raw = [(k.encode(), v.encode()) for k, v in given.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": ""}
        await self.gate(scope, receive, send)
        return answer

    def ask(self, path: str, chunks: Iterable[object] = (), **options: Any) -> Answer:
        return run(self.ask_async(path, chunks, **options))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


CALL, JOIN, UPLOAD = "/gradio_api/call/detect", "/gradio_api/queue/join", "/gradio_api/upload"


@pytest.mark.parametrize("path", [CALL, JOIN, CALL + "/", "/gradio_api/call/v2/detect", UPLOAD, "/gradio_api/cancel"])
def test_gate__needed_routes_pass_unchanged(scene: Scene, path: str) -> None:
    assert scene.ask(path, [b"{", b"}"]).status == 200
    assert scene.seen == [(path, b"{}")]
    assert scene.queue.inside == 0 and scene.queue.entries == (path not in (UPLOAD, "/gradio_api/cancel"))


OTHER_WAYS = ("run/detect", "run/detect/", "api/detect", "api/find", "process_recording", "component_server", "queue",
              "vibe-edit", "stream/x", "run-history/connect", "call/detect/extra", "")  # fmt: skip


@pytest.mark.parametrize("route", OTHER_WAYS)
def test_gate__model_is_reached_through_the_queue_only(scene: Scene, route: str) -> None:
    assert scene.ask(f"/gradio_api/{route}", [b"{}"]).status == 404
    assert scene.seen == []


CLOSED = ("proxy=http://127.0.0.1:1/", "proxy%3Dx", "file=http://a/", "deep_link", "dev/reload", "call/detect/unknown",
          "call/find/known", "call/v2/detect/unknown")  # fmt: skip


@pytest.mark.parametrize("route", CLOSED)
def test_gate__unused_gradio_routes_are_closed(scene: Scene, route: str) -> None:
    assert scene.ask(f"/gradio_api/{route}", method="GET").status == 404
    assert scene.ask("/", method="DELETE").status == 405 and scene.seen == []
    assert scene.ask("/gradio_api/call/detect/known", method="GET").status == 200


SIZES = [(CALL, SMALL.request), (JOIN, SMALL.request), (UPLOAD, SMALL.upload), ("/gradio_api/reset", SMALL.other)]


@pytest.mark.parametrize(("path", "limit"), SIZES)
@pytest.mark.parametrize("stated", [True, False])
def test_body__above_its_size_is_refused(scene: Scene, path: str, limit: int, stated: bool) -> None:
    headers = {"content-length": str(limit + 1)} if stated else {}
    answer = scene.ask(path, [b"x" * (limit // 2), b"x" * (limit // 2 + 1)], headers=headers)
    assert answer.status == 413 and "MB" in answer.detail
    assert scene.seen == [] and scene.queue.entries == 0
    assert scene.ask(path, [b"x" * limit], headers={"content-length": str(limit)}).status == 200


def test_body__too_large_stated_size_is_refused_unread(tmp_path: Path) -> None:
    scene = Scene(tmp_path, limits=replace(SMALL, grace=60))
    assert scene.ask(CALL, [STALLED], headers={"content-length": "300000000"}).status == 413
    waits = {"content-length": "300000000", "expect": "100-continue"}
    assert scene.ask(UPLOAD, [STALLED], headers=waits).status == 413


@pytest.mark.parametrize("path", [CALL, UPLOAD])
def test_body__too_slow_is_refused(scene: Scene, path: str) -> None:
    assert scene.ask(path, [b"x", STALLED]).status == 408
    assert scene.seen == [] and scene.ask(path, [b"x"]).status == 200


def test_body__deadline_grows_with_bytes_received(tmp_path: Path) -> None:
    """Patience alone would have ended at the first pause; what has come buys time."""
    scene = Scene(tmp_path, limits=replace(SMALL, grace=0.2, rate=100))

    async def slowly() -> Answer:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.25 if scene_state["sent"] else 0)
            scene_state["sent"] += 1
            return {"type": "http.request", "body": b"x" * 50, "more_body": scene_state["sent"] < 4}

        scene_state = {"sent": 0}
        answer = Answer()

        async def send(message: Any) -> None:
            answer.status = message.get("status", answer.status)

        scope = {"type": "http", "method": "POST", "path": CALL, "headers": [(b"host", b"127.0.0.1")], "root_path": ""}
        await scene.gate(scope, receive, send)
        return answer

    assert run(slowly()).status == 200


def test_body__large_ones_share_memory_and_small_ones_pass(tmp_path: Path) -> None:
    scene = Scene(tmp_path, limits=replace(SMALL, grace=0.5))

    async def crowd() -> tuple[Answer, Answer]:
        slow = [asyncio.create_task(scene.ask_async(CALL, [b"x" * 900, STALLED]))]
        await asyncio.sleep(0.05)
        large, small = await scene.ask_async(CALL, [b"x" * 700, b"x"]), await scene.ask_async(CALL, [b"x" * 90])
        await asyncio.gather(*slow)
        return large, small

    large, small = run(crowd())
    assert large.status == 503 and large.headers["retry-after"] == "5" and small.status == 200
    assert scene.ask(CALL, [b"x" * 1000]).status == 200  # what was held has been given back


def test_queue__full_is_503_with_length_and_retry_after(scene: Scene) -> None:
    scene.queue.full = True
    for path in (CALL, JOIN):
        answer = scene.ask(path, [STALLED])
        assert answer.status == 503 and answer.headers["retry-after"] == "8"
        assert answer.detail == "The queue is full: 16 requests wait. Try again in 8 seconds"
    assert scene.ask(UPLOAD, [b"x"]).status == 200  # a picture may be sent meanwhile


def test_queue__an_answered_request_is_no_longer_on_its_way_in(scene: Scene) -> None:
    """Its sender may send the next one before Gradio's application has returned."""
    inside: list[int] = []

    async def lingers(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        inside.append(scene.queue.inside)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        inside.append(scene.queue.inside)
        await send({"type": "http.response.body", "body": b"{}"})

    scene.gate._app = lingers
    assert scene.ask(CALL, [b"{}"]).status == 200 and inside == [1, 0] and scene.queue.inside == 0


def test_queue__large_requests_have_a_lower_limit(tmp_path: Path) -> None:
    scene = Scene(tmp_path, limits=replace(SMALL, large=50))
    scene.queue.full_for_large = True
    assert [scene.ask(CALL, [b"x" * size]).status for size in (50, 51)] == [200, 503]


def test_gate__invalid_request_is_explained(scene: Scene) -> None:
    assert (scene.ask(CALL, [b"bad"]).status, scene.ask("/gradio_api/call/find", [b"{}"]).status) == (422, 404)
    assert scene.seen == []


FOREIGN = {"origin": "http://evil.example"}


@pytest.mark.parametrize("path", [UPLOAD, JOIN, CALL, "/gradio_api/cancel"])
@pytest.mark.parametrize(
    "headers",
    [FOREIGN, {"origin": "null"}, {"origin": "http://127.0.0.1:1"}, {"origin": "http://127.0.0.1:7860.evil.example"},
     {"origin": "x"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}],
)  # fmt: skip
def test_origin__other_sites_are_refused(scene: Scene, path: str, headers: dict[str, str]) -> None:
    assert scene.ask(path, [b"{}"], headers=headers).status == 403
    assert scene.seen == []


def test_origin__own_page_programs_and_links_pass(scene: Scene) -> None:
    own = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert scene.ask(UPLOAD, [b"x"], headers=own).status == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert scene.ask("/", method="GET", headers=link).status == 200


HOSTS = ("127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "192.168.1.5:80", "box.localhost")


@pytest.mark.parametrize("host", HOSTS)
def test_host__addresses_and_this_machine_are_served(scene: Scene, host: str) -> None:
    assert scene.ask("/", method="GET", headers={"host": host}).status == 200


REBOUND = (
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "a b",
    "[",
    "::",
    "1e3",
)


@pytest.mark.parametrize("host", REBOUND)
@pytest.mark.parametrize("path", ["/", "/config", CALL])
def test_host__foreign_name_is_refused(scene: Scene, host: str, path: str) -> None:
    answer = scene.ask(path, [b"{}"], method="POST" if path == CALL else "GET", headers={"host": host})
    assert answer.status == 421 and b"--allow-host" in answer.body and scene.seen == []


def test_host__allowed_proxy_name_is_served(tmp_path: Path) -> None:
    scene = Scene(tmp_path, names=AllowedHosts.of("127.0.0.1", ["Box.Example"]))
    asked = {"host": "127.0.0.1:7860", "origin": "https://box.example"}  # a proxy that writes its own Host
    assert scene.ask(UPLOAD, [b"x"], headers=asked).status == 200
    assert scene.ask("/", method="GET", headers={"host": "box.example"}).status == 200
    assert scene.ask(UPLOAD, [b"x"], headers={"origin": "http://localhost"}).status == 403


@pytest.mark.parametrize(
    "kind", ["", "image/png", "application/json", "multipart/form-data", "multipart/mixed; boundary=b"]
)
def test_upload__must_be_multipart(scene: Scene, kind: str) -> None:
    assert scene.ask(UPLOAD, [b"x"], headers={"content-type": kind}).status == 415
    assert scene.seen == []


@pytest.mark.parametrize(("problem", "status"), [(OSError("disk full"), 503), (AttributeError("no file"), 400)])
def test_upload__parser_error_is_400_and_full_disk_503(scene: Scene, problem: Exception, status: int) -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:  # as Starlette does: 500, and the exception goes on
        await receive()
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise problem

    scene.gate._app = breaks
    answer = scene.ask(UPLOAD, [b"x"])
    assert answer.status == status and "Internal" not in answer.body.decode()


def test_upload__full_disk_is_503_with_retry_after(tmp_path: Path) -> None:
    scene = Scene(tmp_path, room=500)
    answer = scene.ask(UPLOAD, [b"x" * 10])  # of no stated size: it may become as large as an upload may be
    assert answer.status == 503 and answer.headers["retry-after"] == "60"
    assert scene.ask(UPLOAD, [b"x" * 10], headers={"content-length": "10"}).status == 200
