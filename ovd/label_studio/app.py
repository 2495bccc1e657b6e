# SPDX-License-Identifier: Apache-2.0
"""The backend's five endpoints, as Label Studio's client calls them, behind the page's checks of host and body.

    GET  /health     {"status": "UP", …}
    POST /setup      {project, schema, hostname, access_token, extra_params} -> {"model_version": …}
    POST /predict    {tasks, project, label_config, params} -> {"results": [[prediction], …], "model_version": …}
    POST /webhook    {action, …}; nothing is learned here
    GET  /versions   {"versions": […]}

``hostname`` and ``access_token`` of a set-up are ignored: the command line says where to fetch pictures.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ovd.demo.bodies import BodyReader, Limits, Reply, length_of, replay
from ovd.demo.gate import Gate
from ovd.demo.hosts import AllowedHosts
from ovd.label_studio.backend import Backend, StudioTask
from ovd.label_studio.interactive import read_drawn
from ovd.label_studio.reason import reason_header
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope

log = logging.getLogger(__name__)

WAITING = 16
"""Requests that may wait while one is answered; Label Studio's own workers are fewer."""
BODY = 96_000_000
"""Bytes: hundreds of tasks with their annotations, or tens with pictures in them."""
NO_TRAINING = (
    "wordbox does not learn from annotations inside Label Studio; export them as COCO or YOLO and run: wordbox train "
    "--config photos/finetune.yaml"
)


class BackendGate(Gate):
    """The middleware of the backend: hosts, credentials, sizes.

    Args:
        app: the endpoints.
        names: under which it is served.
        credentials: user and password of basic authentication, or None.
        limits: sizes and times.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: AllowedHosts,
        credentials: tuple[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(app, names=names, limits=limits or Limits(request=BODY))
        pair = None if credentials is None else base64.b64encode(":".join(credentials).encode())
        self._authorization = None if pair is None else b"Basic " + pair
        self._bodies = BodyReader(self._limits, small=0)

    async def admit(self, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        """See `Gate`."""
        if not self._is_authorized(headers.get("authorization", "")):
            refusal = _problem(401, "user and password are not those that wordbox serve was started with")
            refusal.headers["WWW-Authenticate"] = 'Basic realm="wordbox"'
            await refusal(scope, receive, reply)
            return
        if scope["method"] == "POST":
            body = await self._bodies.read(receive, length_of(headers), limit=self._limits.request)
            receive = replay(body, receive)
        await self._app(scope, receive, reply)

    def _is_authorized(self, header: str) -> bool:
        return self._authorization is None or hmac.compare_digest(header.encode("latin-1"), self._authorization)


def build_app(backend: Backend) -> Starlette:
    """The endpoints.

    Args:
        backend: answers them.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.routing import Route

    lock = asyncio.Lock()  # one at a time: the detector has all cores
    waiting = 0

    async def health(_: Request) -> Response:
        return _json({"status": "UP", "model_class": "wordbox"})

    async def versions(_: Request) -> Response:
        return _json({"versions": backend.versions()})

    async def setup(request: Request) -> Response:
        body = _object(await request.body())
        plan = await run_in_threadpool(backend.plan, _text(body, "schema"))
        return _json({"model_version": plan.version})

    async def predict(request: Request) -> Response:
        nonlocal waiting
        since = time.monotonic()
        body = _object(await request.body())
        config, tasks, drawn = _text(body, "label_config"), _tasks(body), read_drawn(body)
        if waiting >= WAITING:
            return _problem(503, f"{waiting} requests wait already; try again in a minute", retry=60)
        waiting += 1
        try:
            async with lock:
                results: object
                if drawn is None:
                    results = await run_in_threadpool(backend.predict, config, tasks, since=since)
                else:  # by its page, which wants the task's one prediction, not a list of them
                    results = [await run_in_threadpool(backend.similar, config, tasks[0], drawn)]
                plan = backend.plan(config)
        finally:
            waiting -= 1
        return _json({"results": results, "model_version": plan.version})

    async def webhook(request: Request) -> Response:
        # Label Studio reports every annotation, which needs nothing; a request to train must not be ignored silently.
        if _object(await request.body()).get("action") == "START_TRAINING":
            return _problem(501, NO_TRAINING)
        return _json({"status": "ok"})

    return Starlette(
        routes=[
            Route("/", health),
            Route("/health", health),
            Route("/versions", versions),
            Route("/setup", _with_reason(setup), methods=["POST"]),
            Route("/predict", _with_reason(predict), methods=["POST"]),
            Route("/webhook", _with_reason(webhook), methods=["POST"]),
        ]
    )


def _with_reason(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, with what is wrong in its status line and in the log."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except UserError as problem:
            log.warning(f"{request.url.path}: {problem}")
            return _problem(422, str(problem))

    return answered


def _json(content: object, *, status: int = 200) -> Response:
    """A JSON answer in ASCII: what a request says is repeated in it, halves of characters too."""
    from starlette.responses import Response

    return Response(json.dumps(content, allow_nan=False), status_code=status, media_type="application/json")


def _problem(status: int, text: str, *, retry: int | None = None) -> Response:
    response = _json({"error": text}, status=status)
    response.raw_headers.append(reason_header(text))
    if retry is not None:
        response.headers["Retry-After"] = str(retry)
    return response


def _object(body: bytes) -> dict[str, object]:
    """The request's JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"the request is not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise UserError("the request is not a JSON object")
    return content


def _text(body: dict[str, object], key: str) -> str:
    text = body.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"the request has no labelling configuration ({key})")
    return text


def _tasks(body: dict[str, object]) -> list[StudioTask]:
    raw = body.get("tasks")
    if not isinstance(raw, list) or not raw:
        raise UserError("the request has no tasks")
    tasks = []
    for item in raw:
        data = item.get("data") if isinstance(item, dict) else None
        if not isinstance(data, dict):
            raise UserError("a task of the request has no data")
        number = item.get("id")
        tasks.append(StudioTask(id=number if isinstance(number, int) else None, data=data))
    return tasks
