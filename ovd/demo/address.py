# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen at: checking them, taking the port, and the URL to type."""

from __future__ import annotations

import errno
import ipaddress
import socket

from pretrain.engine.errors import UserError


def plain_host(host: str) -> str:
    """An address as sockets want it: ``[::1]`` without its brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(plain_host(host)).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address, so that no other process can take the port before the start.

    A client that connects before the start waits.

    Args:
        host: name or address, IPv6 with or without brackets.
        port: 0 for any free one.

    Raises:
        UserError: the port is taken or not allowed, or the host is not an address of this machine.
    """
    try:
        return _bound_socket(plain_host(host), port)
    except (socket.gaierror, UnicodeError) as problem:
        raise UserError(f"--host {host}: not an address of this machine") from problem
    except OverflowError as problem:
        raise UserError(f"--port {port}: must be between 0 and 65535") from problem
    except PermissionError as problem:
        raise UserError(f"--port {port}: not allowed for this user; take one above 1023") from problem
    except OSError as problem:
        if problem.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UserError(f"--host {host}: not an address of this machine ({problem.strerror})") from problem
        raise UserError(
            f"port {port} on {host} is taken ({problem.strerror}). Stop what runs there, or try --port {port + 1}"
        ) from problem


def _bound_socket(host: str, port: int) -> socket.socket:
    if not host:
        raise socket.gaierror("empty")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # or another page could bind the port too, while this one loads
    except BaseException:
        listener.close()
        raise
    return listener


def url_of(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    plain = plain_host(host)
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plain, plain)
    if ":" in name:
        name = f"[{name.replace('%', '%25')}]"
    return f"http://{name}:{port}"
