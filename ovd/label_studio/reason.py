# SPDX-License-Identifier: Apache-2.0
"""Error reasons in the HTTP status line, the only part of an error that Label Studio shows.

    HTTP/1.1 422 the labelling configuration has no <Image>; wordbox draws boxes on pictures …

ASGI has no field for it, so it goes to the connection as a header, which does not leave this process.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import h11

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER = b"x-reason-phrase"
MAX_LENGTH = 400  # characters


def reason_header(text: str) -> tuple[bytes, bytes]:
    """The header that `with_reasons` makes the reason phrase: one line of ASCII."""
    line = re.sub("[^ -~]", "?", " ".join(text.split())[:MAX_LENGTH])
    return HEADER, line.encode("ascii")


class _Connection(h11.Connection):
    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        """Bytes of an event."""
        if isinstance(event, h11.Response):
            reason = dict(event.headers).get(HEADER)
            if reason is not None:
                headers = [header for header in event.headers.raw_items() if header[0].lower() != HEADER]
                event = h11.Response(status_code=event.status_code, headers=headers, reason=reason)
        return super().send(event)


def with_reasons(protocol: type[H11Protocol]) -> type[H11Protocol]:
    """A protocol of uvicorn's, with reasons."""

    class ReasonProtocol(protocol):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.conn = _Connection(h11.SERVER, self.config.h11_max_incomplete_event_size or 64 * 1024)

    return ReasonProtocol
