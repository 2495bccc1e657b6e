# SPDX-License-Identifier: Apache-2.0
"""When the queue is full, and whose messages the page keeps."""

from __future__ import annotations

from typing import Any

import pytest

from ovd.demo.request_queue import ALWAYS_ADMITTED, WAITING, RecentSessions, RequestQueue


class Queue(list[str]):
    """As much of Gradio's queue as `RequestQueue` reads; one request is being answered."""

    def get_active_worker_count(self) -> int:
        return 1


class Page:
    def __init__(self, waiting: int) -> None:
        self._queue: Any = type("Q", (Queue,), {})(["request"] * waiting)


@pytest.mark.parametrize(
    ("seconds", "last", "last_large"),
    [
        (0.2, WAITING, ALWAYS_ADMITTED),
        (0.9, WAITING, ALWAYS_ADMITTED),
        (2.0, 30, ALWAYS_ADMITTED),
        (30.0, ALWAYS_ADMITTED, ALWAYS_ADMITTED),
    ],
)
def test_queue__is_full_when_the_wait_exceeds_a_minute(seconds: float, last: int, last_large: int) -> None:
    def last_admitted(large: bool) -> int:
        queues = (RequestQueue(Page(n), seconds=lambda: seconds) for n in range(2 * WAITING))  # type: ignore[arg-type]
        return next(queue.waiting for queue in queues if queue.is_full(large=large))

    assert (last_admitted(large=False), last_admitted(large=True)) == (last, last_large)


def test_recent_sessions__least_recently_used_is_dropped() -> None:
    dropped: list[str] = []
    sessions: RecentSessions[int] = RecentSessions(3, on_dropped=dropped.append)
    for number, name in enumerate("abc"):
        sessions[name] = number
    assert sessions["a"] == 0  # a message to the first
    sessions["d"] = 3
    assert dropped == ["b"] and dict(sessions) == {"c": 2, "a": 0, "d": 3}
    assert "c" in sessions and sessions.get("c") == 2  # a look without use keeps nobody
    sessions["e"] = 4
    assert dropped == ["b", "c"] and "c" not in sessions
