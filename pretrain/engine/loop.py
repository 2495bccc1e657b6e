# SPDX-License-Identifier: Apache-2.0
"""The one training loop: any task, any sample source, one process or many, exactly resumable.

A *task* is an ``nn.Module`` with ``forward(batch) -> (loss, metrics)``. What it must carry from step to step (queues, EMA
copies, pointers) are its buffers and submodules. It may also have

* ``after_step(step, total)``: called after each optimiser step that changed weights (EMA, temperature clamp);
* ``param_groups(optim) -> list[dict]``: see ``pretrain.engine.optim``;
* ``untracked: tuple[str, ...]``: prefixes of state that checkpoints leave out, because the caller rebuilds it (a frozen
  teacher);
* ``find_unused_parameters: bool``: for DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.engine import checkpoint, distributed
from pretrain.engine.config import LoopConfig, OptimConfig, changed_keys
from pretrain.engine.errors import UserError
from pretrain.engine.log import RunLog
from pretrain.engine.optim import build_optimizer, clip_gradients, gradient_norm, set_lr
from pretrain.engine.sampling import Fetched, Microbatches, Source, batches, derive_seed

MAX_SKIPPED = 3  # non-finite steps in a row that are skipped; the next one stops the run
BAD_IMAGES_ALLOWED = 0.01  # of the draws so far
RUN_FILES = (
    "config.yaml", "env.json", "metrics.jsonl", "train.log", "events.jsonl", "bad_images.jsonl", "checkpoints",
    "tensorboard", "last",
)  # fmt: skip


class FitReport(NamedTuple):
    """What ``fit`` did: finished steps, the last logged metrics, the run folder."""

    step: int
    metrics: dict[str, float]
    out: Path


class Stopped(SystemExit):
    """The run was asked to stop and has saved. The exit status is 143 after SIGTERM, 130 after SIGINT."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(128 + signum)
        self.step = step


