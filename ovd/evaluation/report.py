# SPDX-License-Identifier: Apache-2.0
"""Evaluation results: screen table, `metrics.json`, `per_class.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovd.data.lvis import FREQUENCIES
from ovd.evaluation.coco import AVERAGES, RECALL_CAPS, Metrics
from ovd.evaluation.compare import Difference
from ovd.evaluation.reliability import json_safe
from pretrain.engine.files import write_atomically

SCHEMA_VERSION = 1
TITLES = {"bbox": "boxes", "segm": "masks"}
COLUMNS = (*AVERAGES, *(f"AR{cap}" for cap in RECALL_CAPS), *(f"AR{cap}@50" for cap in RECALL_CAPS))


def value(metrics: Metrics, kind: str, column: str, group: str) -> float:
    """One value by kind (bbox, segm), column (AP50, AR100@50, …) and group (all, base, novel); NaN if absent."""
    name, _, at = column.partition("@")
    key = f"{kind}/{name}" + ("" if group == "all" else f"_{group}") + (f"@{at}" if at else "")
    return metrics.values.get(key, math.nan)


def percent(number: float) -> str:
    """A fraction as a percentage with one decimal, `n/a` for NaN."""
    return "n/a" if math.isnan(number) else f"{100 * number:.1f}"


def table(metrics: Metrics) -> str:
    """The table for the screen: a block per kind, a row per group, percentages."""
    split, counts = metrics.split, metrics.counts
    lines = [
        f"{counts['images']} images, {counts['objects']} objects, {counts['detections']} detections; "
        f"split {split.name} ({len(split.base)} base, {len(split.novel)} novel, hash {split.hash})"
    ]
    width = max(7, *(len(c) + 1 for c in COLUMNS))
    for kind in dict.fromkeys(k.split("/")[0] for k in metrics.values):
        lines += ["", f"{TITLES[kind]:8}" + "".join(f"{c:>{width}}" for c in COLUMNS)]
        for group in split.groups:
            cells = "".join(f"{percent(value(metrics, kind, c, group)):>{width}}" for c in COLUMNS)
            lines.append(f"{group:8}" + cells)
        by_frequency = {label: metrics.values.get(f"{kind}/AP{letter}") for letter, label in FREQUENCIES.items()}
        if None not in by_frequency.values():
            lines.append("AP by frequency: " + ", ".join(f"{k} {percent(v or 0.0)}" for k, v in by_frequency.items()))
    lines += ["", "AP per category; AR class-agnostic (@50: at IoU .5). All in percent; n/a: nothing to average."]
    return "\n".join(lines)


def write(
    metrics: Metrics, out: Path, *, command: Sequence[str] = (), extra: Mapping[str, object] | None = None
) -> tuple[Path, Path]:
    """Write `metrics.json`, in which NaN becomes null, and `per_class.csv` into a folder, which is made.

    Args:
        metrics: the figures.
        out: folder.
        command: how it was run.
        extra: further values (weights, seed, time), stored under `run`.

    Returns:
        both paths.
    """
    json_path, csv_path = out / "metrics.json", out / "per_class.csv"
    content = {
        "schema_version": SCHEMA_VERSION,
        "metrics": json_safe(metrics.values),
        "split": {"name": metrics.split.name, "hash": metrics.split.hash,
                  "base": len(metrics.split.base), "novel": len(metrics.split.novel)},
        "dataset_sha256": metrics.dataset_sha256,
        "counts": metrics.counts,
        "warnings": metrics.warnings,
        "command": list(command),
        "run": dict(extra or {}),
    }  # fmt: skip
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(json_path, text.encode(errors="backslashreplace"))  # names on disk may be no UTF-8
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(metrics.per_class[0].row()))
    writer.writeheader()
    for row in metrics.per_class:
        writer.writerow({k: _cell(v) for k, v in row.row().items()})
    write_atomically(csv_path, table.getvalue().encode(errors="backslashreplace"))
    return json_path, csv_path


def difference_line(d: Difference) -> str:
    """`31.2 -> 34.0: +2.8 [+1.1, +4.6]`, in percent; says so when the interval holds zero."""
    if math.isnan(d.difference):
        return "n/a"
    low, high = f"{100 * d.low:+.1f}", f"{100 * d.high:+.1f}"
    verdict = "" if d.clear else "  not clear: the interval holds 0"
    return f"{percent(d.a)} -> {percent(d.b)}: {100 * d.difference:+.1f} [{low}, {high}]{verdict}"


def _cell(entry: str | int | float) -> str | int:
    if isinstance(entry, float):
        return "" if math.isnan(entry) else f"{entry:.6f}"
    return entry
