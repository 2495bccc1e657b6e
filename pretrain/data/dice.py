# SPDX-License-Identifier: Apache-2.0
"""Random numbers for pictures: one stream per key, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class Dice:
    """Uniform random numbers from one PCG64 stream, the only randomness of a picture."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._pool: list[float] = []

    def random(self) -> float:
        """A number in [0, 1)."""
        if not self._pool:
            self._pool = self._generator.random(64).tolist()
        return self._pool.pop()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.random()

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.random() * count)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, uniformly."""
        return items[self.below(len(items))]

    def permutation(self, count: int) -> list[int]:
        """A random order of range(count)."""
        return [int(i) for i in np.argsort(self._generator.random(count), kind="stable")]