def fit(
    task: nn.Module,
    source: Source,
    *,
    loop: LoopConfig,
    optim: OptimConfig,
    out: Path,
    record: dict[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    check: bool = False,
) -> FitReport:
    """Train ``task`` for ``loop.steps`` steps.

    Args:
        task: The module to train, in any state; it is moved to the device.
        source: Where samples come from.
        loop: How long, how large, how often.
        optim: Optimiser and schedule.
        out: Run folder.
        record: The whole configuration as plain values; written down, and compared on resume.
        resume: Continue from the newest good checkpoint in ``out``; begin if there is none.
        overwrite: Delete an earlier run in ``out`` first.
        check: Only load two batches and make one step; write nothing.

    Returns:
        Steps, last metrics and folder.

    Raises:
        UserError: For anything the user can mend: folder in use, changed config, unreadable data, non-finite loss.
        Stopped: After SIGTERM or SIGINT; the run has saved and can be resumed.
    """
    joined = distributed.setup()
    try:
        if loop.threads is not None:
            torch.set_num_threads(loop.threads)
        notes: list[str] = []
        found = None if check else find_start(out, record, resume=resume, overwrite=overwrite, warn=notes.append)
        run = _Run(task, source, loop=loop, optim=optim, out=out, record=record, check=check)
        with _Signals() as signals:
            try:
                run.begin(found, notes, overwrite=overwrite)
                return run.train(signals)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                raise _explained(error, run) from error
            finally:
                run.log.close()
    finally:
        if joined:
            distributed.teardown()


class _Run:
    """The state of one run. Read ``train`` first."""

    def __init__(
        self, task: nn.Module, source: Source, *, loop: LoopConfig, optim: OptimConfig, out: Path,
        record: dict[str, Any], check: bool,
    ) -> None:  # fmt: skip
        self.loop, self.optim, self.out, self.check = loop, optim, out, check
        self.record = json.loads(json.dumps(record, default=str))
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.device = distributed.pick_device(loop.device)
        self.data = Microbatches(
            source, seed=loop.seed, batch_size=loop.batch_size, accumulate=loop.accumulate, rank=self.rank,
            world_size=self.world,
        )  # fmt: skip
        self.task = task.to(self.device).train()
        self.model: nn.Module = self.task
        self.untracked = tuple(getattr(task, "untracked", ()))
        self.optimizer = build_optimizer(self.task, optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=loop.precision == "fp16")
        self.buffers = [b for name, b in task.named_buffers() if not name.startswith(self.untracked)]
        self.buffers_before = [torch.empty_like(b) for b in self.buffers]
        self.step = 0  # finished steps
        self.skipped = 0  # non-finite steps in a row
        self.bad_draws = 0  # replaced images, over all processes
        self.window: dict[str, float] = {}  # sums since the last log line
        self.listed: set[int] = set()  # indices in bad_images.jsonl
        self.metrics: dict[str, float] = {}  # of the last log line
        self.log = RunLog(out=None, total=loop.steps, start=0, speak=False)

    def begin(self, found: checkpoint.Checkpoint | None, notes: list[str], *, overwrite: bool) -> None:
        """Load the checkpoint, if any; open the folder and the log; wrap the model."""
        distributed.seed_everything(derive_seed(self.loop.seed, self.rank))
        own: dict[str, Any] | None = None
        if found is not None:
            model, state = checkpoint.load_state(found)
            _load_model(self.task, model, self.untracked, found.folder)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.skipped, self.bad_draws = state["step"], state["skipped"], state["bad_draws"]
            own = state["ranks"][self.rank] if len(state["ranks"]) == self.world else None
            self.window = own["window"] if own else {}
        distributed.barrier()  # all have read before one writes
        if self.rank == 0 and not self.check:
            _prepare_folder(self.out, self.record, device=self.device, overwrite=overwrite)
            self.listed = _listed_images(self.out / "bad_images.jsonl")
        self.log = RunLog(
            out=None if self.check else self.out, total=self.loop.steps, start=self.step, speak=self.rank == 0
        )
        for note in notes:
            self.log.warn(note)
        if found is not None:
            self.log.say(f"resuming {self.out} after step {self.step}")
            if own is None:
                self.log.warn("the checkpoint is of another number of processes; the model draws other random numbers")
        if self.world > 1:
            self.model = DistributedDataParallel(
                self.task,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=bool(getattr(self.task, "find_unused_parameters", False)),
            )
        if own is not None:
            distributed.set_rng_state(own["rng"])  # last: nothing may draw between this and the first step

    def train(self, signals: _Signals) -> FitReport:
        """Run until the last step, a signal or an error."""
        accumulate = self.loop.accumulate
        last = 2 if self.check else self.loop.steps
        feed = batches(
            self.data, first=self.step * accumulate, last=last * accumulate, workers=self.loop.workers,
            pin=self.device.type == "cuda",
        )  # fmt: skip
        while self.step < last:
            begun = time.perf_counter()
            parts = self._load(feed)
            loaded = time.perf_counter()
            values, norm = self._forward_backward(parts)
            bad_loss, bad_images, asked = self._agree(values, parts, signals)
            good = self._update(values, norm, bad_loss=bad_loss)
            self.step += 1
            self._tally(values if good else {}, data_time=loaded - begun, step_time=time.perf_counter() - loaded)
            if not good:
                self._skip(values, parts)
            if bad_images:
                self._list_bad_images(parts)
            if self.check:
                self._load(feed)
                self.log.say(f"check: two batches and one step, loss {values['loss']:.4g}; nothing was written")
                return FitReport(self.step, values, self.out)
            self.log.advance(self.step)
            if self.step % self.loop.log_every == 0 or self.step == last:
                self._report()
            if self.step % self.loop.save_every == 0 or self.step == last or asked:
                self._save()
            if asked and self.step < last:
                self.log.say(f"{signal.Signals(asked).name}: saved step {self.step}; continue with --resume")
                raise Stopped(asked, self.step)
        return FitReport(self.step, self.metrics, self.out)

    def _load(self, feed: Iterator[Fetched]) -> list[Fetched]:
        parts = [next(feed) for _ in range(self.loop.accumulate)]
        for part in parts:
            if part.error is not None:
                raise UserError(part.error)
        return parts

    def _forward_backward(self, parts: list[Fetched]) -> tuple[dict[str, float], Tensor]:
        """Accumulate the gradient of the mean over all parts; returns this process's metrics and the gradient's norm."""
        for old, buffer in zip(self.buffers_before, self.buffers, strict=True):
            old.copy_(buffer)
        lr = set_lr(self.optimizer, self.step, self.optim, total=self.loop.steps)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Any] = {}
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.loop.precision]
        for number, part in enumerate(parts):
            with contextlib.ExitStack() as stack:
                if isinstance(self.model, DistributedDataParallel) and number < len(parts) - 1:
                    stack.enter_context(self.model.no_sync())  # processes exchange gradients once per step
                with torch.autocast(self.device.type, precision, enabled=self.loop.precision != "fp32"):
                    loss, metrics = self.model(_to_device(part.batch, self.device))
                self.scaler.scale(loss / len(parts)).backward()
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value) / len(parts)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.optimizer)
        return {**{name: float(value) for name, value in sums.items()}, "lr": lr, "grad_norm": float(norm)}, norm

    def _agree(self, values: dict[str, float], parts: list[Fetched], signals: _Signals) -> tuple[bool, int, int]:
        """What all processes must know before the update: a bad loss anywhere, new bad images, a signal."""
        asked = signals.asked
        flags = [
            float(not math.isfinite(values["loss"])), float(sum(len(part.bad) for part in parts)),
            float(asked == signal.SIGTERM), float(asked == signal.SIGINT),
        ]  # fmt: skip
        bad_loss, bad_images, term, interrupt = distributed.all_sum(flags)
        self.bad_draws += int(bad_images)
        return bad_loss > 0, int(bad_images), int(signal.SIGTERM if term else signal.SIGINT if interrupt else 0)

    def _update(self, values: dict[str, float], norm: Tensor, *, bad_loss: bool) -> bool:
        """Change the weights, unless something is not finite; then also put back the buffers. Returns which it was."""
        good = not bad_loss and math.isfinite(values["grad_norm"])
        # fp16 finds its loss scale by overflowing now and then; that is no fault of the data and is not counted.
        overflow = not good and not bad_loss and self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        if good:
            if self.loop.clip_norm is not None:
                clip_gradients(self.optimizer, norm=norm, max_norm=self.loop.clip_norm)
            self.scaler.step(self.optimizer)
            if hasattr(self.task, "after_step"):
                with torch.no_grad():
                    self.task.after_step(self.step, self.loop.steps)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for old, buffer in zip(self.buffers_before, self.buffers, strict=True):
                    buffer.copy_(old)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.skipped = 0 if good else self.skipped + (not overflow)
        return good

    def _skip(self, values: dict[str, float], parts: list[Fetched]) -> None:
        """Report a step that changed nothing; stop when there were too many in a row."""
        mine = {
            "rank": self.rank, "loss": repr(values["loss"]), "grad_norm": repr(values["grad_norm"]),
            "indices": [i for part in parts for i in part.indices], "draws": [d for part in parts for d in part.draws],
        }  # fmt: skip
        everyone = distributed.all_objects(mine)
        if self.skipped == 0:
            self.log.event(self.step, "loss_scale_lowered", scale=self.scaler.get_scale())
            return
        # Prefer the processes whose own loss is not finite: after averaging, the gradient is alike everywhere.
        guilty = [one for one in everyone if one["loss"] in ("nan", "inf", "-inf")] or everyone
        self.log.event(self.step, "non_finite", in_a_row=self.skipped, lr=values["lr"], processes=everyone)
        text = (
            f"step {self.step}: loss {guilty[0]['loss']}, gradient norm {guilty[0]['grad_norm']}; samples "
            f"{[i for one in guilty for i in one['indices']]}, draws {[d for one in guilty for d in one['draws']]}"
        )
        if self.skipped > MAX_SKIPPED or self.check:
            raise UserError(
                f"{text}: {self.skipped} steps in a row were not finite and were skipped. Weights are those of the last "
                "good step. Look at these samples, lower optim.lr, or set loop.clip_norm or loop.precision=fp32"
            )
        self.log.warn(f"{text}: not finite, skipped ({self.skipped} of at most {MAX_SKIPPED} in a row)")

    def _list_bad_images(self, parts: list[Fetched]) -> None:
        """List each unreadable image once; stop when they are clearly more than 1 % of what was drawn."""
        found = distributed.all_objects([entry for part in parts for entry in part.bad])
        for index, path, reason in [entry for entries in found for entry in entries]:
            if index not in self.listed:
                self.listed.add(index)
                self.log.bad_image(index, path, reason)
        drawn = self.step * self.loop.batch_size
        allowed = BAD_IMAGES_ALLOWED * drawn
        # Two standard deviations of chance on top: three bad ones among the first hundred prove nothing.
        if self.bad_draws > max(3.0, allowed + 2 * math.sqrt(allowed)):
            raise UserError(
                f"{self.bad_draws} of {drawn} images could not be read, more than {BAD_IMAGES_ALLOWED:.0%}; they are listed in "
                f"{self.out / 'bad_images.jsonl'}: repair or remove them"
            )

    def _tally(self, values: dict[str, float], **times: float) -> None:
        for name, value in {**values, **times, "steps": 1.0, "good": float(bool(values))}.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def _report(self) -> None:
        """Log the means since the last line, over all processes, and start a new window."""
        steps, good = self.window.pop("steps"), self.window.pop("good")
        names = sorted(self.window)
        totals = dict(zip(names, distributed.all_sum([self.window[name] for name in names]), strict=True))
        times = {name: totals.pop(name) / steps / self.world for name in ("data_time", "step_time")}
        seconds = sum(times.values())
        self.metrics = {name: totals[name] / max(1.0, good) / self.world for name in sorted(totals, key=_loss_first)}
        rate = self.loop.batch_size / max(seconds, 1e-9)
        self.log.metrics(
            self.step, {**self.metrics, **times, "per_second": rate, "eta": seconds * (self.loop.steps - self.step)}
        )
        self.window = {}

    def _save(self) -> None:
        """Write a checkpoint: process 0 writes, every process contributes its generators."""
        ranks = distributed.all_objects({"rng": distributed.rng_state(), "window": self.window})
        if self.rank == 0:
            state = self.task.state_dict()
            checkpoint.save(
                self.out / "checkpoints",
                step=self.step,
                model={name: value for name, value in state.items() if not name.startswith(self.untracked)},
                state={
                    "step": self.step, "draw": self.step * self.loop.batch_size, "skipped": self.skipped,
                    "bad_draws": self.bad_draws, "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(), "ranks": ranks,
                },
                meta={"config": self.record, "processes": self.world, "torch": torch.__version__},
                keep=self.loop.keep,
            )  # fmt: skip
        distributed.barrier()


