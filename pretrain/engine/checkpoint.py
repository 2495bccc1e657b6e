# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill, a full disk and a damaged file, and weight files.

Layout: ``checkpoints/step_N/{model.safetensors, state.pt, meta.json}``; ``last`` is a link to the newest, for people.

A checkpoint is written under a temporary name, each file flushed to the disk, then the folder is renamed and its parent
flushed. ``meta.json`` carries size and sha256 of the files, and ends with a sum of itself; the sums are taken from the
bytes as they are produced and compared with what is read back before any older checkpoint is deleted. So the newest
*complete* checkpoint can always be found by checking the folders, newest first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from pretrain.engine.distributed import RngState
from pretrain.engine.errors import UserError
from pretrain.engine.files import flush_to_disk, sha256_of, write_atomically
from pretrain.engine.state import load_tensors
from pretrain.engine.task import Task

FORMAT = 2  # 1: without a sum of META itself
MODEL, STATE, META = "model.safetensors", "state.pt", "meta.json"
_SUM = b',\n "sha256": "%s"\n}\n'  # the end of META
_UNSUMMED = _SUM % (b"0" * 64)
FREE_SPACE_MARGIN = 1.1  # of the size of the tensors, for headers and directory entries
_ALIASES = "aliases"


class FileSum(TypedDict):
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


class Meta(TypedDict, total=False):
    """``meta.json``: what a checkpoint is, and of which run.

    Attributes:
        format: version of the layout.
        step: finished steps.
        files: sums of the other files, by name.
        config: the run's configuration as plain values.
        inputs: what the run was made from beside it: number and digests of samples, digest of frozen weights.
        processes: how many there were.
        torch: version.
    """

    format: int
    step: int
    files: Mapping[str, FileSum]
    config: Mapping[str, object]
    inputs: Mapping[str, int | str]
    processes: int
    torch: str


class RankState(TypedDict):
    """State of each process: its generators, and sums since the last log line."""

    rng: RngState
    window: dict[str, float]


class RunState(TypedDict):
    """Everything of a run beside the model: what ``state.pt`` holds.

    Attributes:
        step: finished steps.
        draw: samples drawn.
        skipped: non-finite steps in a row.
        bad_draws: replaced images, over all processes.
        optimizer, scaler: their state dictionaries.
        ranks: one per process.
    """

    step: int
    draw: int
    skipped: int
    bad_draws: int
    optimizer: StateDict
    scaler: StateDict
    ranks: list[RankState]


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder, its step, and the content of ``meta.json``."""

    folder: Path
    step: int
    meta: Meta


class _HashingFile:
    """A file that knows the sha256 of what was written to it, independently of what reached the disk."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._sum = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sum.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> FileSum:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "sha256": self._sum.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _write(path: Path, produce: Callable[[Any], object]) -> FileSum:
    """Write and flush one file; returns its size and sha256."""
    file = _HashingFile(path)
    try:
        produce(file)
        return file.finish()
    finally:
        file.close()


# --- weight files


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise tensors as safetensors.

    The format forbids shared memory. Names for the very same tensor (tied weights) are stored once, the others as
    aliases in the metadata; tensors that merely overlap are stored separately.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    keys: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        storage = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and storage in keys:
            aliases[name] = keys[storage]
            continue
        keys[storage] = name
        stored[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)  # free of storage that others share
    extra = {_ALIASES: json.dumps(aliases, sort_keys=True)} if aliases else {}
    return safetensors.torch.save(stored, metadata={**metadata, **extra})


