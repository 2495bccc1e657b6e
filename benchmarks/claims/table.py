# SPDX-License-Identifier: Apache-2.0
"""The results of `run_all.py` as Markdown tables for docs/reports/claims.md.

`python benchmarks/claims/table.py [FOLDER]`
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, mean_and_spread

COLUMNS = {
    "knn": "kNN %",
    "health/rank": "rank",
    "health/spread": "spread",
    "loss": "loss",
    "seconds_per_step": "ms a step",
}
FACTORS = {"knn": 100.0, "seconds_per_step": 1000.0}


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row per case: mean ± standard deviation over seeds, and in how many runs each alarm came."""
    head = ["case", "seeds", "steps", "batch", *COLUMNS.values(), "alarms (runs)"]
    rows = [head, ["---"] * len(head)]
    for case, runs in results.items():
        cells = [case, str(len(runs)), str(runs[0]["steps"]), str(runs[0]["batch"])]
        for key in COLUMNS:
            mean, spread = (FACTORS.get(key, 1.0) * value for value in mean_and_spread(runs, key))
            cells.append(f"{mean:.3g} ± {spread:.2g}")
        count = Counter(alarm for run in runs for alarm in set(run["alarms"]))
        cells.append(
            ", ".join(f"{alarm.removeprefix('health/')} ({n})" for alarm, n in sorted(count.items())) or "none"
        )
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(folder: Path) -> None:
    """Print every experiment that is there."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        start, spread = mean_and_spread([run for runs in content["results"].values() for run in runs], "knn_start")
        print(f"## {content['experiment']}\n\n{table(content['results'])}\n")
        machine = content["machine"]
        print(
            f"kNN of the untrained network: {100 * start:.1f} ± {100 * spread:.1f} %. {machine['cpu']}, "
            f"{machine['threads']} thread, torch {machine['torch']}.\n"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "claims")