# --- the run folder ----------------------------------------------------------------------------------------------------


def find_start(
    out: Path, record: dict[str, Any], *, resume: bool, overwrite: bool, warn: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """Decide where a run in ``out`` starts, without writing anything.

    Returns:
        The checkpoint to continue from; ``None`` to begin.

    Raises:
        UserError: If the folder is in use, the config differs in what is trained, or no checkpoint is readable.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder for out")
    used = out.is_dir() and any(out.iterdir())
    if used and not (resume or overwrite):
        raise UserError(f"{out}: is not empty; give --resume to continue, --overwrite to begin again, or another out=")
    if not resume:
        return None
    found = checkpoint.newest(out / "checkpoints", warn=warn)
    if found is None:
        if used:
            warn(f"{out}: has no checkpoint yet; beginning at step 0")
        return None
    changed = changed_keys(found.meta.get("config", {}), json.loads(json.dumps(record, default=str)))
    if changed:
        raise UserError(
            f"{out}: cannot resume, the config has changed in {', '.join(changed)}; put the old values back (they are in "
            f"{out / 'config.yaml'}), or train into another folder"
        )
    return found


def _prepare_folder(out: Path, record: dict[str, Any], *, device: torch.device, overwrite: bool) -> None:
    """Remove what an overwritten run has left, and write config.yaml and env.json."""
    if overwrite:
        for name in RUN_FILES:  # by name: a mistyped out= must not empty somebody's folder
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    env = {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "system": platform.platform(), "device": str(device), "processes": distributed.world_size(),
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }  # fmt: skip
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    checkpoint.write_atomically(out / "config.yaml", text.encode())
    checkpoint.write_atomically(out / "env.json", json.dumps(env, indent=1).encode())


def _listed_images(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    listed = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):  # a line torn by a kill is written again
            listed.add(int(json.loads(line)["index"]))
    return listed


def _load_model(task: nn.Module, model: dict[str, Any], untracked: tuple[str, ...], folder: Path) -> None:
    try:
        result = task.load_state_dict(model, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder}: does not fit this model ({error})") from error
    missing = [name for name in result.missing_keys if not name.startswith(untracked)]
    if missing or result.unexpected_keys:
        raise UserError(f"{folder}: does not fit this model: missing {missing[:5]}, unexpected {result.unexpected_keys[:5]}")


# --- small parts -------------------------------------------------------------------------------------------------------


class _Signals:
    """While in use, SIGTERM and SIGINT are noted, for the loop to stop after its step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.asked:
            os._exit(128 + signum)
        self.asked = signum
        os.write(2, b"stopping after this step; once more to leave at once\n")  # print is not safe in a handler


def _explained(error: RuntimeError, run: _Run) -> Exception:
    """Turn the failures that a user can mend into a message; others stay as they are."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"out of memory on {run.device}: raise loop.accumulate or lower loop.batch_size ({text.splitlines()[0]})")
    if "DataLoader" in text and ("worker" in text or "timed out" in text):
        return UserError(
            f"a data loading process died or hung after step {run.step} ({text.splitlines()[0]}). The usual causes are memory "
            "and /dev/shm (in a container: --shm-size); lower loop.workers, 0 loads in this process, and continue with --resume"
        )
    return error


def _to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, and objects with ``.to``, inside lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value


def _loss_first(name: str) -> tuple[bool, str]:
    return name != "loss", name
