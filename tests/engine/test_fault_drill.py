# SPDX-License-Identifier: Apache-2.0
"""A short fault drill: one training of each program, killed, ended, run twice at a time, its checkpoint damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def drilled(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "scripts/fault_drill.py", "--folder", str(folder), *arguments],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.iterdir()) == [], "it cleans up"
    return done.stdout


def test_fault_drill__kill_signal_and_second_run(tmp_path: Path) -> None:
    said = drilled(
        "--kinds", "clip", "--kills", "1", "--steps", "4", "--faults", "kill", "term", "two", folder=tmp_path
    )
    rows = [line.split("|")[1:5] for line in said.splitlines() if line.startswith("| clip")]
    assert [row[1].strip() for row in rows] == ["undisturbed", "kill -9", "SIGTERM", "two runs in one folder"]
    assert all(row[3].strip() == "0" for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_fault_drill__every_training_and_fault(tmp_path: Path) -> None:
    said = drilled("--kills", "2", "--steps", "4", folder=tmp_path)
    assert {line.split("|")[1].strip() for line in said.splitlines()[2:] if line.startswith("|")} == {
        "ssl", "clip", "rcnn", "detr"
    }  # fmt: skip
