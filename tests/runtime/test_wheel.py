# SPDX-License-Identifier: Apache-2.0
"""The wheel in an empty environment, outside of the checkout. ``.ci/run`` runs it as a step of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ovd.detector import Detector
from tests.runtime.conftest import PHOTOS

ROOT = Path(__file__).resolve().parents[2]
WORDS = "chicken, dog, mug: cup, furniture"
INSTALL = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")


def run(*command: str | Path, where: Path, **more: str) -> str:
    """Run a command with nothing of this checkout or its environment in sight."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OVD_", "WORDBOX_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=where, env=env | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel__detects_the_same_boxes_as_the_checkout(by_torch: Detector, tmp_path: Path) -> None:
    run(sys.executable, ROOT / "scripts/build_wheel.py", "--out", tmp_path / "dist", where=ROOT, PYTHONPATH=str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("wordbox-*.whl")
    assert wheel.stat().st_size <= 95_000_000
    run(sys.executable, "-m", "venv", tmp_path / "empty", where=tmp_path)
    python, wordbox = tmp_path / "empty/bin/python", tmp_path / "empty/bin/wordbox"
    run(python, *INSTALL, wheel, where=tmp_path)
    missing = (
        "import importlib.util as u; print(*[m for m in ('torch', 'detectron2', 'torchvision') if u.find_spec(m)])"
    )
    assert run(python, "-c", missing, where=tmp_path).strip() == ""
    for photo in PHOTOS[:3]:
        out = tmp_path / photo.stem
        run(wordbox, "predict", photo, "--classes", WORDS, "--out", out, where=tmp_path)
        rows, found = json.loads((out / "results.json").read_text()), by_torch.find(photo, WORDS)
        assert [found.names[row["category_id"] - 1] for row in rows] == found.class_name
        corners = np.array([row["bbox"] for row in rows]).reshape(-1, 4) @ np.array(
            [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        np.testing.assert_allclose(corners, found.xyxy, atol=0.5)
        np.testing.assert_allclose([row["score"] for row in rows], found.confidence, atol=0.005)
    small = tmp_path / "small"
    run(wordbox, "predict", PHOTOS[0], "--classes", WORDS, "--runtime", "onnx-int8", "--out", small, where=tmp_path)
    assert json.loads((small / "results.json").read_text())
    home = tmp_path / "home"
    run(wordbox, "weights", "add", ROOT / "weights/vild-sticker", "mine", where=tmp_path, WORDBOX_HOME=str(home))
    assert (home / "weights/mine/model.safetensors").is_file()
    listed = run(wordbox, "weights", "list", where=tmp_path, WORDBOX_HOME=str(home))
    assert "vild-photo (default)" in listed and "mine" in listed
