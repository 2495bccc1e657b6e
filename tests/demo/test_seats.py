# SPDX-License-Identifier: Apache-2.0
"""Seats are given in the order in which they were asked for."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ovd.demo.seats import Seats


def until_waiting(seats: Seats, count: int) -> None:
    while seats.waiting < count:
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 3])
def test_seats__are_taken_in_the_order_of_coming(count: int) -> None:
    seats, order = Seats(count), list[int]()
    done = [threading.Event() for _ in range(20)]

    def sit(number: int) -> None:
        with seats:
            order.append(number)
            done[number].wait(20)

    with ThreadPoolExecutor(20) as people:
        for number in range(20):
            people.submit(sit, number)
            while len(order) + seats.waiting <= number:
                time.sleep(0.001)
        seated, shuffled = list(range(count)), random.Random(0)
        for following in range(count, 20):  # whoever leaves first, the next in the line follows
            done[leaver := seated.pop(shuffled.randrange(count))].set()
            while len(order) <= following:
                time.sleep(0.001)
            assert order == list(range(following + 1)), leaver
            seated.append(following)
        for left in seated:
            done[left].set()


def test_seats__who_comes_back_at_once_is_behind_those_who_wait() -> None:
    """Where `threading.Semaphore` lets the returning thread in again before the one that waits has woken."""
    seats, order = Seats(1), list[str]()

    def wait() -> None:
        with seats:
            order.append("waited")

    with ThreadPoolExecutor(1) as people:
        with seats:
            waiting = people.submit(wait)
            until_waiting(seats, 1)
        with seats:
            order.append("came back")
        waiting.result(20)
    assert order == ["waited", "came back"]


def test_seats__an_error_inside_gives_the_seat_back() -> None:
    seats = Seats(1)
    with pytest.raises(ValueError, match="inside"), seats:
        raise ValueError("inside")
    with seats:
        assert seats.waiting == 0
