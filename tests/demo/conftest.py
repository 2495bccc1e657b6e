# SPDX-License-Identifier: Apache-2.0
"""One server process and one browser for all tests of the page."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd.doctor import find_chromium
from tests.detector.fakes import picture

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


@dataclass
class Server:
    url: str
    folder: Path
    log: Path


def start(command: list[str], log: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server process and wait for the line with its URL."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    timer = threading.Timer(240, process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            timer.cancel()
            return process, "http://" + line.split("http://")[1].split()[0].rstrip("/")
    timer.cancel()
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    process, url = start([sys.executable, "-m", "tests.demo.serve", str(folder)], folder / "log.txt")
    yield Server(url, folder, folder / "log.txt")
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=list(FLAGS), timeout=120_000)
        yield chromium
        chromium.close()


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """Files to upload, good and bad."""
    Image.fromarray(picture()).save(tmp_path / "good.png")
    Image.fromarray(picture([("green", 10, 10, 90, 90)])).save(tmp_path / "green.png")
    (tmp_path / "vector.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200_000])
    (tmp_path / "huge.bmp").write_bytes(b"BM" + bytes(11_000_000))
    Image.new("1", (6000, 6000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (90, 66)).save(tmp_path / "defect.png")
    Image.new("RGB", (90, 68)).save(tmp_path / "slow.png")
    (tmp_path / "text.jpg").write_bytes(b"hello" * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    return {file.stem: file for file in tmp_path.iterdir()}
