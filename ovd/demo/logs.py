# SPDX-License-Identifier: Apache-2.0
"""Rate-limited logging: strangers must not be able to fill the disk with one line."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

EVERY = 60.0  # seconds until the same line may come again
KINDS = 256


class RepeatFilter(logging.Filter):
    """Lets a line through once in `EVERY` seconds, with the number of those like it that were dropped.

    Lines are alike if their format, their level and the place of their exception are: numbers in them do not count.

    Args:
        every: seconds.
    """

    def __init__(self, *, every: float = EVERY) -> None:
        super().__init__()
        self._every = every
        self._recent: OrderedDict[tuple[str, int, str, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        problem = record.exc_info[1] if record.exc_info else None
        key = (record.name, record.levelno, str(record.msg), f"{type(problem).__name__}{_raised_at(problem)}")
        now = time.monotonic()
        since, more = self._recent.get(key, (now - self._every, 0))
        if now - since < self._every:
            self._recent[key] = (since, more + 1)
            return False
        self._recent[key] = (now, 0)
        self._recent.move_to_end(key)
        while len(self._recent) > KINDS:
            self._recent.popitem(last=False)
        if more:
            record.msg = f"{record.getMessage()} ({more} more like this in {now - since:.0f} seconds)"
            record.args = ()
        return True


def _raised_at(problem: BaseException | None) -> str:
    trace = problem.__traceback__ if problem is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""


def configure(level: int = logging.WARNING) -> None:
    """One handler on stderr for all loggers, without repetitions."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level, handlers=[handler])
