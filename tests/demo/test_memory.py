# SPDX-License-Identifier: Apache-2.0
"""What the page does without: repeated lines of the log, pages of libraries."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ovd.demo.logs import RepeatFilter

ROOT = Path(__file__).parents[2]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_drop_library_pages__what_is_needed_is_read_again() -> None:
    run("""
import numpy as np, torch
from ovd.demo.memory import limit_heaps, drop_library_pages, trim_memory
limit_heaps()
def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssFile"))
before = resident()
assert drop_library_pages() > 50 and resident() < before / 2
trim_memory()
assert torch.linalg.svd(torch.eye(3))[1].tolist() == [1, 1, 1] and np.fft.fft(np.ones(4))[0] == 4
""")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_log__repeated_lines_are_dropped(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ovd.demo.logs.time.monotonic", lambda: now)
    caplog.handler.addFilter(RepeatFilter(every=60))
    log = logging.getLogger("strangers")
    for i in range(1000):
        log.warning("bad request %s", i)
    log.warning("something else")
    log.error("bad request %s", 1)
    for problem in (ValueError("a"), ValueError("b"), KeyError("c")):
        try:
            raise problem
        except Exception:
            log.exception("failed")
    assert lines(caplog) == ["bad request 0", "something else", "bad request 1", "failed", "failed"]
    now += 61
    log.warning("bad request %s", "again")
    assert lines(caplog)[-1] == "bad request again (999 more like this in 61 seconds)"
