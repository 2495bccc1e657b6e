# SPDX-License-Identifier: Apache-2.0
"""A metric of your own: the harmonic mean of base and novel AP50, beside the values of `ovd.evaluate`."""

import sys
from pathlib import Path

from ovd.data.splits import Split
from ovd.evaluation.coco import Metrics, evaluate
from ovd.evaluation.report import write
from pretrain.engine.errors import run_cli
from pretrain.engine.files import read_json


def add_harmonic_mean(metrics: Metrics, *, kind: str = "bbox", name: str = "AP50") -> Metrics:
    """Add `KIND/NAME_hmean`: 0 where a group is 0, NaN where a group has nothing to average."""
    base, novel = (metrics.values[f"{kind}/{name}_{group}"] for group in ("base", "novel"))
    metrics.values[f"{kind}/{name}_hmean"] = 2 * base * novel / (base + novel) if base + novel else 0.0
    return metrics


def main(argv: list[str]) -> int:
    """`python examples/extending/metric.py gt.json results.json ovcoco OUT` writes OUT/metrics.json."""
    truth, results = (read_json(file) for file in argv[:2])
    names = {category["id"]: category["name"] for category in truth["categories"]}
    metrics = add_harmonic_mean(evaluate(truth, results, Split.load(argv[2], categories=names)))
    write(metrics, Path(argv[3]), command=sys.argv)
    print(f"AP50, harmonic mean of base and novel: {metrics.values['bbox/AP50_hmean']:.3f}")
    return 0


if __name__ == "__main__":
    run_cli(main)
