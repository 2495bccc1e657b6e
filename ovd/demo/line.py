# SPDX-License-Identifier: Apache-2.0
"""The one line in which all questions wait: how long it is, when it is full, and how fast Gradio looks at it."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import gradio as gr

WAITING = 64  # the next one is told to come back
FEW = 16  # so many wait whatever it takes, and with large questions, which are kept in memory meanwhile
LONGEST = 60.0  # seconds that those before one may take, where more than `FEW` wait
UNFETCHED = 3 * WAITING  # askers whose messages are kept: while one waits, those before it and those behind it move on
BUSY, REST = 0.005, 0.2  # seconds between two looks of Gradio's loop
REST_AFTER = 3.0  # seconds without a question

T = TypeVar("T")


class LastAskers(OrderedDict[str, T], Generic[T]):
    """Messages for each asker (Gradio's session), of the last askers to whom anything happened.

    Gradio's own cache forgets whoever came first, be it the one who is being answered: a browser's tab and a
    gradio_client keep one session for all their questions. Here a message to an asker, or a look for one, counts.

    Args:
        most: askers.
        forgotten: called with the asker whose messages were dropped.
    """

    def __init__(self, most: int, *, forgotten: Callable[[str], object]) -> None:
        super().__init__()
        self._most = most
        self._forgotten = forgotten

    def __getitem__(self, asker: str) -> T:
        messages = super().__getitem__(asker)
        self.move_to_end(asker)
        return messages

    def __setitem__(self, asker: str, messages: T) -> None:
        super().__setitem__(asker, messages)
        self.move_to_end(asker)
        while len(self) > self._most:
            self._forgotten(self.popitem(last=False)[0])


class Line:
    """Counts the questions in Gradio's queue, those being answered, and those on their way in.

    Gradio polls: its loops look every 1 and every 10 milliseconds whether somebody asked, which costs 6 % of a core for
    ever, and no option changes that. The two attributes that hold these times are set here, to `BUSY` when a question
    comes and to `REST` when none has come for a while.

    Args:
        page: its queue is the line.
        waiting: questions that may wait while one is answered; see also `FEW` and `LONGEST`.
        seconds: tells what one answer takes at present.
        at_rest: called in a thread when the last question has been answered for `REST_AFTER` seconds.
    """

    def __init__(
        self,
        page: gr.Blocks,
        *,
        waiting: int = WAITING,
        seconds: Callable[[], float] = lambda: 1.0,
        at_rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue = page._queue
        # Gradio keeps the answers of 2,000 askers who never fetch them, with their pictures, and the numbers of all who
        # ever asked.
        self._queue.pending_messages_per_session = LastAskers(
            UNFETCHED, forgotten=lambda asker: self._queue.pending_event_ids_session.pop(asker, None)
        )
        self._queue.sleep_when_free = REST
        self._queue.progress_update_sleep_when_free = 1.0  # nothing here shows a progress bar
        self.most = waiting
        self._seconds = seconds
        self._at_rest = at_rest
        self._entering = 0
        self._last_question = 0.0  # loop time of the last question
        self._watch: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Questions that wait or are being answered."""
        return len(self._queue) + self._queue.get_active_worker_count() + self._entering

    def is_full(self, *, large: bool = False) -> bool:
        """Whether the next question, or the next large one, would have to wait too long."""
        if len(self) <= FEW:
            return False
        return large or len(self) > self.most or self.how_long() > LONGEST

    @property
    def waiting(self) -> int:
        """Questions behind the one that is answered."""
        return max(0, len(self) - 1)

    def how_long(self) -> int:
        """Whole seconds until the line has come to its end, at least 1."""
        return max(1, math.ceil(len(self) * self._seconds()))

    def knows(self, event: str) -> bool:
        """Whether a question of that number waits, is answered, or has an answer that was not fetched."""
        queue = self._queue
        return (
            event in queue.event_ids_to_events
            or event in queue.pending_messages_per_session
            or any(event in waiting for waiting in queue.pending_event_ids_session.values())
        )

    def enter(self) -> None:
        """A question is on its way to Gradio's queue: it counts until `entered`."""
        self._entering += 1
        self.wake()

    def entered(self) -> None:
        """Gradio has put the question into its queue, or refused it."""
        self._entering -= 1

    def wake(self) -> None:
        """Look often, until nobody has come for a while."""
        self._last_question = asyncio.get_running_loop().time()
        self._queue.sleep_when_free = BUSY
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._until_rest())

    async def _until_rest(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self) or loop.time() < self._last_question + REST_AFTER:
            if len(self):
                self._last_question = loop.time()
            await asyncio.sleep(0.5)
        self._queue.sleep_when_free = REST
        await asyncio.to_thread(self._at_rest)
