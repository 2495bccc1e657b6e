# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees is a function of seed and step, whatever the number of workers and processes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from pretrain.engine.distributed import preserved_rng
from pretrain.engine.errors import UserError
from pretrain.engine.sampling import Fetched, Microbatches, Order, batches, derive_seed
from tests.engine.toy import Numbers


def microbatches(source: Numbers, **options: int) -> Microbatches:
    return Microbatches(source, **{"seed": 5, "batch_size": 6, "accumulate": 1, "rank": 0, "world_size": 1} | options)


@pytest.mark.parametrize("length", [*range(1, 40), 64, 65, 255, 256, 257, 1000])
def test_order__every_epoch_has_every_index_once(length: int) -> None:
    order = Order(length=length, seed=3)
    for epoch in (0, 1, 7):
        assert sorted(order.index(epoch * length + n) for n in range(length)) == list(range(length))


def test_order__differs_by_epoch_and_seed() -> None:
    orders = [[Order(length=100, seed=s).index(e * 100 + n) for n in range(100)] for s in (0, 1) for e in (0, 1)]
    for a in range(4):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 12  # 1 expected by chance


def test_order__is_uniform() -> None:
    length, epochs = 10, 2000
    order = Order(length=length, seed=11)
    counts = Counter((n, order.index(e * length + n)) for e in range(epochs) for n in range(length))
    expected = epochs / length
    chi2 = sum((counts[n, i] - expected) ** 2 / expected for n in range(length) for i in range(length))
    assert chi2 < 150  # 81 degrees of freedom: beyond 150 with probability 5e-6


def test_derive_seed__neighbours_are_unrelated() -> None:
    seeds = [derive_seed(0, n) for n in range(1000)] + [derive_seed(1, n) for n in range(1000)]
    assert len(set(seeds)) == 2000
    ones = sum(bin(a ^ b).count("1") for a, b in itertools.pairwise(seeds)) / len(seeds)
    assert 30 < ones < 33  # half of 63 bits


def test_microbatches__empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        Order(length=0, seed=0)


def test_microbatches__processes_make_up_the_global_batch() -> None:
    source = Numbers(17)
    for number in range(6):
        whole = microbatches(source, batch_size=12, accumulate=3)[number]
        for world in (2, 4):
            parts = [
                microbatches(source, batch_size=12, accumulate=3, rank=r, world_size=world)[number]
                for r in range(world)
            ]
            assert torch.equal(torch.cat([part.batch for part in parts]), whole.batch)
            assert [draw for part in parts for draw in part.draws] == whole.draws
    assert [microbatches(source).draws(n) for n in (0, 1)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_microbatches__indivisible_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"loop.batch_size: 6 .* 2 × 2; use a multiple of 4"):
        microbatches(Numbers(), accumulate=2, world_size=2)


def fetched(workers: int, first: int = 0, **options: int) -> list[Fetched]:
    return list(
        batches(microbatches(Numbers(20, noisy=True), **options), first=first, last=8, workers=workers, pin=False)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches__do_not_depend_on_workers() -> None:
    alone = fetched(0)
    for workers in (1, 2):
        for a, b in zip(alone, fetched(workers), strict=True):
            assert torch.equal(a.batch, b.batch)
            assert (a.draws, a.indices) == (b.draws, b.indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches__starting_later_continues_the_sequence(workers: int) -> None:
    for a, b in zip(fetched(0)[5:], fetched(workers, first=5), strict=True):
        assert torch.equal(a.batch, b.batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches__leave_global_generators_alone(workers: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with preserved_rng():
        expected = random.random(), np.random.rand(), torch.rand(()).item()
    fetched(workers)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_batches__unreadable_image_is_replaced_by_the_next() -> None:
    clean, holed = microbatches(Numbers(20)), microbatches(Numbers(20, unreadable=(3, 4, 19)))
    replacement = {3: 5, 4: 5, 19: 0}
    seen = set()
    for number in range(10):
        a, b = clean[number], holed[number]
        assert b.indices == [replacement.get(index, index) for index in a.indices]
        assert {entry[0] for entry in b.bad} <= {3, 4, 19}
        seen |= set(b.bad)
    assert (3, "images/3.png", "images/3.png: truncated") in seen
    assert len(seen) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_batches__no_readable_image_is_an_error(workers: int) -> None:
    data = microbatches(Numbers(5, unreadable=(0, 1, 2, 3, 4)))
    error = next(batches(data, first=0, last=1, workers=workers, pin=False)).error
    assert error is not None
    assert "5 images in a row cannot be read" in error
    assert "Traceback" not in error