def save_weights(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a weight file (safetensors) atomically.

    Args:
        path: the file; its folder is made.
        tensors: any names, shapes and types.
        metadata: strings that describe the weights.

    Raises:
        UserError: if it cannot be written; an older file of that name is untouched.
    """
    write_atomically(Path(path), pack(tensors, metadata))


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does, whatever its name: the length of a header, and a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the few lines that Git LFS leaves in place of a file that was not fetched.

    Raises:
        UserError: it is one, with what to do.
    """
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/"):
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a weight file.

    Returns:
        the tensors (on the CPU) and the metadata that ``save_weights`` was given.

    Raises:
        UserError: if the file is missing or is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; fetch or export it again")
    refuse_lfs_pointer(path)
    if any("\udc80" <= character <= "\udcff" for character in str(path)):
        raise UserError(f"{path}: safetensors opens names in UTF-8 alone; rename the file, or the folder that it is in")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch or export it again") from error
    try:
        for name, original in json.loads(metadata.pop(_ALIASES, "{}")).items():
            tensors[name] = tensors[original]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its metadata {_ALIASES!r} is not a table of names of its tensors ({error!r}); export it again"
        ) from error
    if spoilt := next((k for k, v in tensors.items() if v.is_floating_point() and bool(torch.isnan(v).any())), None):
        raise UserError(f"{path}: {spoilt} holds values that are no numbers (NaN); fetch or export it again")
    return tensors, metadata


# --- checkpoints


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """All finished checkpoint folders under ``root``, oldest first; damaged ones too."""
    numbered = []
    for folder in root.glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdigit() and folder.is_dir():
            numbered.append((int(number), folder))
    return sorted(numbered)


class _Damaged(UserError):
    """Damage for which an older checkpoint can be used instead."""


def with_sum(text: str) -> bytes:
    """A JSON object that ends with the sha256 of its own bytes, the digits of the sum counted as zeros."""
    return _summed(text.rstrip().removesuffix("}").rstrip().encode())


def _summed(body: bytes) -> bytes:
    return body + _SUM % hashlib.sha256(body + _UNSUMMED).hexdigest().encode()


