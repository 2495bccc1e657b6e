# SPDX-License-Identifier: Apache-2.0
"""What the page accepts, decided before Gradio sees it: whom it is served to, which routes, how large and how slow.

One ASGI middleware. Every refusal has a status of 4xx or 503 and one sentence that says what to do; a full line and a
full disk say when to come back (``Retry-After``).
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from ovd.demo.bodies import BodyReader, BodyStream, Limits, Reply, length_of, replay, too_large
from ovd.demo.line import Line
from ovd.demo.names import Names, Refused
from ovd.demo.questions import BadQuestion, Questions
from ovd.demo.uploads import Uploads

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

API = "/gradio_api/"
_CALL = re.compile(r"call/(?P<version>v2/)?(?P<name>[^/]*)/?")
_ASKS = re.compile(r"queue/join/?|call/(v2/)?[^/]*/?")
_ANSWER = re.compile(r"call/(v2/)?(?P<name>[^/]*)/(?P<event>[^/]+)")
_ENDS = re.compile(r"(cancel|reset)/?")  # small bodies, no model
_QUICK = re.compile(r"run/predict/?")  # what the page's own fields do without waiting, such as filling in an example
# Doors of Gradio that this page does not need: to the model past the line, to other sites, to files, to its code.
_CLOSED = re.compile(
    r"(proxy=|file=https?:|stream/|deep_link|dev/|vibe|run-history|run/|api/|component_server|process_recording|mcp)"
)


class Gate:
    """The middleware.

    Args:
        app: Gradio's application.
        names: under which it is served.
        line: where questions wait.
        questions: checks what they hold.
        uploads: keeps room on the disk.
        limits: sizes and times.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Names,
        line: Line,
        questions: Questions,
        uploads: Uploads,
        limits: Limits | None = None,
    ) -> None:
        self._app = app
        self._names = names
        self._line = line
        self._questions = questions
        self._uploads = uploads
        self._limits = limits or Limits()
        self._bodies = BodyReader(self._limits, what="question", small=self._limits.small)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        reply = Reply(send)
        try:
            self._names.check(headers)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["method"] == "POST":
                await self._post(path, headers, scope, receive, reply)
            elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                raise Refused(405, "Only GET and POST are answered")
            else:
                await self._get(path, scope, receive, reply)
        except Refused as refused:
            await reply.refuse(refused, receive, api=scope["path"].startswith(API), seconds=self._drain(headers))

    async def _get(self, path: str, scope: Scope, receive: Receive, reply: Reply) -> None:
        route = path[len(API) :] if path.startswith(API) else ""
        other_page = any(value for value in parse_qs(scope.get("query_string", b"").decode("latin-1")).get("page", []))
        if _CLOSED.match(unquote(route)) or other_page:
            raise Refused(404, "Not part of this page")
        if (answer := _ANSWER.fullmatch(route)) is not None:
            self._named(answer["name"])
            if not self._line.knows(answer["event"]):
                raise Refused(404, "No such question waits; its answer can be fetched once")
        from starlette.exceptions import HTTPException

        try:
            await self._app(scope, receive, reply)
        except Exception as problem:
            if not isinstance(problem.__cause__, HTTPException):
                raise
            await reply.end()  # a stream of a session that is gone: the client has been told in its own terms

    async def _post(self, path: str, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        route = path[len(API) :] if path.startswith(API) else ""
        if route.rstrip("/") == "upload":
            await self._upload(headers, scope, receive, reply)
        elif _ASKS.fullmatch(route):
            await self._ask(route, headers, scope, receive, reply)
        elif _ENDS.fullmatch(route) or _QUICK.fullmatch(route):
            body = await self._bodies.read(receive, length_of(headers), limit=self._limits.other)
            if _QUICK.fullmatch(route):
                self._check(body, quick=True)
            await self._app(scope, replay(body, receive), reply)
        else:
            names = ", ".join(f"{API}call/{n}" for n in self._questions.names)
            raise Refused(404, f"Questions go through the line: POST {names} (or gradio_client)")

    async def _ask(self, route: str, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        call = _CALL.fullmatch(route)
        name = self._named(call["name"]) if call is not None else None
        self._check_line()
        body = await self._bodies.read(receive, length_of(headers), limit=self._limits.question)
        large = len(body) > self._limits.large
        body = self._check(body, name=name, keywords=call is not None and call["version"] is not None)
        self._check_line(large=large)  # others came while the body was read
        self._line.enter()
        try:
            await self._app(scope, replay(body, receive), reply)
        finally:
            self._line.entered()

    def _named(self, name: str) -> str:
        try:
            self._questions.check_name(name)
        except BadQuestion as problem:
            raise Refused(problem.status, str(problem)) from problem
        return name

    def _check(self, body: bytes, *, name: str | None = None, keywords: bool = False, quick: bool = False) -> bytes:
        try:
            return self._questions.check(body, name=name, keywords=keywords, quick=quick)
        except BadQuestion as problem:
            raise Refused(problem.status, str(problem)) from problem

    def _check_line(self, *, large: bool = False) -> None:
        if self._line.is_full(large=large):
            seconds = self._line.how_long()
            raise Refused(
                503,
                f"{self._line.waiting} people are waiting, about {_seconds(seconds)}; try again then",
                retry=seconds,
            )

    async def _upload(self, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        limit = self._limits.upload
        if not re.match(r"multipart/form-data\s*;.*boundary=", headers.get("content-type", ""), re.IGNORECASE):
            raise Refused(415, "Send the picture as multipart/form-data, in a field named files")
        length = length_of(headers)
        if length is not None and length > limit:
            raise too_large(length, limit, what="A picture")
        size = limit if length is None else length
        if not self._uploads.promise(size):
            raise Refused(503, "There is no room for more pictures now; try again in a minute", retry=60)
        self._line.wake()
        body = BodyStream(receive, limit=limit, limits=self._limits)
        try:
            await self._app(scope, body, reply.unless(body))
        except Exception as problem:
            if body.refused is None and not body.gone:
                raise _why_not_stored(problem) from problem
        finally:
            self._uploads.keep(size, whole=body.complete)
        if body.refused is not None:
            raise body.refused

    def _drain(self, headers: Headers) -> float:
        return 0.0 if headers.get("expect", "").lower() == "100-continue" else self._limits.drain


def _why_not_stored(problem: Exception) -> Refused:
    if isinstance(problem, OSError):
        log.error("an upload could not be stored", exc_info=problem)
        return Refused(503, "Pictures cannot be stored now; the log says why", retry=60)
    return Refused(400, "The upload cannot be read as multipart/form-data")


def _seconds(count: int) -> str:
    return f"{count} second{'s' if count != 1 else ''}"
