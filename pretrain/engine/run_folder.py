# SPDX-License-Identifier: Apache-2.0
"""The run folder: whether a run may start or resume there, and from which checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from pretrain.engine import checkpoint, distributed, identity
from pretrain.engine.config import changed_keys, dump_config
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED, whole_folder, write_atomically

RUN_FILES = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "train.log",
    "events.jsonl",
    "bad_images.jsonl",
    "checkpoints",
    "tensorboard",
    "last",
    EXPORTED,  # of the run that is overwritten: weights of other steps than the checkpoints beside them
)
LOCK = ".lock"


def as_json(record: Mapping[str, object]) -> dict[str, object]:
    """A record in the types that survive ``meta.json`` (lists for tuples, text for paths)."""
    plain: dict[str, object] = json.loads(json.dumps(record, default=str))
    return plain


def find_start(
    out: Path,
    record: Mapping[str, object],
    *,
    free_keys: Iterable[str],
    at_default: Iterable[str] = (),
    resume: bool,
    overwrite: bool,
    warn: Callable[[str], None],
) -> checkpoint.Checkpoint | None:
    """Decide where a run in ``out`` starts, without writing anything.

    Args:
        out: the folder.
        record: configuration of this run.
        free_keys: dotted keys that may differ from the recorded configuration.
        at_default: dotted keys that the recorded configuration may lack.
        resume: whether to continue a run that is there.
        overwrite: whether to replace a run that is there.
        warn: called for what was skipped.

    Returns:
        the checkpoint to continue from; ``None`` to begin.

    Raises:
        UserError: if the folder is in use, the config differs in what is trained, or no checkpoint is readable.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder for out")
    used = out.is_dir() and any(path.name != LOCK for path in out.iterdir())
    if used and not (resume or overwrite):
        raise UserError(f"{out}: is not empty; give --resume to continue, --overwrite to begin again, or another out=")
    if not resume:
        return None
    latest = checkpoint.newest(out / "checkpoints", warn=warn)
    if latest is None:
        if used:
            warn(f"{out}: has no checkpoint yet; beginning at step 0")
        return None
    changed = changed_keys(latest.meta.get("config", {}), as_json(record), free_keys, at_default)
    if changed:
        raise UserError(
            f"{out}: cannot resume, the config has changed in {', '.join(changed)}; restore the old values "
            f"(they are in {out / 'config.yaml'}), or train into another folder"
        )
    return latest


def refuse_other_inputs(latest: checkpoint.Checkpoint, inputs: Mapping[str, int | str]) -> list[str]:
    """Refuse to resume with other samples or frozen weights than the run began with.

    Returns:
        warnings: large data whose files were changed or copied, of which a sample is the same.

    Raises:
        UserError: what is another one, by name. Checkpoints of older versions, which do not say, are taken.
    """
    notes = []
    for what, began in latest.meta.get("inputs", {}).items():
        if inputs.get(what) == began:
            continue
        if what.endswith(identity.TIMES):
            name = what.removesuffix(identity.TIMES)
            notes.append(
                f"the files of the {name} were copied or touched since this run began; their names, sizes and a "
                "sample of their content are the same, so training continues"
            )
            continue
        now, then = (str(value)[:12] for value in (inputs.get(what), began))
        raise UserError(
            f"{latest.folder}: cannot resume, the {what} have changed ({then} at the start, {now} now); "
            "restore the old ones, or train into another folder with another out="
        )
    return notes


class FolderLock:
    """One training per run folder.

    A POSIX record lock on ``out/.lock``: the kernel drops it when its process ends, however that ends, so that a killed
    run leaves nothing to clean up; loader processes, which are forked, do not inherit it. The file stays, because
    removing it could remove somebody else's. Only one process of a run takes it (``torchrun``: process 0).
    """

    def __init__(self, out: Path) -> None:
        self.path = out / LOCK
        self.note: str | None = None  # why there is no lock although nothing speaks against the run
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Take the lock, without waiting.

        Returns:
            ``None``, or what to tell the user when another process holds it or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            return f"cannot write {self.path}: {error.strerror or error}; choose another folder for out"
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if not isinstance(error, (BlockingIOError, PermissionError)):
                self.note = (
                    f"{self.path}: this file system has no locks ({error.strerror}); start one training here only"
                )
                return None
            return (
                f"{self.path.parent}: another training writes here ({owner or 'unknown process'}); wait for it or stop "
                "it, or give another out="
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        return None

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def locked(out: Path) -> Iterator[str | None]:
    """Hold the lock of a run folder, which process 0 takes. Yields `FolderLock.note`.

    Raises:
        UserError: in every process, when another training writes there.
    """
    lock = FolderLock(out)
    refusal = distributed.all_objects(lock.take() if distributed.rank() == 0 else None)[0]
    if refusal is not None:
        raise UserError(refusal)
    try:
        yield lock.note
    finally:
        lock.release()


@contextlib.contextmanager
def exported_folder(out: Path) -> Iterator[Path]:
    """A folder to export a run into, which becomes ``out/exported`` when all of it is written; for process 0 alone.

    Raises:
        UserError: another training writes in ``out``, or the disk is full; an earlier export is untouched.
    """
    lock = FolderLock(out)
    if (refusal := lock.take()) is not None:
        raise UserError(refusal)
    try:
        for left in out.glob(f".{EXPORTED}.*"):  # by an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        with whole_folder(out / EXPORTED) as folder:
            yield folder
    finally:
        lock.release()


def prepare(out: Path, record: Mapping[str, object], *, device: torch.device, overwrite: bool) -> None:
    """Remove what an overwritten run has left, and write ``config.yaml`` and ``env.json``."""
    if overwrite:
        for name in RUN_FILES:  # by name: a mistyped out= must not empty another folder
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    env = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    write_atomically(out / "config.yaml", dump_config(as_json(record)).encode())
    write_atomically(out / "env.json", json.dumps(env, indent=1).encode())


def listed_images(out: Path) -> set[int]:
    """Indices that ``bad_images.jsonl`` already names."""
    path = out / "bad_images.jsonl"
    listed: set[int] = set()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by a kill is written again
                listed.add(int(json.loads(line)["index"]))
    return listed
