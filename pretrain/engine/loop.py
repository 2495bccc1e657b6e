# SPDX-License-Identifier: Apache-2.0
"""The one training loop: any task, any sample source, one process or many, exactly resumable.

Read `fit`, then `_Run.train`. What is trained is a `pretrain.engine.task.Task`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.engine import checkpoint, distributed, run_folder
from pretrain.engine.config import FREE_BY_DEFAULT, LoopConfig, OptimConfig
from pretrain.engine.errors import UserError
from pretrain.engine.faults import (
    MAX_SKIPPED,
    NonFinite,
    Signals,
    Stopped,
    Watchdog,
    explained,
    non_finite_samples,
    too_many_bad,
)
from pretrain.engine.identity import identity_of
from pretrain.engine.log import RunLog, checked, forecast
from pretrain.engine.optim import build_optimizer, clip_gradients, gradient_norm, milestones_without_effect, set_lr
from pretrain.engine.sampling import Fetched, Microbatches, Source, batches, derive_seed, to_device
from pretrain.engine.task import Task

FORECAST_AFTER = 5  # steps of this process, by which the rest is estimated
COUNT = " steps"  # behind a metric's name in the window
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FitReport(NamedTuple):
    """Result of ``fit``: finished steps, the last logged metrics, the run folder."""

    step: int
    metrics: dict[str, float]
    out: Path


def fit(
    task: Task,
    source: Source,
    *,
    loop: LoopConfig,
    optim: OptimConfig,
    out: Path,
    record: Mapping[str, object],
    resume: bool = False,
    overwrite: bool = False,
    check: bool = False,
    free_keys: Iterable[str] = FREE_BY_DEFAULT,
    at_default: Iterable[str] = (),
) -> FitReport:
    """Train ``task`` for ``loop.steps`` steps.

    Args:
        task: the module to train; it is moved to the device. Seed its initial weights with ``seed_everything``.
        source: where samples come from.
        loop: how long, how large, how often.
        optim: optimiser and schedule.
        out: run folder.
        record: the whole configuration as plain values; written down, and compared on resume.
        resume: continue from the newest good checkpoint in ``out``; begin if there is none.
        overwrite: delete an earlier run in ``out`` first.
        check: only load two batches and make one step; write nothing.
        free_keys: dotted keys of ``record`` that may differ on resume (``config.free_keys(model)``).
        at_default: those that an older run need not have recorded (``config.keys_at_default(cfg)``).

    Returns:
        steps, last metrics and folder.

    Raises:
        UserError: for anything the user can mend: folder in use, changed config, unreadable data, non-finite loss.
        Stopped: after SIGTERM or SIGINT (a ``SystemExit`` with 143 or 130); the run has saved and can be resumed.
    """
    out = Path(out)
    with distributed.process_group():

        def find_start() -> tuple[checkpoint.Checkpoint | None, list[str]]:
            notes: list[str] = []
            if check:
                return None, notes
            start = run_folder.find_start(
                out,
                record,
                free_keys=free_keys,
                at_default=at_default,
                resume=resume,
                overwrite=overwrite,
                warn=notes.append,
            )
            return start, notes

        find_start()  # what is refused writes nothing, not even a lock
        run = _Run(task, source, loop=loop, optim=optim, out=out, record=record, check=check)
        lock = nullcontext() if check else run_folder.locked(out)
        with Signals() as signals, run.errors_explained(), lock as note, run:
            start, notes = find_start()  # again: another training may have been here since
            notes += milestones_without_effect(optim, loop.steps)
            run.begin(start, notes + ([note] if note else []), overwrite=overwrite)
            return run.train(signals)


def with_counts(window: dict[str, float]) -> dict[str, float]:
    """The window of a checkpoint; an older one counted all steps and all good ones, instead of each metric's."""
    if "steps" not in window:
        return window
    sums = {name: value for name, value in window.items() if name not in ("steps", "good")}
    counts = {name: window["steps" if name in ("data_time", "step_time") else "good"] for name in sums}
    return sums | {f"{name}{COUNT}": count for name, count in counts.items() if count}


