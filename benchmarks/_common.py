# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: the machine, fair comparison of alternatives, a table and a JSON file.

A figure means little on another machine, and not much on a busy one. So alternatives are timed in turns within one run,
and what is compared is the ratio of their times in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "ovd/demo/examples/photos/dogs.jpg"
if str(ROOT) not in sys.path:  # `python benchmarks/bench_x.py` puts only benchmarks/ there
    sys.path.insert(0, str(ROOT))


def parser(doc: str, *, weights: bool = False) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if weights:
        flags.add_argument(
            "--weights", default="default", help="name of shipped weights, or a folder (default: default)"
        )
    flags.add_argument("--rounds", type=int, default=None, help="turns per alternative; more is steadier")
    flags.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    flags.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all figures to FILE too")
    return flags


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        usable = os.cpu_count() or 1
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }


def set_threads(count: int | None) -> None:
    """Limit torch to ``count`` threads; None leaves it."""
    if count is not None:
        import torch

        torch.set_num_threads(max(1, count))


def photo() -> np.ndarray:
    """The shipped photo of dogs, as (480, 640, 3) pixels."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(PHOTO).convert("RGB").resize((640, 480)))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call by the clock, and of the processor (of all threads together)."""
    start, worked = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - worked)


def take_turns(
    alternatives: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each alternative in each round; every second round runs in reverse order."""
    for _ in range(warmup):
        for run in alternatives.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds):
        names = list(alternatives)
        for name in names if turn % 2 == 0 else reversed(names):
            start = time.perf_counter()
            alternatives[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours."""
    import numpy as np

    return float(np.quantile(values, share))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of times taken in the same round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {
        "median": statistics.median(ratios),
        "low": percentile(ratios, 0.25),
        "high": percentile(ratios, 0.75),
        "rounds": float(len(ratios)),
    }


def show_ratio(value: Mapping[str, float]) -> str:
    """``1.23 (1.20 to 1.27)``: median and quartiles."""
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p95 of times in milliseconds."""
    return {
        "p50_ms": 1e3 * percentile(seconds, 0.5),
        "p95_ms": 1e3 * percentile(seconds, 0.95),
        "n": float(len(seconds)),
    }


def report(title: str, rows: Sequence[tuple[str, str, str]], figures: Mapping[str, Any], target: Path | None) -> None:
    """Print the machine and one table (what, figure, aim); write everything to ``target``."""
    host = machine()
    print(f"\n{title}")
    print(
        f"{host['cpu']}, {host['usable_cores']} of {host['cores']} cores, {host['threads']} threads, "
        f"load {host['load']}, torch {host['torch']}, commit {host['commit']}, {host['date']}"
    )
    print(f"$ {host['command']}\n")
    first = max((len(row[0]) for row in rows), default=0)
    second = max((len(row[1]) for row in rows), default=0)
    for what, figure, aim in rows:
        print(f"{what:<{first}}  {figure:>{second}}  {aim}".rstrip())
    if isinstance(host["load"], float) and host["load"] > 0.75 * host["usable_cores"] + 1:
        print("\nwarning: the machine is busy with something else; believe the ratios, not the times")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"title": title, "machine": host, **figures}, indent=1) + "\n", encoding="utf-8")


def page_url(page: subprocess.Popen[str]) -> str:
    """The address of a page that was started, once it has answered with HTTP 200."""
    assert page.stdout is not None
    printed = []
    for line in page.stdout:
        printed.append(line)
        if found := re.search(r"http://[\w.:\[\]]+/?", line):
            with urllib.request.urlopen(found.group(), timeout=60) as answer:
                if answer.status == 200:
                    return found.group()
    raise SystemExit("error: the page did not start:\n" + "".join(printed))


def cpu_seconds(process: int) -> float:
    """Seconds of the processor that a process took so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pictures(size: int | tuple[int, int], count: int) -> list[np.ndarray]:
    """Validation scenes of Sticker Scenes, (H, W) or the side of a square."""
    from pretrain.data.scenes import SceneSource
    from pretrain.data.stickers import Stickers

    source = SceneSource(Stickers.load(), split="val", seed=0, size=size, length=count)
    return [source.scene(i).image for i in range(count)]


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
