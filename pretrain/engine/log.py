# SPDX-License-Identifier: Apache-2.0
"""Logs of a run: ``metrics.jsonl`` always, ``train.log``, ``events.jsonl``, TensorBoard if installed,
and on the screen a progress bar (terminal) or plain lines (anything else; no control characters)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint import write_atomically
from pretrain.engine.errors import UserError


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as ``1:02:03``."""
    total = max(0, round(seconds))
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def forecast(steps: int, seconds: float, size: int, out: Path) -> str:
    """How long the rest of a run takes, and what its checkpoints need.

    Args:
        steps: that are left.
        seconds: of one.
        size: bytes of all checkpoints that lie there at once: one is written before the oldest is deleted.
        out: run folder.
    """
    free = shutil.disk_usage(out).free
    return (
        f"about {format_duration(steps * seconds)} for {steps} more steps, evaluations apart; checkpoints need "
        f"{size / 2**30:.2g} GiB in {out}, {free / 2**30:.3g} GiB are free"
    )


def checked(loss: float, samples: int, batch_size: int) -> str:
    """What ``--check`` says of a step with so many samples of a batch."""
    line = f"check: two batches and one step, loss {loss:.4g}; nothing was written"
    return line if samples == batch_size else f"{line}; checked with {samples} of {batch_size} samples (no GPU here)"


def format_line(step: int, total: int, values: dict[str, float]) -> str:
    """One plain log line: the step, the metrics, then the times."""
    times = ("data_time", "step_time", "eta", "per_second")
    parts = [f"step {step}/{total}"]
    parts += [f"{name} {value:.4g}" for name, value in values.items() if name not in times]
    parts.append(f"data {values['data_time']:.3f} s  step {values['step_time']:.3f} s  {values['per_second']:.1f}/s")
    parts.append(f"eta {format_duration(values['eta'])}")
    return "  ".join(parts)


def strict_json(value: Any) -> Any:
    """Replace numbers that JSON does not know (NaN, infinity) by their names, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    return [strict_json(item) for item in value] if isinstance(value, list) else value


def rewind(path: Path, *, step: int) -> str | None:
    """Drop lines of a ``.jsonl`` file that are torn, or of steps after ``step``, which will be made again.

    Returns:
        the last line that stays.
    """
    if not path.is_file():
        return None
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the run was killed
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return lines[-1] if lines else None


class RunLog:
    """The log of one run; a silent one in the other processes.

    Args:
        out: run folder; ``None`` writes no file (``--check``).
        total: steps of the run.
        start: step it starts from.
        speak: whether this process writes and prints.
    """

    def __init__(self, *, out: Path | None, total: int, start: int, speak: bool) -> None:
        self.out = out if speak else None
        self.total, self.speak = total, speak
        self._bar: Any = None
        self._board: Any = None
        self.newest: dict[str, float] = {}  # metrics of the last line of an earlier part of the run
        if self.out is not None:
            rewind(self.out / "events.jsonl", step=start)
            line = rewind(self.out / "metrics.jsonl", step=start)
            self.newest = {name: value for name, value in json.loads(line or "{}").items() if name != "step"}
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=start + 1)
        if speak and sys.stderr.isatty() and sys.stdout.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def info(self, text: str) -> None:
        """Print one line (above the bar) and keep it in ``train.log``."""
        if not self.speak:
            return
        try:
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # ``… | head``: the reader is gone, and the training goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.out is not None:
            self._append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def warn(self, text: str) -> None:
        """Say it as a warning."""
        self.info(f"warning: {text}")

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics everywhere."""
        if not self.speak:
            return
        self.info(format_line(step, self.total, values))
        self._append("metrics.jsonl", json.dumps(strict_json({"step": step, **values})))
        if self._board is not None:
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:
                self._board = None
                self.warn(f"TensorBoard: {error}; going on without")

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Record something unusual in ``events.jsonl``."""
        self._append("events.jsonl", json.dumps(strict_json({"step": step, "event": kind, **details})))

    def bad_image(self, index: int, path: str, reason: str) -> None:
        """Record an unreadable image in ``bad_images.jsonl``."""
        self.warn(f"unreadable image replaced by the next one: {reason}")
        self._append("bad_images.jsonl", json.dumps({"index": index, "path": path, "reason": reason}))

    def close(self) -> None:
        """Finish the bar and the board."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl has everything that the board has
                self._board.close()

    def _append(self, name: str, line: str) -> None:
        if self.out is None:
            return
        try:
            with open(self.out / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.out / name}: {error.strerror}; checkpoints are untouched: free some space, then "
                "continue with --resume"
            ) from error
