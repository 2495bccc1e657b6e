# SPDX-License-Identifier: Apache-2.0
"""What the page accepts, decided before Gradio sees it: hosts, routes, sizes and speeds.

One ASGI middleware. Every refusal has a status of 4xx or 503 and one sentence that says what to do; a full queue and
a full disk say when to come back (``Retry-After``).
"""

from __future__ import annotations

import logging
import re
from asyncio import get_running_loop
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from ovd.demo.bodies import BodyReader, BodyStream, Limits, Reply, length_of, replay, too_large
from ovd.demo.endpoints import BadRequest, Endpoints
from ovd.demo.gate import Gate
from ovd.demo.hosts import AllowedHosts, RequestRefused
from ovd.demo.request_queue import RequestQueue
from ovd.demo.uploads import Uploads

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope

log = logging.getLogger(__name__)

API = "/gradio_api/"
_CALL = re.compile(r"call/(?P<version>v2/)?(?P<name>[^/]*)/?")
_QUEUED = re.compile(r"queue/join/?|call/(v2/)?[^/]*/?")
_ANSWER = re.compile(r"call/(v2/)?(?P<name>[^/]*)/(?P<event>[^/]+)")
_CANCELS = re.compile(r"(cancel|reset)/?")  # small bodies, no model
_QUICK = re.compile(r"run/predict/?")  # what the page's own fields do without waiting, such as filling in an example
# Routes of Gradio that this page does not need: to the model past the queue, to other sites, to files, to its code.
_CLOSED = re.compile(
    r"(proxy=|file=https?:|stream/|deep_link|dev/|vibe|run-history|run/|api/|component_server|process_recording|mcp)"
)


LATE_FRAGMENTS = 5.0
"""Seconds after which fragments of a lost upload are looked for again: Gradio's thread may create its file after the
request has ended."""


class PageGate(Gate):
    """The middleware of the page.

    Args:
        app: Gradio's application.
        names: under which it is served.
        queue: where requests wait.
        endpoints: checks what they hold.
        uploads: keeps room on the disk.
        limits: sizes and times.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: AllowedHosts,
        queue: RequestQueue,
        endpoints: Endpoints,
        uploads: Uploads,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(app, names=names, limits=limits or Limits())
        self._queue = queue
        self._endpoints = endpoints
        self._uploads = uploads
        self._bodies = BodyReader(self._limits, small=self._limits.small)

    async def admit(self, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        """See `Gate`."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "POST":
            await self._post(path, headers, scope, receive, reply)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise RequestRefused(405, "Only GET and POST are allowed")
        else:
            await self._get(path, scope, receive, reply)

    def is_api(self, scope: Scope) -> bool:
        """See `Gate`: the page itself gets text."""
        return bool(scope["path"].startswith(API))

    def waits_for_leave(self, headers: Headers) -> bool:
        """See `Gate`."""
        return headers.get("expect", "").lower() == "100-continue"

    async def _get(self, path: str, scope: Scope, receive: Receive, reply: Reply) -> None:
        route = path[len(API) :] if path.startswith(API) else ""
        other_page = any(value for value in parse_qs(scope.get("query_string", b"").decode("latin-1")).get("page", []))
        if _CLOSED.match(unquote(route)) or other_page:
            raise RequestRefused(404, "Not part of this page")
        if (answer := _ANSWER.fullmatch(route)) is not None:
            self._require_endpoint(answer["name"])
            if not self._queue.has_event(answer["event"]):
                raise RequestRefused(404, "No such request is queued; its result can be fetched only once")
        from starlette.exceptions import HTTPException

        try:
            await self._app(scope, receive, reply)
        except Exception as problem:
            if not isinstance(problem.__cause__, HTTPException):
                raise
            await reply.end()  # a stream of a session that is gone: Gradio has sent the reason in the stream

    async def _post(self, path: str, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        route = path[len(API) :] if path.startswith(API) else ""
        if route.rstrip("/") == "upload":
            await self._upload(headers, scope, receive, reply)
        elif _QUEUED.fullmatch(route):
            await self._enqueue(route, headers, scope, receive, reply)
        elif _CANCELS.fullmatch(route) or _QUICK.fullmatch(route):
            body = await self._bodies.read(receive, length_of(headers), limit=self._limits.other)
            if _QUICK.fullmatch(route):
                self._check(body, quick=True)
            await self._app(scope, replay(body, receive), reply)
        else:
            names = ", ".join(f"{API}call/{n}" for n in self._endpoints.names)
            raise RequestRefused(404, f"Requests go through the queue: POST {names}, or use gradio_client")

    async def _enqueue(self, route: str, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        call = _CALL.fullmatch(route)
        name = self._require_endpoint(call["name"]) if call is not None else None
        self._check_queue()
        body = await self._bodies.read(receive, length_of(headers), limit=self._limits.request)
        large = len(body) > self._limits.large
        body = self._check(body, name=name, keywords=call is not None and call["version"] is not None)
        self._check_queue(large=large)  # others came while the body was read
        self._queue.enter()
        with ExitStack() as entering:
            entering.callback(self._queue.entered)

            async def queued(message: Message) -> None:
                entering.close()  # once there is an answer it stands in the queue itself, and would count twice
                await reply(message)

            await self._app(scope, replay(body, receive), queued)

    def _require_endpoint(self, name: str) -> str:
        try:
            self._endpoints.check_name(name)
        except BadRequest as problem:
            raise RequestRefused(problem.status, str(problem)) from problem
        return name

    def _check(self, body: bytes, *, name: str | None = None, keywords: bool = False, quick: bool = False) -> bytes:
        try:
            return self._endpoints.check(body, name=name, keywords=keywords, quick=quick)
        except BadRequest as problem:
            raise RequestRefused(problem.status, str(problem)) from problem

    def _check_queue(self, *, large: bool = False) -> None:
        if self._queue.is_full(large=large):
            seconds = self._queue.expected_seconds()
            raise RequestRefused(
                503,
                f"The queue is full: {self._queue.waiting} requests wait. Try again in {_in_words(seconds)}",
                retry=seconds,
            )

    async def _upload(self, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        limit = self._limits.upload
        if not re.match(r"multipart/form-data\s*;.*boundary=", headers.get("content-type", ""), re.IGNORECASE):
            raise RequestRefused(415, "Send the picture as multipart/form-data, in a field named files")
        length = length_of(headers)
        if length is not None and length > limit:
            raise too_large(length, limit, what="A picture")
        size = limit if length is None else length
        if not self._uploads.reserve(size):
            raise RequestRefused(503, "No space for more pictures now; try again in a minute", retry=60)
        self._queue.wake()
        body = BodyStream(receive, limit=limit, limits=self._limits)
        try:
            await self._app(scope, body, reply.guarded(body))
        except Exception as problem:
            if body.refused is None and not body.disconnected:
                raise _storage_refusal(problem) from problem
        finally:
            self._uploads.release(size, whole=body.complete)
            if not body.complete:
                get_running_loop().call_later(LATE_FRAGMENTS, self._uploads.remove_fragments)
        if body.refused is not None:
            raise body.refused


def _storage_refusal(problem: Exception) -> RequestRefused:
    if isinstance(problem, OSError):
        log.error("an upload could not be stored", exc_info=problem)
        return RequestRefused(503, "Pictures cannot be stored now; the log says why", retry=60)
    return RequestRefused(400, "The upload cannot be read as multipart/form-data")


def _in_words(count: int) -> str:
    return f"{count} second{'s' if count != 1 else ''}"
