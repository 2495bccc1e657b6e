# SPDX-License-Identifier: Apache-2.0
"""Whether A is better than B beyond the choice of pictures: a paired bootstrap over images.

Both result files are evaluated on the same resampled pictures, so the difficulty of a picture cancels out of the
difference. This does not cover the variance between training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovd.evaluation.matching import CategoryMatches

RECALLS: NDArray[np.float64] = np.linspace(0, 1, 101)  # COCO's 101 points


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`b − a` of one metric.

    Attributes:
        a, b: the metric of each on all pictures.
        difference: b − a.
        low, high: 95 % percentile interval of the difference.
        samples: bootstrap samples in which the metric exists for both.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    samples: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class RankedDetections:
    """One category's detections, best score first, without those on crowds."""

    image: NDArray[np.int64]
    correct: NDArray[np.float64]
    objects: NDArray[np.int64]

    @classmethod
    def of(cls, matches: CategoryMatches) -> RankedDetections:
        keep = np.flatnonzero(~matches.ignored)
        # As pycocotools: ties stay in the order of images.
        order = keep[np.argsort(-matches.score[keep], kind="stable")]
        return cls(matches.image[order], matches.correct[order].astype(np.float64), matches.objects)

    def curve(self, weight: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """(101,) interpolated precision at COCO's recalls, each image counted `weight` times; None without objects."""
        total = float(self.objects @ weight)
        if total == 0:
            return None
        times = weight[self.image]
        hits, drawn = np.cumsum(self.correct * times), np.cumsum(times)
        used = drawn > 0
        hits, drawn = hits[used], drawn[used]
        if not hits.size:
            return np.zeros(len(RECALLS))
        precision = np.maximum.accumulate((hits / drawn)[::-1])[::-1]
        index = np.searchsorted(hits / total, RECALLS, side="left")
        return np.where(index < len(precision), precision[np.minimum(index, len(precision) - 1)], 0.0)

    def precision(self, weight: NDArray[np.float64]) -> float:
        """The mean of `curve`, COCO's average precision; NaN without objects."""
        curve = self.curve(weight)
        return float("nan") if curve is None else float(curve.mean())


def _average(values: Sequence[float]) -> float:
    real = [v for v in values if v == v]
    return float(np.mean(real)) if real else float("nan")


def bootstrap(
    a: Mapping[int, CategoryMatches],
    b: Mapping[int, CategoryMatches],
    groups: Mapping[str, Sequence[int]],
    *,
    samples: int = 500,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences of mean average precision with their 95 % intervals over resampled images.

    Args:
        a, b: match tables of two result files on the same ground truth and split.
        groups: name -> category ids to average over (`Split.groups`); all groups see the same resampled images.
        samples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: the tables are of different ground truth.
    """
    categories = sorted({i for ids in groups.values() for i in ids})
    pairs = {i: (RankedDetections.of(a[i]), RankedDetections.of(b[i])) for i in categories}
    if any(not np.array_equal(x.objects, y.objects) for x, y in pairs.values()):
        raise ValueError("the two match tables come from different ground truth")
    images = len(next(iter(pairs.values()))[0].objects) if pairs else 0

    def means(weight: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
        each = {i: (x.precision(weight), y.precision(weight)) for i, (x, y) in pairs.items()}
        return {
            name: (_average([each[i][0] for i in ids]), _average([each[i][1] for i in ids]))
            for name, ids in groups.items()
        }

    on_all = means(np.ones(images))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(samples if images else 0):
        weight = np.bincount(rng.integers(0, images, images), minlength=images).astype(np.float64)
        for name, (first, second) in means(weight).items():
            drawn[name].append(second - first)
    result = {}
    for name, (first, second) in on_all.items():
        real = np.array([d for d in drawn[name] if d == d])
        low, high = np.percentile(real, [2.5, 97.5]) if real.size else (float("nan"), float("nan"))
        result[name] = Difference(
            a=first, b=second, difference=second - first, low=float(low), high=float(high), samples=int(real.size)
        )
    return result
