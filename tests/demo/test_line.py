# SPDX-License-Identifier: Apache-2.0
"""When the line is full, and whose messages the page keeps."""

from __future__ import annotations

from typing import Any

import pytest

from ovd.demo.line import FEW, WAITING, LastAskers, Line


class Queue(list[str]):
    """As much of Gradio's queue as the line looks at; one question is being answered."""

    def get_active_worker_count(self) -> int:
        return 1


class Page:
    def __init__(self, waiting: int) -> None:
        self._queue: Any = type("Q", (Queue,), {})(["question"] * waiting)


@pytest.mark.parametrize(
    ("seconds", "last", "last_large"), [(0.2, WAITING, FEW), (0.9, WAITING, FEW), (2.0, 30, FEW), (30.0, FEW, FEW)]
)
def test_so_many_wait_as_those_before_them_take_a_minute(seconds: float, last: int, last_large: int) -> None:
    def most(large: bool) -> int:
        lines = (Line(Page(n), seconds=lambda: seconds) for n in range(2 * WAITING))  # type: ignore[arg-type]
        return next(line.waiting for line in lines if line.is_full(large=large))

    assert (most(large=False), most(large=True)) == (last, last_large)


def test_askers_to_whom_nothing_happened_for_longest_are_forgotten() -> None:
    forgotten: list[str] = []
    askers: LastAskers[int] = LastAskers(3, forgotten=forgotten.append)
    for number, name in enumerate("abc"):
        askers[name] = number
    assert askers["a"] == 0  # a message to the first
    askers["d"] = 3
    assert forgotten == ["b"] and dict(askers) == {"c": 2, "a": 0, "d": 3}
    assert "c" in askers and askers.get("c") == 2  # asking whether they are known keeps nobody
    askers["e"] = 4
    assert forgotten == ["b", "c"] and "c" not in askers
