# SPDX-License-Identifier: Apache-2.0
"""Reliability of scores, and their dependence on the other typed words.

Pure functions of arrays; `N` detections or pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.engine.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Score against accuracy, in B bins.

    Attributes:
        edges: (B + 1,) borders of the bins.
        count: (B,) detections in each.
        confidence: (B,) mean score, NaN in empty bins.
        accuracy: (B,) share that is correct, NaN in empty bins.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error, Σ n_b/n · |accuracy − confidence| (Guo et al. 2017, eq. 3); NaN if empty."""
        used = self.count > 0
        gap = np.abs(self.accuracy - self.confidence)[used]
        return float(np.average(gap, weights=self.count[used])) if used.any() else float("nan")

    @property
    def mce(self) -> float:
        """Largest gap of any bin; NaN without detections."""
        used = self.count > 0
        return float(np.abs(self.accuracy - self.confidence)[used].max()) if used.any() else float("nan")


def reliability(score: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> Reliability:
    """Bin detections by score, in bins of equal width over [0, 1].

    Args:
        score: (N,) in [0, 1]; 1 belongs to the last bin.
        correct: (N,) bool, or how likely each is right, 0…1.
        bins: how many; 15 as Guo et al. 2017.

    Raises:
        ValueError: lengths differ, or a score is outside [0, 1].
    """
    score_N, correct_N = np.asarray(score, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if score_N.shape != correct_N.shape or score_N.ndim != 1:
        raise ValueError(f"score and correct must be (N,), are {score_N.shape} and {correct_N.shape}")
    if score_N.size and not (score_N.min() >= 0 and score_N.max() <= 1):
        raise ValueError("scores must be in [0, 1]")
    edges = np.linspace(0, 1, bins + 1)
    index = np.minimum(np.searchsorted(edges, score_N, side="right") - 1, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, weights=score_N, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct_N, minlength=bins) / count
    return Reliability(edges=edges, count=count, confidence=confidence, accuracy=accuracy)


def score_drift(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """How scores of correct detections move when unrelated words are added.

    Args:
        before, after: (N,) scores of the same regions and classes; NaN in `after` for a detection that is gone counts
            as a score of 0.

    Returns:
        (mean of |after − before|, share that moved by at most .05); NaN without detections.
    """
    moved = np.abs(np.nan_to_num(after, nan=0.0) - before)
    if not moved.size:
        return float("nan"), float("nan")
    # A change of exactly .05 is within it; float noise must not decide.
    return float(moved.mean()), float(np.mean(moved <= 0.05 + 1e-9))


LEFT, TOP, SIDE = 56, 40, 320
DARK = "#222222"
"""Place and side of the unit square of a plot, in its units, and the colour of its letters."""


def open_axes(*, title: str, height: int) -> list[str]:
    """The beginning of a self-contained SVG, 420 wide: title, and the unit square with its ticks."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 {height}" font-family="sans-serif" font-size="12" '
        f'role="img" aria-label="{escape(title, quote=True)}"><rect width="420" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" fill="{DARK}">{escape(title)}</text>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + SIDE * tick, TOP + SIDE * (1 - tick)
        parts.append(f'<path d="M{LEFT} {y}h{SIDE}M{x} {TOP}v{SIDE}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{x}" y="{TOP + SIDE + 16}" text-anchor="middle" fill="{DARK}">{tick:g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" fill="{DARK}">{tick:g}</text>')
    return parts


def axis_names(x: str, y: str) -> list[str]:
    """The labels below and beside the unit square."""
    return [
        f'<text x="{LEFT + SIDE / 2}" y="{TOP + SIDE + 34}" text-anchor="middle" fill="{DARK}">{x}</text>',
        f'<text transform="translate(16 {TOP + SIDE / 2}) rotate(-90)" text-anchor="middle" fill="{DARK}">{y}</text>',
    ]


def reliability_svg(curve: Reliability, *, title: str = "Reliability", caption: str = "") -> str:
    """The reliability diagram as a self-contained SVG: bars are accuracy (darker: more detections), lines scores."""
    left, top, side = LEFT, TOP, SIDE
    bar, gap = "#3b6fb5", "#d9822b"
    parts = open_axes(title=title, height=460)
    highest = max(1, int(curve.count.max(initial=0)))
    for low, high, n, confidence, accuracy in zip(
        curve.edges, curve.edges[1:], curve.count, curve.confidence, curve.accuracy, strict=False
    ):
        if n == 0:
            continue
        x, width = left + side * low, side * (high - low)
        y, expected = top + side * (1 - accuracy), top + side * (1 - confidence)
        parts.append(
            f'<rect x="{x + 1:.2f}" y="{y:.2f}" width="{width - 2:.2f}" height="{top + side - y:.2f}" fill="{bar}" '
            f'fill-opacity="{0.25 + 0.75 * n / highest:.2f}"><title>{n} detections, score {confidence:.3f}, '
            f"correct {accuracy:.3f}</title></rect>"
            f'<path d="M{x + 1:.2f} {expected:.2f}h{width - 2:.2f}" stroke="{gap}" stroke-width="2"/>'
        )
    parts.append(f'<path d="M{left} {top + side}L{left + side} {top}" stroke="{DARK}" stroke-dasharray="4 4"/>')
    parts += axis_names("score", "share correct (bars), mean score (lines)")
    figures = f"ECE {curve.ece:.3f}, largest gap {curve.mce:.3f}, {int(curve.count.sum())} detections"
    for n, line in enumerate([figures, caption] if caption else [figures]):
        parts.append(f'<text x="{left}" y="{top + side + 58 + 16 * n}" fill="{DARK}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def json_safe(value: object) -> object:
    """The same with NaN, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def report_fit(
    content: Mapping[str, object],
    curve: Reliability,
    *,
    title: str,
    caption: str,
    plot: Path | None,
    file: Path | None,
) -> None:
    """Print what was fitted and measured.

    Args:
        content: as plain values.
        curve: measured on what was not fitted on.
        title, caption: of the plot.
        plot: SVG of the curve; None: none is drawn.
        file: what is printed is written there too; None: it is not.
    """
    text = json.dumps(json_safe(content), indent=1, ensure_ascii=False, allow_nan=False)
    print(text)
    if plot is not None:
        write_atomically(plot, reliability_svg(curve, title=title, caption=caption).encode())
    if file is not None:
        write_atomically(file, (text + "\n").encode())
