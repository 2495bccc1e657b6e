# SPDX-License-Identifier: Apache-2.0
"""A semaphore that is acquired in the order in which threads ask for it."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ovd.demo.fair_semaphore import FairSemaphore


def until_waiting(semaphore: FairSemaphore, count: int) -> None:
    while semaphore.waiting < count:
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 3])
def test_fair_semaphore__is_first_in_first_out(count: int) -> None:
    semaphore, order = FairSemaphore(count), list[int]()
    done = [threading.Event() for _ in range(20)]

    def hold(number: int) -> None:
        with semaphore:
            order.append(number)
            done[number].wait(60)

    with ThreadPoolExecutor(20) as people:
        for number in range(20):
            people.submit(hold, number)
            while len(order) + semaphore.waiting <= number:
                time.sleep(0.001)
        seated, shuffled = list(range(count)), random.Random(0)
        for following in range(count, 20):  # whoever releases first, the next in the queue follows
            done[leaver := seated.pop(shuffled.randrange(count))].set()
            while len(order) <= following:
                time.sleep(0.001)
            assert order == list(range(following + 1)), leaver
            seated.append(following)
        for left in seated:
            done[left].set()


def test_fair_semaphore__reacquiring_waits_behind_others() -> None:
    """Where `threading.Semaphore` lets the returning thread in again before the one that waits has woken."""
    semaphore, order = FairSemaphore(1), list[str]()

    def wait() -> None:
        with semaphore:
            order.append("waited")

    with ThreadPoolExecutor(1) as people:
        with semaphore:
            waiting = people.submit(wait)
            until_waiting(semaphore, 1)
        with semaphore:
            order.append("came back")
        waiting.result(60)
    assert order == ["waited", "came back"]


def test_fair_semaphore__is_released_on_error() -> None:
    semaphore = FairSemaphore(1)
    with pytest.raises(ValueError, match="inside"), semaphore:
        raise ValueError("inside")
    with semaphore:
        assert semaphore.waiting == 0
