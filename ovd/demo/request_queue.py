# SPDX-License-Identifier: Apache-2.0
"""Admission to Gradio's queue: its length, when it is full, and how often Gradio polls it."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import gradio as gr

WAITING = 64  # requests; the next one is refused (503)
ALWAYS_ADMITTED = 16  # requests that may wait however long answers take; the limit for large ones, kept in memory
MAX_WAIT = 60.0  # seconds, where more than `ALWAYS_ADMITTED` wait
KEPT_SESSIONS = 3 * WAITING  # with unfetched messages: while one waits, those before and behind it move on
BUSY_POLL, IDLE_POLL = 0.005, 0.2  # seconds between two polls of Gradio's loop
IDLE_AFTER = 3.0  # seconds without a request

T = TypeVar("T")


class RecentSessions(OrderedDict[str, T], Generic[T]):
    """Messages by session, of the least recently used first (LRU).

    Gradio's own cache drops the oldest session, even while it is being answered: a browser's tab and a gradio_client
    keep one session for all their requests. Here a message to a session, or a look for one, counts as use.

    Args:
        limit: sessions.
        on_dropped: called with a session whose messages were dropped.
    """

    def __init__(self, limit: int, *, on_dropped: Callable[[str], object]) -> None:
        super().__init__()
        self._limit = limit
        self._on_dropped = on_dropped

    def __getitem__(self, session: str) -> T:
        messages = super().__getitem__(session)
        self.move_to_end(session)
        return messages

    def __setitem__(self, session: str, messages: T) -> None:
        super().__setitem__(session, messages)
        self.move_to_end(session)
        while len(self) > self._limit:
            self._on_dropped(self.popitem(last=False)[0])


class RequestQueue:
    """Counts the requests in Gradio's queue, those being answered, and those on their way in.

    Gradio polls its queue every 1 and every 10 milliseconds, which costs 6 % of a core, and no option changes
    that. The attributes that hold the two intervals are set here: to `BUSY_POLL` when a request comes, and to
    `IDLE_POLL` when none has come for a while.

    Args:
        page: whose queue it is.
        seconds: returns how long one answer takes at present.
        on_idle: called in a thread `IDLE_AFTER` seconds after the last answer.
    """

    def __init__(
        self,
        page: gr.Blocks,
        *,
        seconds: Callable[[], float] = lambda: 1.0,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue = page._queue
        # Gradio keeps the answers of 2,000 sessions that never fetch them, with their pictures, and the ids of all
        # sessions ever.
        self._queue.pending_messages_per_session = RecentSessions(
            KEPT_SESSIONS, on_dropped=lambda session: self._queue.pending_event_ids_session.pop(session, None)
        )
        self._queue.sleep_when_free = IDLE_POLL
        self._queue.progress_update_sleep_when_free = 1.0  # nothing here shows a progress bar
        self._seconds = seconds
        self._on_idle = on_idle
        self._entering = 0
        self._last_request = 0.0  # loop time
        self._watch: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._queue) + self._queue.get_active_worker_count() + self._entering

    def is_full(self, *, large: bool = False) -> bool:
        """Whether the next request, or the next large one, would have to wait too long."""
        if len(self) <= ALWAYS_ADMITTED:
            return False
        return large or len(self) > WAITING or self.expected_seconds() > MAX_WAIT

    @property
    def waiting(self) -> int:
        """Requests behind the one that is answered."""
        return max(0, len(self) - 1)

    def expected_seconds(self) -> int:
        """Whole seconds until the queue is empty, at least 1."""
        return max(1, math.ceil(len(self) * self._seconds()))

    def has_event(self, event: str) -> bool:
        """Whether an event waits, is answered, or has an answer that was not fetched."""
        queue = self._queue
        return (
            event in queue.event_ids_to_events
            or event in queue.pending_messages_per_session
            or any(event in waiting for waiting in queue.pending_event_ids_session.values())
        )

    def enter(self) -> None:
        """Count a request on its way to Gradio's queue, until `entered`."""
        self._entering += 1
        self.wake()

    def entered(self) -> None:
        """Gradio has put the request into its queue, or refused it."""
        self._entering -= 1

    def wake(self) -> None:
        """Poll often, until no request has come for a while."""
        self._last_request = asyncio.get_running_loop().time()
        self._queue.sleep_when_free = BUSY_POLL
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._until_idle())

    async def _until_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self) or loop.time() < self._last_request + IDLE_AFTER:
            if len(self):
                self._last_request = loop.time()
            await asyncio.sleep(0.5)
        self._queue.sleep_when_free = IDLE_POLL
        await asyncio.to_thread(self._on_idle)
