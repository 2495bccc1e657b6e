# SPDX-License-Identifier: Apache-2.0
"""The training loop: what it writes and prints, that resuming is exact, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pretrain.engine.checkpoint import load_weights
from pretrain.engine.distributed import seed_everything
from pretrain.engine.errors import UserError
from pretrain.engine.log import RunLog, format_duration, rewind
from pretrain.engine.loop import Stopped, with_counts
from pretrain.engine.sampling import Microbatches
from pretrain.engine.task import Task
from tests.engine.toy import Everything, Mean, Numbers, content, differences, lines, train

DOUBLE = Numbers(dtype=torch.float64)


def stop_in_step(task: Everything, step: int, accumulate: int = 1) -> Everything:
    def hit(call: int) -> None:
        if call == step * accumulate:
            os.kill(os.getpid(), signal.SIGTERM)

    task.before = hit
    return task


# --- what a run leaves behind


def test_run_folder__has_every_documented_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = train(Everything(), tmp_path / "run", steps=8, log_every=3, save_every=4)
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()} - {"tensorboard", ".lock"}
    assert names == {"config.yaml", "env.json", "metrics.jsonl", "train.log", "checkpoints", "last"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_4", "step_8"}
    assert yaml.safe_load((run / "config.yaml").read_text())["loop"]["steps"] == 8
    assert json.loads((run / "env.json").read_text())["torch"] == torch.__version__
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [3, 6, 8]
    keys = {"step", "loss", "lr", "grad_norm", "noise", "spread", "data_time", "step_time", "per_second", "eta"}
    assert all(line.keys() == keys for line in metrics)
    assert report.step == 8
    assert report.metrics["loss"] == metrics[-1]["loss"]
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed
    assert re.search(r"^step 3/8  loss [\d.]+  .*data [\d.]+ s  step [\d.]+ s  [\d.]+/s  eta 0:00:\d\d$", printed, re.M)


def test_log__loss_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    train(Mean(), tmp_path / "every", DOUBLE, steps=4, log_every=1)
    train(Mean(), tmp_path / "fourth", DOUBLE, steps=4, log_every=4)
    every = [line["loss"] for line in lines(tmp_path / "every" / "metrics.jsonl")]
    (fourth,) = lines(tmp_path / "fourth" / "metrics.jsonl")
    assert fourth["loss"] == pytest.approx(sum(every) / 4)


def test_log__terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = RunLog(out=tmp_path, total=10, start=0, speak=True)
    log.advance(5)
    log.info("hello")
    log.advance(10)
    log.close()
    seen = capfd.readouterr()
    assert "hello" in seen.out
    assert "10/10" in seen.err and "step" in seen.err
    assert (tmp_path / "train.log").read_text().endswith("  hello\n")


def test_log__does_not_need_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else original(name))
    train(Mean(), tmp_path / "run", DOUBLE)
    assert lines(tmp_path / "run" / "metrics.jsonl")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_log__torn_and_future_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n{"st')
    assert rewind(path, step=2) == '{"step": 2}'
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_format_duration__hours_minutes_seconds() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3661, 360000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]


class Sometimes(Mean):
    """Has a metric in every third forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        self.calls += 1
        loss, _ = super().forward(batch)
        return loss, {"always": 1.0} | ({"rare": float(self.calls)} if self.calls % 3 == 0 else {})


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [3.0, 7.5]), (2, [6.0, 15.0])])
def test_log__sparse_metric_is_averaged_over_its_steps(tmp_path: Path, accumulate: int, expected: list[float]) -> None:
    source = Numbers(dtype=torch.float64)
    train(Sometimes(), tmp_path, source, steps=10, log_every=5, accumulate=accumulate)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["rare"] for row in rows] == expected
    assert [row["always"] for row in rows] == [1.0, 1.0]


def test_log__missing_metric_is_left_out(tmp_path: Path) -> None:
    train(Sometimes(), tmp_path, Numbers(dtype=torch.float64), steps=4, log_every=2)
    assert ["rare" in row for row in lines(tmp_path / "metrics.jsonl")] == [False, True]


