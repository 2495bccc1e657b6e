# SPDX-License-Identifier: Apache-2.0
"""A detector in several processes: sent there, copied, or inherited by a fork."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ovd import Detector
from tests.detector.fakes import make_detector, picture

REPOSITORY = Path(__file__).resolve().parents[2]

# The parent has computed with two threads, and another of its threads holds the lock, when it forks.
FORK = """
import os, threading, torch
from ovd.locks import ComputeLock
torch.set_num_threads(2)
lock, held, pixels = ComputeLock(), threading.Event(), torch.rand(2, 64, 128, 128)
network = torch.nn.Conv2d(64, 64, 3)
compute = lambda: (network(pixels).sum(), torch.sort(pixels.flatten()))
compute()
def hold():
    with lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
if (child := os.fork()) == 0:
    with lock, lock:
        compute()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def test_lock__forked_child_gets_a_new_one() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "7", done.stderr


def sent(value: Any) -> Any:
    """What another process gets."""
    here, there = multiprocessing.Pipe()
    sender = threading.Thread(target=here.send, args=(value,))
    sender.start()
    received = there.recv()
    sender.join()
    return received


def test_lock__detector_and_regions_can_be_pickled() -> None:
    detector = make_detector()
    regions = detector.embed(picture())
    expected = regions.classify("red, blue")
    for other in (copy.deepcopy(detector), sent(detector)):
        assert isinstance(other, Detector)
        found = other.find(picture(), "red, blue")
        assert found.class_name == expected.class_name and np.array_equal(found.xyxy, expected.xyxy)
    assert sent(regions).classify("red, blue").class_name == expected.class_name
