# SPDX-License-Identifier: Apache-2.0
"""``make weights``: skips what is done, resumes what was begun, stops at a failure, keeps book."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_weights.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_weights", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_weights", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return module


def writer(text: str) -> list[str]:
    return ["-c", f"open('log.txt', 'a').write({text!r})"]


def test_stages_run_in_order_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [script.Stage(name=n, result=Path(f"runs/{n}/done"), commands=[writer(n)]) for n in ("a", "b")]
    monkeypatch.setattr(script, "stages", lambda: stages)
    assert script.main([]) == 0 and script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "ab"
    book = json.loads((tmp_path / "runs/weights.json").read_text())
    assert book["a"]["attempts"] == 1 and book["a"]["cpu_seconds"] > 0


def test_a_failure_stops_there_and_the_next_call_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = ["-c", "import os, sys; sys.exit(0 if os.path.exists('mended') else 7)"]
    stages = [
        script.Stage(name="a", result=Path("runs/a"), commands=[writer("a")]),
        script.Stage(name="b", result=Path("runs/b"), commands=[fails]),
        script.Stage(name="c", result=Path("runs/c"), commands=[writer("c")]),
    ]
    monkeypatch.setattr(script, "stages", lambda: stages)
    assert script.main([]) == 7
    assert "stage b ended with status 7" in capsys.readouterr().err
    (tmp_path / "mended").touch()
    assert script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "ac"
    assert json.loads((tmp_path / "runs/weights.json").read_text())["b"]["attempts"] == 2


def test_a_training_with_a_checkpoint_is_resumed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = ["-c", "import sys; open('log.txt', 'w').write(' '.join(sys.argv[1:]))"]
    stage = script.Stage(name="t", result=Path("runs/t/done"), commands=[show], run=Path("runs/t"))
    (tmp_path / "runs/t").mkdir(parents=True)
    monkeypatch.setattr(script, "stages", lambda: [stage])
    (tmp_path / "runs/t/last").write_text("step_5")
    assert script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "--resume"


def test_every_config_of_the_real_stages_exists(script: ModuleType) -> None:
    configs = SCRIPT.parents[1] / "configs"
    named = [c[c.index("--config") + 1] for stage in script.stages() for c in stage.commands if "--config" in c]
    assert named and all((configs / name).is_file() for name in named)
