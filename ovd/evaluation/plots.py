# SPDX-License-Identifier: Apache-2.0
"""Two pictures of an evaluation: precision against recall, and how often a score is right.

Both count as COCO does (`ovd.evaluation.matching`), so the area under a precision-recall curve is the AP of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovd.data.splits import Split
from ovd.evaluation.compare import RECALLS, RankedDetections
from ovd.evaluation.matching import CategoryMatches, match_table
from ovd.evaluation.reliability import (
    DARK,
    LEFT,
    SIDE,
    TOP,
    Reliability,
    axis_names,
    open_axes,
    reliability,
    reliability_svg,
)
from pretrain.engine.files import write_atomically

IOUS = (0.5, 0.75)
FLOOR = 0.05
"""Lowest score in the reliability diagram; below it the many boxes that are never shown would dominate the mean."""
COLOURS = ("#3b6fb5", "#d9822b", "#4a8f5c", "#8a5aa8")


def mean_curve(table: Mapping[int, CategoryMatches], ids: Sequence[int]) -> NDArray[np.float64]:
    """(101,) mean over categories with objects; its mean is their AP at the table's IoU."""
    each = (RankedDetections.of(table[i]).curve(np.ones(len(table[i].objects))) for i in ids)
    curves = [curve for curve in each if curve is not None]
    return np.mean(curves, axis=0) if curves else np.zeros(len(RECALLS))


def score_reliability(table: Mapping[int, CategoryMatches]) -> Reliability:
    """Score against share that is right, of all detections from `FLOOR` on; those on crowds count neither way."""
    score = np.concatenate([matches.score[~matches.ignored] for matches in table.values()])
    correct = np.concatenate([matches.correct[~matches.ignored] for matches in table.values()])
    listed = score >= FLOOR
    return reliability(score[listed], correct[listed])


def write_plots(
    gt: Mapping[str, Any], results: Sequence[Mapping[str, Any]], split: Split, folder: Path, *, title: str, kind: str
) -> tuple[Path, Path]:
    """Write ``precision_recall.svg`` and ``reliability.svg``; returns both paths.

    Args:
        gt, results: as for `ovd.evaluation.coco.evaluate`.
        split: curves are drawn of all its categories, and of base and novel ones where there are both.
        folder: is made.
        title: of the pictures.
        kind: bbox or segm.
    """
    tables = {iou: match_table(gt, results, split, iou_type=kind, iou=iou) for iou in IOUS}
    curves = {f"IoU {iou:.2f}": mean_curve(table, split.ids) for iou, table in tables.items()}
    if split.novel:
        for name, ids in (("base", split.base), ("novel", split.novel)):
            curves[f"{name}, IoU {IOUS[0]:.2f}"] = mean_curve(tables[IOUS[0]], sorted(ids))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "precision_recall.svg", folder / "reliability.svg"
    write_atomically(paths[0], curves_svg(curves, title=title).encode())
    caption = f"{len(tables[IOUS[0]])} words in every picture, IoU {IOUS[0]}, scores from {FLOOR} on"
    curve = score_reliability(tables[IOUS[0]])
    write_atomically(paths[1], reliability_svg(curve, title=title, caption=caption).encode())
    return paths


def curves_svg(curves: Mapping[str, NDArray[np.float64]], *, title: str) -> str:
    """Precision against recall as a self-contained SVG; a curve's mean is shown beside its name."""
    left, top, side = LEFT, TOP, SIDE
    parts = open_axes(title=title, height=420 + 16 * len(curves))
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{left + side * r:.1f},{top + side * (1 - p):.1f}" for r, p in zip(RECALLS, curve, strict=True)
        )
        y = top + side + 58 + 16 * number
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{left} {y - 4}h20" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + 28}" y="{y}" fill="{DARK}">{escape(name)}: AP {100 * float(curve.mean()):.1f}</text>'
        )
    parts += axis_names("recall", "precision, mean over words")
    return "\n".join([*parts, "</svg>"]) + "\n"