def test_log__older_checkpoints_window_is_read() -> None:
    old = {"loss": 6.0, "data_time": 8.0, "steps": 4.0, "good": 3.0}
    expected = {"loss": 6.0, "loss steps": 3.0, "data_time": 8.0, "data_time steps": 4.0}
    assert with_counts(old) == expected == with_counts(expected)


# --- exact resume


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": 1},
        {"accumulate": 2},
        {"precision": "bf16", "name": "sgd"},
        {"precision": "fp16"},
        {"name": "lars", "schedule": "step", "milestones": (3, 6), "clip_norm": 0.1},
    ],
    ids=["adamw", "worker", "accumulate", "bf16-sgd", "fp16", "lars-step-clip"],
)
@pytest.mark.parametrize("at", [0, 4])
def test_resume__is_bit_exact(tmp_path: Path, options: dict[str, Any], at: int) -> None:
    source = Numbers(noisy=True)
    train(Everything(), tmp_path / "whole", source, save_every=50, log_every=2, **options)
    task = stop_in_step(Everything(), at, options.get("accumulate", 1))
    with pytest.raises(Stopped) as stopped:
        train(task, tmp_path / "pieces", source, save_every=50, log_every=2, **options)
    assert (stopped.value.code, stopped.value.step) == (143, at + 1)
    seed_everything(12345)  # whatever happened in between
    torch.rand(17)
    train(Everything(), tmp_path / "pieces", source, save_every=50, log_every=2, resume=True, **options)
    whole, pieces = (content(tmp_path / name / "checkpoints" / "step_8") for name in ("whole", "pieces"))
    assert differences(whole, pieces) == []
    assert float(whole["model"]["queue"].abs().sum()) > 0
    measured = ("data_time", "step_time", "per_second", "eta")
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "pieces"))
    assert [{k: v for k, v in x.items() if k not in measured} for x in a] == [
        {k: v for k, v in x.items() if k not in measured} for x in b
    ]


def test_resume__comparison_detects_a_forgotten_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Numbers()
    train(Everything(), tmp_path / "whole", source)
    with pytest.raises(Stopped):
        train(stop_in_step(Everything(), 4), tmp_path / "pieces", source)
    monkeypatch.setattr("pretrain.engine.distributed.set_rng_state", lambda state: None)
    train(Everything(), tmp_path / "pieces", source, resume=True)
    whole, pieces = (content(tmp_path / name / "checkpoints" / "step_8") for name in ("whole", "pieces"))
    assert differences(whole, pieces)


def test_training__does_not_depend_on_workers_or_logging(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "a", Numbers(noisy=True), workers=0, log_every=1, save_every=1)
    train(Everything(), tmp_path / "b", Numbers(noisy=True), workers=1, log_every=7, save_every=3)
    a, b = (content(tmp_path / name / "checkpoints" / "step_8") for name in ("a", "b"))
    assert differences(a, b) == []


def test_resume__skips_a_damaged_checkpoint_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Everything(), tmp_path / "run")
    expected = content(tmp_path / "run" / "checkpoints" / "step_8")
    (tmp_path / "run" / "checkpoints" / "step_8" / "state.pt").write_bytes(b"")
    train(Everything(), tmp_path / "run", resume=True)
    printed = capsys.readouterr().out
    assert re.search(r"warning: .*step_8/state\.pt: is torn \(0 of \d+ bytes\); trying the checkpoint before", printed)
    assert "after step 4" in printed
    assert differences(content(tmp_path / "run" / "checkpoints" / "step_8"), expected) == []


def test_resume__of_a_finished_run_reports_its_metrics(tmp_path: Path) -> None:
    first = train(Everything(), tmp_path / "run")
    stamp = (tmp_path / "run/checkpoints/step_8/meta.json").stat().st_mtime_ns
    again = train(Everything(), tmp_path / "run", resume=True)
    assert (again.step, again.metrics["loss"]) == (8, first.metrics["loss"])
    assert (tmp_path / "run/checkpoints/step_8/meta.json").stat().st_mtime_ns == stamp


