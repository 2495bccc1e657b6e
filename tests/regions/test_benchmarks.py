# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks, and that each of them starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _common

    return _common


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.95, 1.0])
def test_percentiles__are_numpys(common: ModuleType, share: float) -> None:
    values = [5.0, 1.0, 9.0, 2.5, 7.0]
    assert common.percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_ratios__pair_times_of_the_same_round(common: ModuleType) -> None:
    slow_then_fast = common.ratio([8.0, 2.0, 4.0], [4.0, 1.0, 2.0])
    assert (slow_then_fast["median"], slow_then_fast["low"], slow_then_fast["high"]) == (2.0, 2.0, 2.0)


def test_pairs__alternate_in_both_orders(common: ModuleType) -> None:
    order: list[str] = []
    seconds = common.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "script",
    [*sorted(BENCHMARKS.glob("bench_*.py")), BENCHMARKS / "load_page.py", BENCHMARKS / "check_configs.py"],
    ids=lambda path: path.stem,
)
def test_benchmarks__each_says_what_it_measures(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout and "--json" in done.stdout
