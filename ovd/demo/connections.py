# SPDX-License-Identifier: Apache-2.0
"""Limits on open connections, per address and in total, and on the time for the head of a request.

Works below HTTP, in asyncio's protocol, because a connection that never completes a request reaches no application.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from the first byte, or from opening the connection, to the end of the head
GRACE = 0.1  # seconds that a new connection gets before it may have to make room
REFUSALS = 64  # refused connections that get an answer at a time; more are only closed
FROM_ONE = 512  # connections from one address; behind a proxy all people have one
FROM_ALL = 4096
SPARE_FILES = 128  # for uploads, weights and libraries


def _answer(status: str, text: str, *headers: str) -> bytes:
    """A whole HTTP response, for connections that never reach the application."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", "Content-Type: text/plain", f"Content-Length: {len(text)}"]
    return ("\r\n".join([*lines, *headers]) + "\r\n\r\n" + text).encode("ascii")


FULL = _answer("503 Service Unavailable", "Too many connections are open; try again in 5 seconds\n", "Retry-After: 5")


def raise_file_limit(target: int = FROM_ALL + SPARE_FILES) -> int:
    """Raise this process's limit of open files as far as the system lets it; returns what it is now."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return target
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return target
    aim = target if hard == resource.RLIM_INFINITY else min(target, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (aim, hard))
    return aim


def address_of(peer: object) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 /64, which belongs to one household or machine."""
    host = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


@dataclass
class Connections:
    """The open connections. One *waits* while it has not sent the complete head of a request.

    Where a limit is reached, the waiting connection that has been there longest makes room: half-open connections
    cannot keep anybody out. Without one the newcomer is refused.

    Args:
        from_one: connections allowed from one address.
        from_all: connections allowed.
        head_seconds: for the head of a request.
        grace: seconds before a connection may have to make room.
    """

    from_one: int = FROM_ONE
    from_all: int = FROM_ALL
    head_seconds: float = HEAD_SECONDS
    grace: float = GRACE
    count: int = 0
    refusing: int = 0
    count_from: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    waiting: OrderedDict[asyncio.Transport, tuple[str, float]] = field(default_factory=OrderedDict)  # oldest first

    @classmethod
    def for_this_process(cls) -> Connections:
        """Limits that fit the allowed number of open files."""
        files = raise_file_limit() - SPARE_FILES
        from_all = max(16, min(FROM_ALL, files))
        return cls(from_one=max(8, min(FROM_ONE, from_all // 2)), from_all=from_all)

    def admit(self, transport: asyncio.Transport, address: str, now: float) -> bool:
        """Count a new connection; False: it is one too many."""
        crowded = self.count_from[address] >= self.from_one
        if crowded or self.count >= self.from_all:
            if not self._make_room(address if crowded else None, now):
                if not self.count_from[address]:
                    del self.count_from[address]
                return False
        self.count += 1
        self.count_from[address] += 1
        return True

    def _make_room(self, address: str | None, now: float) -> bool:
        """Close the connection that waits longest, of the address or of all; its `leave` follows at once."""
        for transport, (owner, since) in self.waiting.items():
            if now - since < self.grace:
                return False
            if address in (None, owner):
                del self.waiting[transport]
                transport.abort()
                return True
        return False

    def leave(self, transport: asyncio.Transport, address: str) -> None:
        """Forget a connection that was admitted."""
        self.waiting.pop(transport, None)
        self.count -= 1
        self.count_from[address] -= 1
        if not self.count_from[address]:
            del self.count_from[address]


class Connection:
    """One connection under the limits.

    Args:
        connections: all of them.
        transport: its own.
        loop: the event loop.
    """

    def __init__(self, connections: Connections, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._connections, self._transport, self._loop = connections, transport, loop
        self._address = address_of(transport.get_extra_info("peername"))
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: asyncio.TimerHandle | None = None
        self.admitted = connections.admit(transport, self._address, loop.time())
        if self.admitted:
            self._wait_for_a_head()
        elif connections.refusing < REFUSALS:  # until its request has arrived, or for a second
            connections.refusing += 1
            self._refusal = loop.call_later(1.0, transport.abort)
        else:
            transport.abort()

    def refuse(self, data: bytes) -> None:
        """Answer a connection that was not admitted, and close it."""
        if self._refusal is not None:
            if b"\r\n\r\n" in data:
                self._transport.write(FULL)
            self._transport.close()

    def update(self, *, answering: bool) -> None:
        """Start the deadline for the next head, or stop it while a request is answered."""
        if answering:
            self._stop_waiting()
        elif self._deadline is None:
            self._wait_for_a_head()

    def lost(self) -> None:
        """It is closed: no longer count it."""
        self._stop_waiting()
        if self._refusal is not None:
            self._refusal.cancel()
            self._connections.refusing -= 1
        if self.admitted:
            self.admitted = False
            self._connections.leave(self._transport, self._address)

    def _wait_for_a_head(self) -> None:
        self._connections.waiting[self._transport] = (self._address, self._loop.time())
        self._deadline = self._loop.call_later(self._connections.head_seconds, self._transport.abort)

    def _stop_waiting(self) -> None:
        self._connections.waiting.pop(self._transport, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def protocol_class(connections: Connections) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, with these limits."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(H11Protocol):
        connection: Connection

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.connection = Connection(connections, transport, self.loop)

        def data_received(self, data: bytes) -> None:
            if self.connection.admitted:
                super().data_received(data)
                self._update()
            else:
                self.connection.refuse(data)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._update()

        def connection_lost(self, exc: Exception | None) -> None:
            self.connection.lost()
            super().connection_lost(exc)

        def _update(self) -> None:
            self.connection.update(answering=self.cycle is not None and not self.cycle.response_complete)

    return LimitedProtocol