def test_resume__without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert train(Mean(), tmp_path / "new", DOUBLE, resume=True).step == 8
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "train.log").write_text("killed early\n")
    assert train(Mean(), tmp_path / "begun", DOUBLE, resume=True).step == 8


def test_untracked__is_neither_saved_nor_required(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stop_in_step(Everything(), 2), tmp_path / "run")
    weights, _ = load_weights(tmp_path / "run" / "last" / "model.safetensors")
    assert not [name for name in weights if name.startswith("teacher.")]
    task = Everything()
    teacher = task.teacher.weight.clone()
    train(task, tmp_path / "run", resume=True)
    assert torch.equal(task.teacher.weight, teacher)


# --- refusals


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_folder__used_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give --resume to continue, --overwrite to begin again"):
        train(Mean(), tmp_path, DOUBLE)
    assert tree(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(UserError, match="is a file"):
        train(Mean(), tmp_path / "notes.txt", DOUBLE)
    with pytest.raises(UserError, match="contradict"):
        train(Mean(), tmp_path, DOUBLE, resume=True, overwrite=True)


def test_overwrite__removes_the_old_run_only(tmp_path: Path) -> None:
    train(Mean(), tmp_path, DOUBLE, steps=8)
    (tmp_path / "notes.txt").write_text("mine")
    train(Mean(), tmp_path, DOUBLE, steps=2, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [2]


def test_resume__changed_training_keys_are_named(tmp_path: Path) -> None:
    train(Mean(), tmp_path / "run", DOUBLE)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"the config has changed in loop\.batch_size, optim\.lr; .*config\.yaml"):
        train(Mean(), tmp_path / "run", DOUBLE, resume=True, batch_size=2, lr=0.5)
    assert tree(tmp_path) == before
    free = {"workers": 1, "log_every": 1, "save_every": 2, "keep": 1}
    assert train(Mean(), tmp_path / "run", DOUBLE, resume=True, **free).step == 8


def test_resume__another_model_is_refused(tmp_path: Path) -> None:
    train(Mean(), tmp_path / "run", DOUBLE)
    with pytest.raises(UserError, match="does not fit this model"):
        train(Everything(), tmp_path / "run", resume=True)


def test_resume__other_samples_or_frozen_weights_are_refused(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "run")
    with pytest.raises(UserError, match=r"the samples have changed \(50 at the start, 51 now\)"):
        train(Everything(), tmp_path / "run", Numbers(51), resume=True)
    changed = Everything()
    with torch.no_grad():
        changed.teacher.weight += 1
    with pytest.raises(UserError, match="the frozen weights have changed"):
        train(changed, tmp_path / "run", resume=True)
    assert train(Everything(), tmp_path / "run", resume=True).step == 8


def test_source__empty_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        train(Mean(), tmp_path / "run", Numbers(0))
    assert not (tmp_path / "run").exists()


def test_check__makes_one_step_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    source = Numbers()
    source.before = lambda index, draw: calls.append(draw)
    task = Everything()
    before = task.net[0].weight.clone()
    report = train(task, tmp_path / "run", source, check=True)
    assert report.step == 1
    assert calls == list(range(8)), "two batches of 4"
    assert not torch.equal(task.net[0].weight, before)
    assert list(tmp_path.iterdir()) == []
    assert "check: two batches and one step, loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "taken"),
    [(40, 1, 5), (40, 2, 5), (12, 6, 4), (4, 2, 4), (5, 1, 5)],  # passes of 2 stay what they are, of 20 and 40 shrink
)
def test_check__takes_few_samples_of_a_large_batch_without_a_gpu_and_says_so(
    batch_size: int, accumulate: int, taken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    source = Numbers(100)
    source.before = lambda index, draw: calls.append(draw)
    task = Everything()
    task.check_samples = 5
    train(task, tmp_path / "run", source, check=True, batch_size=batch_size, accumulate=accumulate)
    assert calls == list(range(2 * taken))
    said = f"; checked with {taken} of {batch_size} samples (no GPU here)" if taken < batch_size else ""
    assert capsys.readouterr().out.rstrip().endswith(f"nothing was written{said}")


def test_check__a_batch_that_does_not_divide_is_refused_as_in_a_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"40 is not divisible by accumulate × processes = 1 × 3"):
        Microbatches(Numbers(), seed=0, batch_size=40, accumulate=1, rank=0, world_size=3)
    data = Microbatches(Numbers(), seed=0, batch_size=48, accumulate=2, rank=1, world_size=3)
    assert data.shrink(10) == 9 and data.draws(1) == [12, 13, 14]  # three each, the middle ones of the second batch


