# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware that checks requests in front of an application, and refuses them with a helpful message."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ovd.demo.bodies import Limits, Reply
from ovd.demo.hosts import AllowedHosts, RequestRefused

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send


class Gate(ABC):
    """Checks host and origin, leaves the rest to `admit`, and answers refusals.

    Args:
        app: behind it.
        names: under which it is served.
        limits: sizes and times.
    """

    def __init__(self, app: ASGIApp, *, names: AllowedHosts, limits: Limits) -> None:
        self._app = app
        self._names = names
        self._limits = limits

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
            await self.admit(headers, scope, receive, reply)
        except RequestRefused as refused:
            seconds = 0.0 if self.waits_for_leave(headers) else self._limits.drain
            await reply.refuse(refused, receive, api=self.is_api(scope), seconds=seconds)

    @abstractmethod
    async def admit(self, headers: Headers, scope: Scope, receive: Receive, reply: Reply) -> None:
        """Hand a request on.

        Raises:
            RequestRefused: it is not handed on.
        """

    def is_api(self, scope: Scope) -> bool:
        """Whether a refusal is JSON."""
        return True

    def waits_for_leave(self, headers: Headers) -> bool:
        """Whether the sender waits for a status before it sends the body (RFC 9110, section 10.1.1)."""
        return False