class _Run:
    """The state of one run. Read ``train`` first."""

    def __init__(
        self,
        task: Task,
        source: Source,
        *,
        loop: LoopConfig,
        optim: OptimConfig,
        out: Path,
        record: Mapping[str, object],
        check: bool,
    ) -> None:
        self.loop, self.optim, self.out, self.record, self.check = loop, optim, out, record, check
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.device = distributed.pick_device(loop.device, threads=loop.threads)
        self.data = Microbatches(
            source,
            seed=loop.seed,
            batch_size=loop.batch_size,
            accumulate=loop.accumulate,
            rank=self.rank,
            world_size=self.world,
        )
        # What --check looks for shows in a few samples; whole batches of the papers take a CPU minutes and 26 GB, and
        # fp16 is many times slower there than fp32.
        self.samples, self.precision = loop.batch_size, loop.precision
        if check and self.device.type == "cpu":
            self.samples = self.data.shrink(task.check_samples)
            self.precision = "fp32" if loop.precision == "fp16" else loop.precision
        self.task = task.to(self.device).train()
        self.model: Task | DistributedDataParallel = self.task
        self.untracked = task.untracked
        # What a run is made from beside its configuration; a resumed one must find the same again.
        self.inputs: dict[str, int | str] = {"samples": len(source)}
        rebuilt = {name: value for name, value in task.state_dict().items() if name.startswith(self.untracked)}
        if self.untracked and rebuilt:
            self.inputs["frozen weights"] = checkpoint.digest(rebuilt)
        self.optimizer = build_optimizer(self.task.param_groups(optim), optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.buffers = [b for name, b in self.task.named_buffers() if not name.startswith(self.untracked)]
        self.buffers_before = [torch.empty_like(b) for b in self.buffers]
        self.step = 0  # finished steps
        self.skipped = 0  # non-finite steps in a row
        self.bad_draws = 0  # replaced images, over all processes
        self.window: dict[str, float] = {}  # sums since the last log line, and how many steps are in each (COUNT)
        self.listed: set[int] = set()  # indices in bad_images.jsonl
        self.metrics: dict[str, float] = {}  # of the last log line
        self.log = RunLog(out=None, total=loop.steps, start=0, speak=False)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.log.close()

    @contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turn errors of torch that the user can fix into a `UserError`; others pass."""
        try:
            yield
        except RuntimeError as error:
            better = explained(error, step=self.step, device=self.device, rank=self.rank)
            if better is error:
                raise
            raise better from error

    def begin(self, start: checkpoint.Checkpoint | None, notes: list[str], *, overwrite: bool) -> None:
        """Load the checkpoint, if any, open the folder and the log, and wrap the model."""
        distributed.seed_everything(derive_seed(self.loop.seed, self.rank))
        rank_state: checkpoint.RankState | None = None
        if not self.check:  # one process looks at the files
            data_identity = identity_of(self.data.source) if self.rank == 0 else {}
            self.inputs |= distributed.all_objects(data_identity)[0]
        if start is not None:
            notes += run_folder.refuse_other_inputs(start, self.inputs)
            model, state = checkpoint.load_state(start)
            checkpoint.load_model(self.task, model, untracked=self.untracked, where=start.folder)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.skipped, self.bad_draws = state["step"], state["skipped"], state["bad_draws"]
            rank_state = state["ranks"][self.rank] if len(state["ranks"]) == self.world else None
            self.window = with_counts(rank_state["window"]) if rank_state else {}
        distributed.barrier()  # all have read before one writes
        main, out = self.rank == 0, None if self.check else self.out
        if main and out is not None:
            run_folder.prepare(out, self.record, device=self.device, overwrite=overwrite)
            if start is not None:
                checkpoint.prune(out / "checkpoints", newest_step=start.step, keep=self.loop.keep)
            self.listed = run_folder.listed_images(out)
        self.log = RunLog(out=out, total=self.loop.steps, start=self.step, speak=main)
        self.metrics = self.log.newest
        for note in notes:
            self.log.warn(note)
        if start is not None:
            self.log.info(f"resuming {self.out} after step {self.step}")
            if rank_state is None:
                self.log.warn("the checkpoint is of another number of processes; the model draws other random numbers")
        if self.world > 1:
            self.model = DistributedDataParallel(
                self.task,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=self.task.find_unused_parameters,
            )
        if rank_state is not None:
            distributed.set_rng_state(rank_state["rng"])  # last: nothing may draw between this and the first step

    def train(self, signals: Signals) -> FitReport:
        """Run until the last step, a signal or an error."""
        last = 2 if self.check else self.loop.steps
        started, steady = self.step, time.perf_counter()
        if self.step >= last:
            return FitReport(self.step, self.metrics, self.out)
        feed = batches(
            self.data,
            first=self.step * self.data.passes,
            last=last * self.data.passes,
            workers=min(self.loop.workers, 2) if self.check else self.loop.workers,
            pin=self.device.type == "cuda",
        )
        with closing(feed), Watchdog(self.rank, active=self.world > 1) as watchdog:
            while self.step < last:
                begun = time.perf_counter()
                watchdog.at(self.step + 1, "loading samples")
                parts = self._load(feed)
                loaded = time.perf_counter()
                watchdog.at(self.step + 1, "forward and backward")
                values, norm = self._forward_backward(parts)
                watchdog.at(self.step + 1, "agreeing on the step")
                bad_loss, bad_images, signum = self._agree(values, parts, signals)
                good = self._update(values, norm, bad_loss=bad_loss)
                self.step += 1
                self._tally(values if good else {}, data_time=loaded - begun, step_time=time.perf_counter() - loaded)
                if not good:
                    self._report_skip(values, parts)
                if self.step - started == FORECAST_AFTER:
                    self._forecast(time.perf_counter() - steady)
                elif self.step - started == 1:
                    steady = time.perf_counter()  # the first step plans and allocates; it says little of the others
                if bad_images:
                    self._report_bad_images(parts)
                if self.check:
                    self._load(feed)
                    self.log.info(checked(values["loss"], self.samples, self.loop.batch_size))
                    return FitReport(self.step, values, self.out)
                watchdog.at(self.step, "logging and saving")
                self.log.advance(self.step)
                if self.step % self.loop.log_every == 0 or self.step == last:
                    self._report(lr=values["lr"])
                if self.step % self.loop.save_every == 0 or self.step == last or signum:
                    self._save()
                if signum and self.step < last:
                    self.log.info(f"{signal.Signals(signum).name}: saved step {self.step}; continue with --resume")
                    raise Stopped(signum, self.step)
        return FitReport(self.step, self.metrics, self.out)

    def _forecast(self, seconds: float) -> None:
        """Say how long the rest will take, by the steps after the first, and what space the checkpoints will."""
        size = checkpoint.size_of(self.task.state_dict()) + checkpoint.size_of(self.optimizer.state_dict())
        each = seconds / (FORECAST_AFTER - 1)
        if self.rank == 0:
            self.log.info(forecast(self.loop.steps - self.step, each, size * (self.loop.keep + 1), self.out))

    def _load(self, feed: Iterator[Fetched]) -> list[Fetched]:
        parts = [next(feed) for _ in range(self.data.passes)]
        for part in parts:
            if part.error is not None:
                raise UserError(part.error)
        return parts

    def _forward_backward(self, parts: list[Fetched]) -> tuple[dict[str, float], Tensor]:
        """Accumulate the gradient of the mean over the parts; returns this process's metrics and the gradient norm."""
        for old, buffer in zip(self.buffers_before, self.buffers, strict=True):
            old.copy_(buffer)
        lr = set_lr(self.optimizer, self.step, self.optim, total=self.loop.steps)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor | float] = {}
        counts: dict[str, int] = {}
        for number, part in enumerate(parts):
            with ExitStack() as stack:
                if isinstance(self.model, DistributedDataParallel) and number < len(parts) - 1:
                    stack.enter_context(self.model.no_sync())  # processes exchange gradients once per step
                with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
                    loss, metrics = self.model(to_device(part.batch, self.device))
                self.scaler.scale(loss / len(parts)).backward()
            for name, value in {**metrics, "loss": loss}.items():
                sums[name] = sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
                counts[name] = counts.get(name, 0) + 1  # a pass need not have every metric
        self.task.after_backward(self.step)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.optimizer)
        means = {name: float(value) / counts[name] for name, value in sums.items()}
        return {**means, "lr": lr, "grad_norm": float(norm)}, norm

    def _agree(self, values: dict[str, float], parts: list[Fetched], signals: Signals) -> tuple[bool, int, int]:
        """Agree among all processes before the update: a bad loss anywhere, new bad images, a signal."""
        signum = signals.received
        bad_loss, bad_images, term, interrupt = distributed.all_sum(
            [
                float(not math.isfinite(values["loss"])),
                float(sum(len(part.bad) for part in parts)),
                float(signum == signal.SIGTERM),
                float(signum == signal.SIGINT),
            ]
        )
        self.bad_draws += int(bad_images)
        return bad_loss > 0, int(bad_images), int(signal.SIGTERM if term else signal.SIGINT if interrupt else 0)

    def _update(self, values: dict[str, float], norm: Tensor, *, bad_loss: bool) -> bool:
        """Change the weights; if something is not finite, put back the buffers instead. Returns which it was."""
        good = not bad_loss and math.isfinite(values["grad_norm"])
        # fp16 finds its loss scale by overflowing now and then; that is no fault of the data and is not counted.
        overflow = not good and not bad_loss and self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        with torch.no_grad():
            if good:
                if self.loop.clip_norm is not None:
                    clip_gradients(self.optimizer, norm=norm, max_norm=self.loop.clip_norm)
                self.scaler.step(self.optimizer)
                self.task.after_step(self.step, self.loop.steps)
            else:
                self.optimizer.zero_grad(set_to_none=True)
                for old, buffer in zip(self.buffers_before, self.buffers, strict=True):
                    buffer.copy_(old)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.skipped = 0 if good else self.skipped + (not overflow)
        return good

    def _report_skip(self, values: dict[str, float], parts: list[Fetched]) -> None:
        """Record a step that changed nothing; stop when there were too many in a row."""
        local_values: NonFinite = {
            "rank": self.rank,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "indices": [index for part in parts for index in part.indices],
            "draws": [draw for part in parts for draw in part.draws],
        }
        processes = distributed.all_objects(local_values)
        if self.skipped == 0:
            self.log.event(self.step, "loss_scale_lowered", scale=self.scaler.get_scale())
            return
        self.log.event(self.step, "non_finite", in_a_row=self.skipped, lr=values["lr"], processes=processes)
        text = f"step {self.step}: {non_finite_samples(processes)}"
        if self.skipped > MAX_SKIPPED or self.check:
            raise UserError(
                f"{text}: {self.skipped} consecutive non-finite steps; none of them changed the weights. "
                "Look at these samples (events.jsonl lists the earlier ones), lower optim.lr, or set loop.clip_norm or "
                "loop.precision=fp32"
            )
        self.log.warn(f"{text}: non-finite step skipped ({self.skipped} consecutive, at most {MAX_SKIPPED})")

    def _report_bad_images(self, parts: list[Fetched]) -> None:
        """List each unreadable image once; stop when they are clearly more than 1 % of what was drawn."""
        for entries in distributed.all_objects([entry for part in parts for entry in part.bad]):
            for index, path, reason in entries:
                if index not in self.listed:
                    self.listed.add(index)
                    self.log.bad_image(index, path, reason)
        drawn = self.step * self.samples + self.bad_draws  # each was replaced by another draw
        if too_many_bad(self.bad_draws, drawn):
            raise UserError(
                f"{self.bad_draws} of {drawn} images could not be read, more than 1 %; they are listed in "
                f"{self.out / 'bad_images.jsonl'}: repair or remove them"
            )

    def _tally(self, values: dict[str, float], **times: float) -> None:
        for name, value in {**values, **times}.items():
            self.window[name] = self.window.get(name, 0.0) + value
            self.window[f"{name}{COUNT}"] = self.window.get(f"{name}{COUNT}", 0.0) + 1.0

    def _report(self, *, lr: float) -> None:
        """Log the means since the last line, over all processes, and start a new window.

        A metric is averaged over the steps that had it; which steps those are must be the same in every process.
        """
        names = sorted((n for n in self.window if not n.endswith(COUNT)), key=lambda name: (name != "loss", name))
        sums = distributed.all_sum([self.window[name] for n in names for name in (n, f"{n}{COUNT}")])
        means = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(names)}
        times = {name: means.pop(name) for name in ("data_time", "step_time")}
        seconds = sum(times.values())
        times |= {"per_second": self.loop.batch_size / seconds, "eta": seconds * (self.loop.steps - self.step)}
        self.metrics = {**means, "lr": lr}
        values, warnings = self.task.report()
        self.metrics |= values
        for text in warnings:
            self.log.warn(f"step {self.step}: {text}")
            self.log.event(self.step, "alarm", text=text)
        self.log.metrics(self.step, {**self.metrics, **times})
        self.window = {}

    def _save(self) -> None:
        """Write a checkpoint: process 0 writes, every process contributes its generators."""
        ranks = distributed.all_objects({"rng": distributed.rng_state(), "window": self.window})
        if self.rank == 0:
            model = self.task.state_dict()
            checkpoint.save(
                self.out / "checkpoints",
                step=self.step,
                model={name: value for name, value in model.items() if not name.startswith(self.untracked)},
                state={
                    "step": self.step,
                    "draw": self.step * self.loop.batch_size,
                    "skipped": self.skipped,
                    "bad_draws": self.bad_draws,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "ranks": ranks,
                },
                meta={
                    "config": run_folder.as_json(self.record),
                    "inputs": self.inputs,
                    "processes": self.world,
                    "torch": torch.__version__,
                },
                keep=self.loop.keep,
            )
        distributed.barrier()
