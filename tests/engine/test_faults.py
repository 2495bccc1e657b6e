# SPDX-License-Identifier: Apache-2.0
"""Signals, non-finite steps, unreadable images, dead loader processes, disks that fill up."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.engine.checkpoint import newest
from pretrain.engine.errors import UserError
from pretrain.engine.faults import Signals, Stopped, explained, too_many_bad
from tests.engine.toy import Everything, Mean, Numbers, content, differences, lines, train

REPOSITORY = Path(__file__).resolve().parents[2]
DOUBLE = Numbers(dtype=torch.float64)


# --- signals


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal__finishes_the_step_and_saves(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    task = Everything()
    task.before = lambda call: os.kill(os.getpid(), signum) if call == 2 else None
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        train(task, tmp_path / "run", workers=1, save_every=100)
    assert isinstance(stopped.value, Stopped)
    assert stopped.value.code == status
    found = newest(tmp_path / "run" / "checkpoints", warn=print)
    assert found is not None and found.step == 3
    assert f"{signum.name}: saved step 3; continue with --resume" in (tmp_path / "run" / "train.log").read_text()
    assert signal.getsignal(signum) is before


def test_signal__in_the_last_step_ends_normally(tmp_path: Path) -> None:
    task = Everything()
    task.before = lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 7 else None
    assert train(task, tmp_path / "run").step == 8


COMMAND = """
import sys, time
from pathlib import Path
from pretrain.engine.errors import run_cli
from tests.engine.toy import Everything, Numbers, train
def main(argv):
    task = Everything()
    def slowly(call):
        print("in step", call, flush=True)
        time.sleep(float(argv[1]) if call else 0)
    task.before = slowly
    train(task, Path(argv[0]), Numbers(), steps=100000, workers=1, save_every=100000)
run_cli(main, sys.argv[1:])
"""


def started(out: Path, seconds: float) -> subprocess.Popen[str]:
    """A training in a process group of its own, in its second step."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(out), str(seconds)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("in step 1"):
            return process
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_signal__ctrl_c_also_to_loaders_saves(tmp_path: Path) -> None:
    process = started(tmp_path / "run", 0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    assert "Traceback" not in errors
    assert newest(tmp_path / "run" / "checkpoints", warn=print) is not None


def test_signal__second_one_exits_at_once(tmp_path: Path) -> None:
    process = started(tmp_path / "run", 1000)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert not (tmp_path / "run" / "checkpoints").exists()
    process.stdout.close(), process.stderr.close()


def test_signal__other_threads_leave_handlers_alone() -> None:
    import threading

    seen: list[bool] = []

    def body() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


# --- non-finite steps


class Poisoned(Everything):
    """NaN in the loss, infinity in the gradient, or only NaN in the batch norm statistics, in chosen steps."""

    def __init__(self, kind: str, steps: set[int]) -> None:
        super().__init__()
        self.kind, self.steps = kind, steps

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        if self.calls in self.steps and self.kind == "loss":
            batch = batch * float("nan")  # spoils batch norm's running statistics and the queue too
        bad = self.calls in self.steps
        loss, metrics = super().forward(batch)
        if bad and self.kind == "gradient":
            weight = self.net[0].weight
            loss = loss + (weight - weight.detach()).abs().sqrt().sum()  # 0, with an infinite slope
        return loss, metrics


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_non_finite__step_changes_no_state(tmp_path: Path, kind: str) -> None:
    train(Everything(), tmp_path / "clean", steps=5, save_every=2, keep=9)
    train(Poisoned(kind, {2, 3, 4}), tmp_path / "poisoned", steps=5)
    clean = content(tmp_path / "clean" / "checkpoints" / "step_2")
    poisoned = content(tmp_path / "poisoned" / "checkpoints" / "step_5")
    assert differences(clean["model"], poisoned["model"]) == []
    moments = [one["state"]["optimizer"]["state"] for one in (clean, poisoned)]
    assert differences(*moments) == []
    assert poisoned["state"]["skipped"] == 3
    events = lines(tmp_path / "poisoned" / "events.jsonl")
    assert [(e["event"], e["step"], e["in_a_row"]) for e in events] == [("non_finite", n, n - 2) for n in (3, 4, 5)]
    assert events[0]["processes"][0]["draws"] == [8, 9, 10, 11]


def test_non_finite__fourth_in_a_row_stops(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"step 6: loss nan, .*; samples \[\d+, .*\], draws \[20, 21, 22, 23\]: 4 consecutive non-finite steps",
    ):
        train(Poisoned("loss", {2, 3, 4, 5}), tmp_path / "run", save_every=2, steps=8)
    found = newest(tmp_path / "run" / "checkpoints", warn=print)
    assert found is not None
    assert all(t.isfinite().all() for t in content(found.folder)["model"].values())


def test_non_finite__good_steps_reset_the_count(tmp_path: Path) -> None:
    bad = {0, 1, 2, 4, 5, 6}
    assert train(Poisoned("loss", bad), tmp_path / "run").step == 8
    task = Poisoned("loss", {0, 1, 2, 3})
    task.before = lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 1 else None
    with pytest.raises(Stopped):
        train(task, tmp_path / "two")
    with pytest.raises(UserError, match="4 consecutive non-finite steps"):
        train(Poisoned("loss", {0, 1}), tmp_path / "two", resume=True)


def test_non_finite__metrics_leave_out_skipped_steps(tmp_path: Path) -> None:
    train(Poisoned("loss", {1}), tmp_path / "run", log_every=4)
    assert all(isinstance(line["loss"], float) for line in lines(tmp_path / "run" / "metrics.jsonl"))


def test_fp16__scale_overflow_is_no_fault(tmp_path: Path) -> None:
    class Large(Mean):
        def __init__(self) -> None:
            super().__init__()
            self.net.float()

        def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.net(batch).squeeze(1).float().mean() * 400, {}

    task = Large()
    train(task, tmp_path / "run", precision="fp16", steps=12)
    events = lines(tmp_path / "run" / "events.jsonl")
    assert len(events) > 3, "the default scale of 65536 has to come down several times"
    assert {event["event"] for event in events} == {"loss_scale_lowered"}
    assert all(p.isfinite().all() for p in task.parameters())


def test_check__reports_a_non_finite_loss(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss nan"):
        train(Poisoned("loss", {0}), tmp_path / "run", check=True)


# --- unreadable images


def test_bad_image__is_listed_once_over_a_resume(tmp_path: Path) -> None:
    source = Numbers(400, unreadable=(7, 300))
    options = {"batch_size": 100, "save_every": 100, "workers": 1, "steps": 8}
    task = Everything()
    task.before = lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 4 else None
    with pytest.raises(Stopped):
        train(task, tmp_path / "run", source, **options)
    train(Everything(), tmp_path / "run", source, resume=True, **options)
    listed = lines(tmp_path / "run" / "bad_images.jsonl")
    assert sorted(entry["index"] for entry in listed) == [7, 300]
    assert listed[0]["path"].startswith("images/")
    train(Everything(), tmp_path / "whole", source, **options)
    whole, pieces = (content(tmp_path / name / "checkpoints" / "step_8") for name in ("whole", "run"))
    assert differences(whole, pieces) == []
    assert whole["state"]["bad_draws"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image__more_than_1_percent_stop(tmp_path: Path, workers: int) -> None:
    source = Numbers(100, unreadable=tuple(range(0, 100, 10)))
    with pytest.raises(UserError, match=r"\d+ of \d+ images could not be read, more than 1 %; .*bad_images\.jsonl"):
        train(Everything(), tmp_path / "run", source, steps=50, workers=workers)
    assert lines(tmp_path / "run" / "bad_images.jsonl")


def test_bad_image__few_draws_are_tolerated() -> None:
    assert not too_many_bad(3, 4)
    assert not too_many_bad(10, 1000)
    assert not too_many_bad(100, 10_000)
    assert too_many_bad(4, 50)
    assert too_many_bad(20, 1000)
    assert too_many_bad(1100, 100_000)


def test_bad_image__no_readable_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 images in a row cannot be read, the last: images/"):
        train(Everything(), tmp_path / "run", Numbers(3, unreadable=(0, 1, 2)), workers=1)


# --- loader processes


def test_loader__killed_process_is_explained(tmp_path: Path) -> None:
    source = Numbers()
    source.before = lambda index, draw: os.kill(os.getpid(), signal.SIGKILL) if draw == 9 else None
    with pytest.raises(UserError, match=r"a data loading process died or hung .*/dev/shm.*lower loop\.workers"):
        train(Everything(), tmp_path / "run", source, workers=1)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "socket")]
)
def test_loader__death_during_transfer_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def die(self: Any) -> Any:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", die)
    with pytest.raises(UserError, match="a data loading process died or hung"):
        train(Everything(), tmp_path / "run", Numbers(), workers=1)


