# SPDX-License-Identifier: Apache-2.0
"""Request bodies, read within limits of size and time, and refusals that reach the client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovd.demo.hosts import RequestRefused

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Message, Receive, Send


MAX_DRAINED = 32_000_000  # bytes read on after a refusal


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds.

    Attributes:
        request: body of a request to the model: words and crops.
        large: of requests above this size (crops, long lists of words) fewer may wait.
        small: bodies up to this size are always taken; larger ones share `together`.
        together: all larger bodies that are being read.
        upload: body of an upload: one picture, and the lines around it.
        other: body of anything else.
        grace: until a body must arrive at `rate`.
        rate: bytes a second that a body has to keep up after that.
        drain: for reading on after a refusal, so that the sender gets to see it.
    """

    request: int = 16_000_000
    large: int = 20_000
    small: int = 1_000_000
    together: int = 96_000_000
    upload: int = 10_100_000
    other: int = 64_000
    grace: float = 30.0
    rate: float = 20_000.0
    drain: float = 2.0


class BodyStream:
    """Wraps ``receive`` with limits on size and time; ends when one is exceeded, with the reason in `refused`."""

    def __init__(self, receive: Receive, *, limit: int, limits: Limits) -> None:
        self._receive = receive
        self._limit = limit
        self._limits = limits
        self._size = 0
        self._start = asyncio.get_running_loop().time()
        self.complete = False
        self.disconnected = False  # the sender
        self.refused: RequestRefused | None = None

    async def __call__(self) -> Message:
        if self.complete:
            return await self._receive()
        # Each byte extends the deadline: a body that only trickles misses it soon.
        deadline = self._start + self._limits.grace + self._size / self._limits.rate
        try:
            message = await asyncio.wait_for(self._receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            self.refused = RequestRefused(408, "The body of the request came too slowly")
            return {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.disconnected = True
            return message
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            self.refused = RequestRefused(
                413, f"The body of the request may have {self._limit / 1e6:.0f} MB; this one has more"
            )
            return {"type": "http.disconnect"}
        self.complete = not message.get("more_body", False)
        return message


def too_large(length: int, limit: int, *, what: str) -> RequestRefused:
    """The refusal of a body by its announced size, in bytes."""
    return RequestRefused(413, f"{what} may have {limit / 1e6:.0f} MB; this one has {length / 1e6:.1f} MB")


class BodyReader:
    """Reads whole bodies; the larger ones of all requests together stay below a limit.

    Args:
        limits: sizes and times.
        small: bodies up to so many bytes do not count.
    """

    def __init__(self, limits: Limits, *, small: int) -> None:
        self._limits, self._small = limits, small
        self._reading = 0  # bytes of larger bodies being read

    async def read(self, receive: Receive, length: int | None, *, limit: int) -> bytes:
        """The whole body.

        Args:
            receive: of the request.
            length: that is announced, in bytes; None: none is.
            limit: of this body, in bytes.

        Raises:
            RequestRefused: it breaks a limit, or ends too early.
        """
        if length is not None and length > limit:
            raise too_large(length, limit, what="A request")
        body, counted = bytearray(), 0
        stream = BodyStream(receive, limit=limit, limits=self._limits)
        try:
            while True:
                message = await stream()
                if stream.refused is not None:
                    raise stream.refused
                if message["type"] == "http.disconnect":
                    raise RequestRefused(400, "The request ended too early")
                body += message.get("body", b"")
                if len(body) > self._small:
                    self._reading += len(body) - counted
                    counted = len(body)
                    if self._reading > self._limits.together:
                        raise RequestRefused(503, "Too many large requests at once; try again in 5 seconds", retry=5)
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            self._reading -= counted


class Reply:
    """Wraps ``send`` and records whether a response has started."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False

    async def __call__(self, message: Message) -> None:
        self._started = True
        await self._send(message)

    def guarded(self, body: BodyStream) -> Send:
        """``send`` that drops a response once it failed, or the body broke a limit: a refusal is sent in its place."""
        failed = False

        async def send(message: Message) -> None:
            nonlocal failed
            failed = failed or message.get("status", 0) >= 500
            if body.refused is None and not failed:
                await self(message)

        return send

    async def end(self) -> None:
        """End a stream that has begun."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refused: RequestRefused, receive: Receive, *, api: bool, seconds: float) -> None:
        """Answer with the reason, and read on for a while: a sender that is cut off would see no answer."""
        import orjson

        if self._started:
            return
        text = str(refused)
        body = orjson.dumps({"detail": text}) if api else f"{text}\n".encode()
        headers = [
            (b"content-type", b"application/json" if api else b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if refused.retry is not None:
            headers.append((b"retry-after", str(refused.retry).encode()))
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": True})
        try:
            await asyncio.wait_for(_drained(receive), seconds)
        except asyncio.TimeoutError:
            pass
        await self({"type": "http.response.body", "body": b"", "more_body": False})


async def _drained(receive: Receive) -> None:
    size, more = 0, True
    while more and size < MAX_DRAINED:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)


def replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for a body that has been read."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        for message in messages:
            return message
        return await receive()

    return replayed


def length_of(headers: Headers) -> int | None:
    """The announced size of a body in bytes; None where there is none."""
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() else None
