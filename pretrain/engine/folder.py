# SPDX-License-Identifier: Apache-2.0
"""The run folder: may a run begin or continue here, and what does it find."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pretrain.engine import checkpoint, distributed
from pretrain.engine.config import changed_keys
from pretrain.engine.errors import UserError

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
)


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the types that survive ``meta.json`` (lists for tuples, text for paths)."""
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def find_start(
    out: Path,
    record: dict[str, Any],
    *,
    free_keys: Iterable[str],
    resume: bool,
    overwrite: bool,
    warn: Callable[[str], None],
) -> checkpoint.Checkpoint | None:
    """Decide where a run in ``out`` starts, without writing anything.

    Args:
        out: The folder.
        record: Configuration of this run.
        free_keys: Dotted keys that may differ from the recorded configuration.
        resume: Whether to continue a run that is there.
        overwrite: Whether to replace a run that is there.
        warn: Told about what was passed over.

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
    changed = changed_keys(found.meta.get("config", {}), as_json(record), free_keys)
    if changed:
        raise UserError(
            f"{out}: cannot resume, the config has changed in {', '.join(changed)}; put the old values back "
            f"(they are in {out / 'config.yaml'}), or train into another folder"
        )
    return found


def prepare(out: Path, record: dict[str, Any], *, device: torch.device, overwrite: bool) -> None:
    """Remove what an overwritten run has left, and write ``config.yaml`` and ``env.json``."""
    if overwrite:
        for name in RUN_FILES:  # by name: a mistyped out= must not empty somebody's folder
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
    text = yaml.safe_dump(as_json(record), sort_keys=False, allow_unicode=True)
    checkpoint.write_atomically(out / "config.yaml", text.encode())
    checkpoint.write_atomically(out / "env.json", json.dumps(env, indent=1).encode())


def listed_images(out: Path) -> set[int]:
    """Indices that ``bad_images.jsonl`` already names."""
    path = out / "bad_images.jsonl"
    listed: set[int] = set()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by a kill is written again
                listed.add(int(json.loads(line)["index"]))
    return listed
