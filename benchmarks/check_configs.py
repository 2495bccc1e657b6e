# SPDX-License-Identifier: Apache-2.0
"""What ``--check`` of every shipped configuration takes: seconds of CPU and of the clock, memory, and what it leaves.

Each runs as a command of its own in an empty folder, with one thread. What an earlier stage makes is stood in for as in
``tests/commands/test_shipped_configs.py``; ``--data FOLDER`` (the folder ``data`` of a checkout that has photos) is
linked into the empty folder, so that the configurations of photos find theirs. Those that lack something must say so in
one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import ROOT, parser, report

LIMIT = 60.0  # seconds of CPU


def check(module: str, config: str, overrides: list[str], data: Path | None) -> tuple[int, float, float, float, str]:
    """Status, seconds of CPU and of the clock, GB of memory, and the last line or what was left behind."""
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        if data is not None:
            (Path(folder) / "data").symlink_to(data.resolve(), target_is_directory=True)
        before = {path.name for path in Path(folder).iterdir()}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        start = time.monotonic()
        with (Path(folder).parent / f"{Path(folder).name}.txt").open("w+", encoding="utf-8") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", config, *overrides, "--check"],
                cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.monotonic() - start
            printed.seek(0)
            lines = printed.read().splitlines() or [""]
        Path(printed.name).unlink()
        left = sorted({path.name for path in Path(folder).iterdir()} - before)
        last = f"LEFT {left}" if left else lines[-1]
        return process.returncode, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1e6, last


def main() -> None:
    """Run all, or those whose name holds a given text."""
    flags = parser(__doc__ or "")
    flags.add_argument("--data", type=Path, default=None, metavar="FOLDER", help="stands in the place of data/")
    flags.add_argument("--only", default="", metavar="TEXT", help="configurations whose name holds this")
    options = flags.parse_args()
    from tests.commands.test_shipped_configs import CONFIGS, MODULES, STAND_INS

    rows, figures = [], {}
    for config in CONFIGS:
        if options.only in config:
            status, cpu, wall, memory, last = check(MODULES[config], config, STAND_INS.get(config, []), options.data)
            figures[config] = {"status": status, "cpu": cpu, "wall": wall, "GB": memory, "last": last}
            row = f"{status}, {cpu:.1f} s of CPU, {wall:.1f} s, {memory:.2f} GB: {last[:110]}"
            rows.append((config, row, f"below {LIMIT:.0f} s of CPU"))
            print(f"{config:32} {row}", flush=True)
    report("--check of every configuration", rows, figures, options.json)


if __name__ == "__main__":
    main()
