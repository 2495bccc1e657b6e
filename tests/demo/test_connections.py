# SPDX-License-Identifier: Apache-2.0
"""Connections below HTTP, with a real server of three lines behind them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ovd.demo.connections import Connections, address_of, protocol_class, raise_file_limit

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


class Fake:
    """Stands for a transport; remembers that it was closed."""

    closed = False

    def abort(self) -> None:
        self.closed = True


def admit(connections: Connections, address: str, now: float, *, waits: bool = True) -> Fake | None:
    transport = Fake()
    if not connections.admit(transport, address, now):  # type: ignore[arg-type]
        return None
    if waits:
        connections.waiting[transport] = (address, now)  # type: ignore[index]
    return transport


def test_connections__oldest_half_open_one_is_closed() -> None:
    connections = Connections(from_one=2, grace=1)
    first, second = admit(connections, "a", 0), admit(connections, "a", 1)
    third = admit(connections, "a", 5)
    assert first and second and third and (first.closed, second.closed, third.closed) == (True, False, False)


def test_connections__busy_and_new_ones_are_not_closed() -> None:
    connections = Connections(from_one=2, grace=1)
    answered, young = admit(connections, "a", 0, waits=False), admit(connections, "a", 4.5)
    assert admit(connections, "a", 5) is None and answered and young and not answered.closed and not young.closed
    assert admit(connections, "b", 5) is not None


def test_connections__limit_is_per_address_until_all_are_taken() -> None:
    connections = Connections(from_one=2, from_all=3, grace=1)
    other = admit(connections, "b", 0)
    for now in range(1, 9):
        assert admit(connections, "a", 2.0 * now)
    assert other and not other.closed
    connections = Connections(from_one=2, from_all=3, grace=1)
    oldest = admit(connections, "a", 0)
    assert all(admit(connections, name, 2) for name in "bcd") and oldest and oldest.closed


def test_connections__closed_ones_are_not_counted() -> None:
    connections = Connections(from_one=1)
    for now in range(5):
        transport = admit(connections, "a", now)
        assert transport is not None
        connections.leave(transport, "a")  # type: ignore[arg-type]
    assert (connections.count, dict(connections.count_from), connections.waiting) == (0, {}, {})


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("1.2.3.4", 5), "1.2.3.4"),
        (("::ffff:1.2.3.4", 5, 0, 0), "1.2.3.4"),
        (("2001:db8:1:2:aaaa::1", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 0), "fe80::/64"),
        (None, ""),
        ("", ""),
    ],
)
def test_address_of__ipv6_is_its_64_prefix(peer: object, address: str) -> None:
    assert address_of(peer) == address


def test_file_limit__is_raised_never_lowered() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        allowed = raise_file_limit(300)
        assert allowed == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300
        assert raise_file_limit(100) == 100 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@contextlib.contextmanager
def serving(connections: Connections) -> Iterator[int]:
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(hello, http=protocol_class(connections), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def reach(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def rest_of(connection: socket.socket) -> bytes:
    """What the server still says before it closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(1000):
            received += chunk
    return received


@pytest.mark.parametrize("begun", [b"", b"G", HEAD, HEAD + b"X-A: " + b"a" * 1000])
def test_connections__missing_head_times_out(begun: bytes) -> None:
    with serving(Connections(head_seconds=0.2)) as port, reach(port) as connection:
        connection.sendall(begun)
        assert rest_of(connection) == b""


def test_connections__second_head_times_out() -> None:
    with serving(Connections(head_seconds=2)) as port, reach(port) as connection:
        connection.sendall(HEAD + b"\r\n" + HEAD)
        assert rest_of(connection).endswith(b"hello")


def test_connections__client_gets_through_half_open_flood() -> None:
    connections = Connections(from_one=5, head_seconds=60, grace=0.05)
    with serving(connections) as port, contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(reach(port)).sendall(HEAD)
            time.sleep(0.02)
        received, deadline = b"", time.monotonic() + 60
        while not received.endswith(b"hello") and time.monotonic() < deadline:  # refused until the flood is old enough
            time.sleep(0.1)
            with reach(port) as person:
                person.sendall(HEAD + b"Connection: close\r\n\r\n")
                received = rest_of(person)
        assert received.endswith(b"hello") and connections.count <= 5


def test_connections__a_newcomer_at_the_limit_is_refused() -> None:
    with serving(Connections(from_one=1, head_seconds=60, grace=60)) as port, reach(port) as first:
        first.sendall(HEAD)
        with reach(port) as person:
            person.sendall(HEAD + b"\r\n")
            received = rest_of(person)
        assert (
            received.startswith(b"HTTP/1.1 503")
            and b"Retry-After" in received
            and received.endswith(b"try again in 5 seconds\n")
        )
        with reach(port) as silent:
            assert rest_of(silent) == b""
