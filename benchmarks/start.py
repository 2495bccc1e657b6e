# SPDX-License-Identifier: Apache-2.0
"""How long a person waits at the start: the first boxes of a new process, and the page until HTTP 200 and at rest.

    python benchmarks/start.py                                   # this environment
    python benchmarks/start.py --python EMPTY/bin/python         # that of an installed wheel, outside of the checkout

Every round starts new processes of one thread. On a crowded machine the processor's time says more than the clock: it
is what the clock shows where nothing else runs, or less where a start waits for the disk.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _common import PHOTO, ROOT, cpu_seconds, page_url

FIRST_BOXES = f"""
import time
start = time.perf_counter()
from ovd import Detector
detector = Detector.load("default", runtime="RUNTIME", threads=1)
assert len(detector.find({str(PHOTO)!r}, "dog, person"))
print(time.perf_counter() - start, time.process_time())
"""


def first_boxes(python: str, runtime: str) -> tuple[float, float]:
    """Seconds from the import to the first boxes by the clock, and of the processor from the process's start."""
    code = FIRST_BOXES.replace("RUNTIME", runtime)
    done = subprocess.run([python, "-c", code], cwd=place(python), capture_output=True, text=True, check=True)
    clock, processor = map(float, done.stdout.split()[-2:])
    return clock, processor


def page(python: str, rest: float) -> tuple[float, float, float, float, float]:
    """Seconds to HTTP 200 by the clock and of the processor; at rest MB of memory, before a question and after one of
    words and one for everything, and per cent of a core."""
    from gradio_client import Client, handle_file

    command = [python, "-m", "ovd.cli", "demo", "--port", "0", "--threads", "1"]
    start = time.perf_counter()
    server = subprocess.Popen(command, cwd=place(python), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = page_url(server)
        clock, processor = time.perf_counter() - start, cpu_seconds(server.pid)
        fresh = memory(server.pid)
        client = Client(url, verbose=False)
        for words in ("dog, person", "everything"):
            client.predict(handle_file(str(PHOTO)), words, None, api_name="/detect")
        time.sleep(10)
        before = cpu_seconds(server.pid)
        time.sleep(rest)
        return clock, processor, fresh, memory(server.pid), 100 * (cpu_seconds(server.pid) - before) / rest
    finally:
        server.terminate()
        server.wait(timeout=60)


def memory(process: int) -> float:
    """MB of a process (RSS)."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def place(python: str) -> str | Path:
    """Where a process starts: another environment's outside of the checkout, so that it imports its own files."""
    return ROOT if python == sys.executable else tempfile.gettempdir()


def summary(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    """Measure and print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--python", default=sys.executable, help="of the environment (default: this one)")
    flags.add_argument(
        "--runtime", choices=("auto", "onnx", "onnx-int8", "torch"), default="onnx", help="(default onnx)"
    )
    flags.add_argument("--rounds", type=int, default=5, help="(default 5)")
    flags.add_argument("--rest", type=float, default=20.0, help="seconds in which the page rests (default 20)")
    options = flags.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.python != sys.executable:
        os.environ.pop("PYTHONPATH", None)
    first_boxes(options.python, options.runtime)  # files are in memory from here on
    boxes = [first_boxes(options.python, options.runtime) for _ in range(options.rounds)]
    pages = [page(options.python, options.rest) for _ in range(options.rounds)]
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; median of {options.rounds} (least to most)")
    print("first boxes: clock", summary([b[0] for b in boxes]), "s; processor", summary([b[1] for b in boxes]), "s")
    names = ("page to HTTP 200, by the clock, s", "of the processor, s", "memory at the start, MB",
             "at rest after two requests, MB", "of a core, %")  # fmt: skip
    for what, values in zip(names, zip(*pages, strict=True), strict=True):
        print(f"{what}:", summary(values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
