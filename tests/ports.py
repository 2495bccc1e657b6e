# SPDX-License-Identifier: Apache-2.0
"""Ports for servers that cannot be given an open socket."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000
"""Below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range), which take a free port again
between its choice and its use."""


def free_port() -> int:
    """A port of this machine that nothing listens on. Other processes draw other ones."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