# --- the step


def test_accumulate__equals_the_large_batch(tmp_path: Path) -> None:
    options = {"name": "sgd", "batch_size": 12, "steps": 3}
    for parts in (1, 3):
        train(Mean(), tmp_path / str(parts), DOUBLE, accumulate=parts, **options)
    one, three = (load_weights(tmp_path / name / "last/model.safetensors")[0] for name in ("1", "3"))
    for key in one:
        torch.testing.assert_close(one[key], three[key], rtol=1e-12, atol=1e-14)


def test_clip_norm__bounds_the_update(tmp_path: Path) -> None:
    task = Mean()
    before = torch.cat([p.detach().flatten() for p in task.parameters()])
    options = {"name": "sgd", "momentum": 0.0, "lr": 0.5, "warmup_steps": 0, "schedule": "constant", "steps": 1}
    train(task, tmp_path / "run", DOUBLE, clip_norm=1e-3, log_every=1, **options)
    moved = float((torch.cat([p.detach().flatten() for p in task.parameters()]) - before).norm())
    assert moved == pytest.approx(0.5 * 1e-3, rel=1e-6)
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["grad_norm"] > 1e-3, "the norm before clipping is logged"


def test_after_step__runs_once_per_update(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool]] = []

    class Hooked(Mean):
        def after_step(self, step: int, total: int) -> None:
            changed = not torch.equal(self.net[0].weight, self.last)
            seen.append((step, total, changed))
            self.last = self.net[0].weight.clone()

    task = Hooked()
    task.last = task.net[0].weight.clone()
    train(task, tmp_path / "run", DOUBLE, steps=3, accumulate=2)
    assert seen == [(0, 3, True), (1, 3, True), (2, 3, True)]


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision__applies_to_matrix_products(tmp_path: Path, precision: str, expected: torch.dtype) -> None:
    seen = []

    class Product(Task):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            out = self.layer(batch)
            seen.append(out.dtype)
            return out.float().pow(2).mean(), {}

    train(Product(), tmp_path / "run", precision=precision, steps=1)
    train(Product(), tmp_path / "checked", precision=precision, check=True)  # fp16 takes a CPU minutes
    assert seen == [expected, torch.float32 if precision == "fp16" else expected]
    assert load_weights(tmp_path / "run/last/model.safetensors")[0]["layer.weight"].dtype == torch.float32


def test_log__estimates_duration_and_disk(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "run", steps=12, save_every=100)
    log = (tmp_path / "run" / "train.log").read_text()
    said = re.search(
        r"about 0:00:0\d for 7 more steps, evaluations apart; checkpoints need (\S+) GiB in .*run, \S+ GiB", log
    )
    assert said is not None and log.index("about") < log.index("step 6/12")
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step_12").iterdir())
    assert float(said[1]) * 2**30 < 3 * 2 * size, "what a checkpoint is, thrice"


def test_milestones__after_the_last_step_are_reported(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "run", steps=4, schedule="step", milestones=(3, 4, 9), warmup_steps=0)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: optim.milestones [4, 9]: not before the last step (4), so without effect" in log