def test_source__defect_keeps_its_traceback(tmp_path: Path) -> None:
    source = Numbers()

    def fail(index: int, draw: int) -> None:
        raise RuntimeError("a bug, worker or not")

    source.before = fail
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug, worker or not"):
            train(Everything(), tmp_path / str(workers), source, workers=workers)


def test_out_of_memory__says_what_to_change(tmp_path: Path) -> None:
    task = Everything()

    def fail(call: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    task.before = fail
    with pytest.raises(UserError, match=r"out of memory on cpu: raise loop\.accumulate or lower loop\.batch_size"):
        train(task, tmp_path / "run")


# Which of them gloo says depends on what the kernel had already told when the next message was due.
@pytest.mark.parametrize(
    "text", ["Connection closed by peer [::1]:5", "Read error [::1]:5: Connection reset by peer", "writev: Broken pipe"]
)
def test_lost_process__is_told_from_whatever_gloo_says(text: str) -> None:
    error = explained(RuntimeError(text), step=2, device=torch.device("cpu"))
    assert isinstance(error, UserError) and "process 0 lost the others after step 2" in str(error)


# --- a full disk


def test_full_disk__ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    train(Everything(), tmp_path / "run", steps=8, save_every=8, log_every=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = Everything()
    task.before = lambda call: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1])) if call == 5 else None
    try:
        with pytest.raises(UserError, match="free some space"):
            train(task, tmp_path / "run", overwrite=True, steps=8, save_every=4, log_every=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = newest(tmp_path / "run" / "checkpoints", warn=print)
    assert found is not None and found.step == 4
    assert train(Everything(), tmp_path / "run", resume=True, steps=8, save_every=4, log_every=100).step == 8


def test_kill__resumes_to_the_same_end(tmp_path: Path) -> None:
    # One thread: a forked child has none of its parent's OpenMP threads, and would wait for them.
    source, more = Numbers(noisy=True), {"steps": 8, "save_every": 2, "threads": 1}
    train(Everything(), tmp_path / "whole", source, **more)
    pid = os.fork()
    if pid == 0:  # the child is the run that dies
        try:
            task = Everything()
            task.before = lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == 5 else None
            train(task, tmp_path / "killed", source, **more)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.WIFSIGNALED(done[1]) and os.WTERMSIG(done[1]) == signal.SIGKILL
    train(Everything(), tmp_path / "killed", source, **more, resume=True)
    whole, killed = (content(tmp_path / name / "checkpoints" / "step_8") for name in ("whole", "killed"))
    assert differences(whole, killed) == []