def verify(folder: Path) -> Checkpoint:
    """Check sizes and sums of a checkpoint.

    Raises:
        UserError: naming the file that is missing, torn or changed; or if a newer version of the program wrote it.
    """
    try:
        written = (folder / META).read_bytes()
        meta = json.loads(written.decode("utf-8"))
        checkpoint = Checkpoint(folder, int(meta["step"]), meta)
        if written != _summed(written[: -len(_UNSUMMED)]) and (
            meta["format"] != 1 or "sha256" in meta
        ):  # format 1 had none
            raise _Damaged(f"{folder / META}: is damaged (its sha256 is not the one at its end)")
        if meta["format"] not in (1, FORMAT):  # not damaged: going back to an older one would throw work away
            raise UserError(f"{folder}: has format {meta['format']!r}, this version of the program reads {FORMAT}")
        for name in (MODEL, STATE):
            expected, size = meta["files"][name], (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise _Damaged(f"{folder / name}: is torn ({size} of {expected['bytes']} bytes)")
            if sha256_of(folder / name) != expected["sha256"]:
                raise _Damaged(f"{folder / name}: is damaged (its sha256 is not the one in {META})")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{folder}: is incomplete or damaged ({type(error).__name__}: {error})") from error
    return checkpoint


def newest(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies.

    Args:
        root: the ``checkpoints`` folder.
        warn: called for each damaged one that is skipped.

    Returns:
        ``None`` if there is no checkpoint at all.

    Raises:
        UserError: if there are some, all damaged.
    """
    folders = step_folders(root)
    for _, folder in reversed(folders):
        try:
            return verify(folder)
        except _Damaged as error:
            warn(f"{error}; trying the checkpoint before it")
    if folders:
        raise UserError(f"{root}: none of the {len(folders)} checkpoints can be used; start again with --overwrite")
    return None


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse to start writing without enough free space.

    Raises:
        UserError: if fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; "
            "older checkpoints are untouched: free some space, then continue with --resume"
        )


def save(root: Path, *, step: int, model: Mapping[str, object], state: RunState, meta: Meta, keep: int) -> Checkpoint:
    """Write, verify and publish one checkpoint, then delete old ones.

    Args:
        root: the ``checkpoints`` folder.
        step: number of finished steps.
        model: the model's state dictionary; values that are no tensors go to ``state.pt``.
        state: everything else; only types that ``torch.load(weights_only=True)`` reads.
        meta: JSON values for ``meta.json``.
        keep: how many checkpoints stay.

    Raises:
        UserError: if it cannot be written. Older checkpoints are untouched.
    """
    folder, temporary = root / f"step_{step}", root / f".step_{step}.tmp"
    tensors = {name: value for name, value in model.items() if isinstance(value, Tensor)}
    content = {**state, "extra": {name: value for name, value in model.items() if name not in tensors}}
    try:
        if folder.is_dir():
            try:
                return verify(folder)  # a run that was stopped right after it had saved
            except _Damaged:
                shutil.rmtree(folder)  # damaged: the run went back to an older one and is here again
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step_*"):
            shutil.rmtree(leftover)
        check_free_space(root, int(FREE_SPACE_MARGIN * (size_of(tensors) + size_of(content))))
        temporary.mkdir()
        files = {
            MODEL: _write(temporary / MODEL, lambda file: file.write(pack(tensors, {"step": str(step)}))),
            STATE: _write(temporary / STATE, lambda file: torch.save(content, file)),
        }
        text = json.dumps({"format": FORMAT, "step": step, "files": files, **meta}, indent=1)
        _write(temporary / META, lambda file: file.write(with_sum(text)))
        flush_to_disk(temporary)
        os.replace(temporary, folder)
        flush_to_disk(root)
        checkpoint = verify(folder)
        _point_last(root.parent / "last", folder)
        prune(root, newest_step=step, keep=keep, later=True)
        return checkpoint
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{folder}: the checkpoint could not be written ({error.strerror or error}); older checkpoints are "
            "untouched: free some space, then continue with --resume"
        ) from error


def size_of(value: object) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(size_of(item) for item in value)
    return 0


def _point_last(link: Path, folder: Path) -> None:
    temporary = link.with_name(".last.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
    except (OSError, NotImplementedError):
        return  # a file system without links; nothing reads the link, it is a convenience
    os.replace(temporary, link)


def prune(root: Path, *, newest_step: int, keep: int, later: bool = False) -> None:
    """Keep a verified checkpoint and the ``keep − 1`` before it.

    A kill between a save and this leaves one too many, so a resumed run does it too.

    Args:
        root: the ``checkpoints`` folder.
        newest_step: of the verified one.
        keep: how many stay.
        later: remove those after it too: they are of a discarded or damaged future.
    """
    older = [folder for step, folder in step_folders(root) if step < newest_step]
    after = [folder for step, folder in step_folders(root) if step > newest_step] if later else []
    for folder in older[: max(0, len(older) - (keep - 1))] + after:
        # Out of sight in one step first, so that a kill in the middle leaves no half checkpoint.
        hidden = folder.with_name("." + folder.name)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Any], RunState]:
    """Read a verified checkpoint.

    Returns:
        the model's state dictionary and the other state, on the CPU.
    """
    tensors, _ = load_weights(checkpoint.folder / MODEL)
    try:
        state = torch.load(checkpoint.folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types; the sum was right, so the file is not ours
        raise UserError(f"{checkpoint.folder / STATE}: cannot be read ({error})") from error
    return {**tensors, **state.pop("extra")}, state


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over shapes and bytes, in the order of the names; a prefix of all names changes nothing."""
    total = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def load_model(model: nn.Module, state: dict[str, Any], *, untracked: tuple[str, ...], where: Path) -> None:
    """Load a state dictionary that may lack the prefixes in ``untracked``, and nothing else.

    A `Task` first brings the state of an older version up to date (`Task.upgrade`).

    Raises:
        UserError: if names or shapes differ from the model's.
    """
    state = model.upgrade(state) if isinstance(model, Task) else state
    load_tensors(model, state, source=where, optional=untracked)
