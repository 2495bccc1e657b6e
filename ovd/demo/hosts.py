# SPDX-License-Identifier: Apache-2.0
"""Host and Origin checks: the names that the page is served under, and the sites that may call it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.datastructures import Headers


class RequestRefused(Exception):
    """Ends a request: HTTP status, one sentence, and seconds until another try makes sense (Retry-After)."""

    def __init__(self, status: int, problem: str, *, retry: int | None = None) -> None:
        super().__init__(problem)
        self.status = status
        self.retry = retry


@dataclass
class AllowedHosts:
    """Names that the page is served under.

    Against DNS rebinding: a foreign site can point a name of its own at this machine and then read the page. An address
    cannot be rebound, so addresses are always allowed.

    Attributes:
        names: names of this machine.
        trusted: names whose pages may also send requests: those of a proxy in front.
    """

    names: set[str] = field(default_factory=set)
    trusted: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, host: str, allowed: Iterable[str] = ()) -> AllowedHosts:
        """Names for a page that listens on ``host``; ``allowed``: more, from the command line."""
        names = {"localhost", host.lower().strip("[]")}
        if not _is_address(host) or not ipaddress.ip_address(host.strip("[]")).is_loopback:
            machine = socket.gethostname().lower()
            names |= {machine, machine.partition(".")[0], machine.partition(".")[0] + ".local"}
        trusted = {name.lower().rstrip(".") for name in allowed}
        return cls(names=names - {""} | trusted, trusted=trusted)

    def trust(self, url: str) -> None:
        """Serve under the name of this URL too, as with a proxy."""
        name = _name(urlsplit(url).netloc)
        self.names.add(name)
        self.trusted.add(name)

    def check(self, headers: Headers) -> None:
        """Refuse requests for another name, and requests from pages of other sites.

        Raises:
            RequestRefused: 421 or 403.
        """
        host = headers.get("host", "")
        if host and not self._serves(name := _name(host)):
            raise RequestRefused(
                421, f"This page is not served under the name {name[:100]!r}. Start it with --allow-host {name[:100]}"
            )
        origin = headers.get("origin")
        if origin is not None:
            foreign = (
                urlsplit(origin).netloc.lower() != host.lower() and _name(urlsplit(origin).netloc) not in self.trusted
            )
        else:
            foreign = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
        if foreign:
            raise RequestRefused(403, "Requests from other sites are refused")

    def _serves(self, name: str) -> bool:
        return name in self.names or _is_address(name) or name.endswith(".localhost")


def _name(netloc: str) -> str:
    """Host of ``host:port``, lower case, IPv6 without its brackets."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return netloc.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True
