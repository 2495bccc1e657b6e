# SPDX-License-Identifier: Apache-2.0
"""The export of the shipped default without torch: graphs without their weights, filled from the weights' files.

Tracing a network needs torch; its weights lie in the repository already. So an archive beside them
(``weights/NAME-graphs.zip``, some hundred kilobytes) holds the files of an export with the tensors cut out, and says
which tensor goes where. What comes out is the export, byte for byte. ``scripts/build_graphs.py`` writes the archive.

    holes.json    {"sources": {file: sha256}, "files": {name: {"sha256": …, "holes": [hole, …]}}}
    NAME          each file without what is in its holes
    int8/NAME     the same of files that are others in 8 bits
    ranges.json   of activations, which those were quantised with (`ovd.runtime.quantise`)

A hole is ``[offset, file, tensor, form, patches]``: where it begins in the file that results, `FORMS`, and bytes of it
that are others, ``[[place, hex], …]``: of weights in 8 bits the channels that a batch norm turns round, and those that
ONNX Runtime gives another scale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from ovd.runtime.files import BESIDE, CARD, INT8_BESIDE, graphs_of, read_runtime_card
from pretrain.engine.errors import NEEDS_TORCH, UserError
from pretrain.engine.files import sha256_of, write_atomically

if TYPE_CHECKING:
    from safetensors import safe_open

Patches: TypeAlias = Sequence[tuple[int, str]]
Hole: TypeAlias = tuple[int, str, str, str, Patches]
LISTING, RANGES = "holes.json", "ranges.json"
INT8 = "int8/"
COPIED = ("model.json", "card.json", "card.md")
"""Files that an export has from the folder of its weights."""


class _File(TypedDict):
    sha256: str
    holes: list[Hole]


class _Listing(TypedDict):
    sources: dict[str, str]
    files: dict[str, _File]


class Tensor(NamedTuple):
    """What fills a hole.

    Attributes:
        file: relative to the folder of all weights.
        name: in it.
        form: of `FORMS`.
        patches: see the module.
    """

    file: str
    name: str
    form: str
    patches: Patches = ()


def int8_channels(values: NDArray[np.generic]) -> NDArray[np.int8]:
    """Weights (C, …) in 8 bits: of each output channel the greatest magnitude becomes 127."""
    rows = np.asarray(values, np.float32).reshape(len(values), -1)
    step = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(rows / np.where(step > 0, step, 1)).astype(np.int8).reshape(values.shape)


def _half(values: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(values).astype("<f2").tobytes()


def _single(values: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(values).astype("<f4").tobytes()


FORMS: Mapping[str, Callable[[NDArray[np.generic]], bytes]] = {
    "half": _half,
    "single": _single,
    "half transposed": lambda values: _half(values.T),
    "single transposed": lambda values: _single(values.T),
    "int8": lambda values: int8_channels(values).tobytes(),
}
"""How a stored tensor stands in a graph: its bytes, little-endian."""


def assemble(folder: Path, target: Path, *, int8: bool = False, again: bool = True) -> None:
    """Write the export of a detector's folder.

    Args:
        folder: of the weights, with its archive beside it; tensors are read from files named relative to its parent.
        target: is made, and replaced where it is an export.
        int8: the one in 8 bits.
        again: also where the target has become this export in the meantime, by another process, which may be using it.

    Raises:
        UserError: no archive, or one of other weights.
    """
    archive = graphs_of(folder)
    if not archive.is_file():
        raise UserError(
            f"{folder}: no {archive.name} beside it, from which an export could be put together without torch; to "
            f"write one, install it: {NEEDS_TORCH}"
        )
    root = folder.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two may come at once.
    fresh = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with zipfile.ZipFile(archive) as packed:
            listing: _Listing = json.loads(packed.read(LISTING))
            if int8 and INT8 + CARD not in listing["files"]:
                raise UserError(f"{archive.name}: has no graphs in 8 bits; scripts/build_graphs.py makes it anew")
            for name, digest in listing["sources"].items():
                if not (root / name).is_file() or sha256_of(root / name) != digest:
                    raise UserError(
                        f"{root / name}: is not what {archive.name} was made of; scripts/build_graphs.py makes it "
                        "anew (this needs torch)"
                    )
            tensors = _Tensors(root)
            for name, stored in _parts(listing, int8=int8).items():
                part = listing["files"][stored]
                data = filled(packed.read(stored), part["holes"], tensors)
                if hashlib.sha256(data).hexdigest() != part["sha256"]:
                    raise UserError(f"{archive}: damaged, {stored} comes out wrong; restore it from the repository")
                write_atomically(fresh / name, data)
        for name in COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, fresh / name)
        if again or _is_to_be_written(archive, target, int8=int8):
            _replace(fresh, target)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as problem:
        raise UserError(f"{archive}: cannot be read ({problem}); restore it from the repository") from problem
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _parts(listing: _Listing, *, int8: bool) -> dict[str, str]:
    """File of an export → its name in the archive."""
    names = {name: name for name in listing["files"] if not name.startswith(INT8)}
    if int8:
        names |= {name.removeprefix(INT8): name for name in listing["files"] if name.startswith(INT8)}
    return names


def _replace(fresh: Path, target: Path) -> None:
    """Put a folder in the place of another; where another process was first, its one stays."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        fresh.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def kept_export(folder: Path, *, int8: bool) -> Path | None:
    """The export of a detector's folder, written from its archive where there is none, or one of another version.

    It lies in the folder, or, where that may not be written, among the user's files. One in 8 bits for photos of
    somebody's own is left as it is.

    Returns:
        None: there is no archive that has it.

    Raises:
        UserError: see `assemble`.
    """
    from ovd.weights import user_folder

    archive, beside = graphs_of(folder), INT8_BESIDE if int8 else BESIDE
    if not holds(archive, int8=int8):
        return None
    target = folder / beside
    if not _is_to_be_written(archive, target, int8=int8):
        return target
    if not os.access(folder, os.W_OK):
        target = user_folder("exports", "XDG_CACHE_HOME", ".cache") / folder.name / beside
        if not _is_to_be_written(archive, target, int8=int8):
            return target
    assemble(folder, target, int8=int8, again=False)
    return target


def holds(archive: Path, *, int8: bool) -> bool:
    """Whether an archive is there, and has an export of this kind."""
    if not archive.is_file():
        return False
    try:
        with zipfile.ZipFile(archive) as packed:
            return not int8 or INT8 + CARD in packed.namelist()
    except zipfile.BadZipFile:
        return True  # `assemble` says what is wrong with it


def _is_to_be_written(archive: Path, export: Path, *, int8: bool) -> bool:
    """Whether an export is not what the archive gives, and nobody's own either."""
    if not (export / CARD).is_file():
        return True
    try:
        with zipfile.ZipFile(archive) as packed:
            listing: _Listing = json.loads(packed.read(LISTING))
            if int8 and read_runtime_card(export).ranges != json.loads(packed.read(INT8 + CARD))["ranges"]:
                return False
    except (zipfile.BadZipFile, KeyError, ValueError):
        return True  # `assemble` says what is wrong with it
    return any(
        not (export / name).is_file() or sha256_of(export / name) != listing["files"][stored]["sha256"]
        for name, stored in _parts(listing, int8=int8).items()
    )


class _Tensors:
    """Bytes of tensors, by file and name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, safe_open] = {}

    def __call__(self, file: str, name: str, form: str) -> bytes:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self._root / file, framework="numpy")
        return FORMS[form](self._files[file].get_tensor(name))


def filled(rest: bytes, holes: Sequence[Hole], tensors: Callable[[str, str, str], bytes]) -> bytes:
    """A file with its tensors; the holes in the order of their offsets."""
    out, used = bytearray(), 0
    for offset, source, name, form, patches in holes:
        upto = used + offset - len(out)
        out += rest[used:upto]
        used = upto
        out += tensors(source, name, form)
        for place, other in patches:
            data = bytes.fromhex(other)
            out[offset + place : offset + place + len(data)] = data
    return bytes(out + rest[used:])


def cut(data: bytes, pieces: Mapping[bytes, Tensor]) -> tuple[bytes, list[Hole]]:
    """The opposite of filling: a file without the pieces that occur in it, and its holes.

    Args:
        data: the file.
        pieces: bytes of a tensor → where they come from.
    """
    found = sorted(
        (offset, len(piece), tensor) for piece, tensor in pieces.items() if (offset := data.find(piece)) >= 0
    )
    rest, used = bytearray(), 0
    holes: list[Hole] = []
    for offset, length, tensor in found:
        if offset >= used:
            rest += data[used:offset]
            holes.append((offset, *tensor))
            used = offset + length
    return bytes(rest + data[used:]), holes


def patches_of(data: bytes, other: bytes) -> list[tuple[int, str]]:
    """Where bytes of the same number are others: runs of ``data``, in hexadecimal."""
    ours, theirs = (np.frombuffer(one, np.uint8) for one in (data, other))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (ours != theirs).astype(np.int8), [0]])))
    return [(int(start), data[start:end].hex()) for start, end in edges.reshape(-1, 2)]


def write_archive(
    files: Mapping[str, bytes],
    archive: Path,
    pieces: Mapping[str, Mapping[bytes, Tensor]],
    root: Path,
    *,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the archive of an export.

    Args:
        files: of the export that `wordbox export` wrote, with torch; those of the one in 8 bits begin with `INT8`.
        archive: `graphs_of` the weights.
        pieces: of `cut`, by the files.
        root: that the files of the pieces are named relative to.
        beside: what else it holds, by name.
    """
    listing: dict[str, _File] = {}
    rests: dict[str, bytes] = {}
    for name in sorted(files):
        rests[name], holes = cut(files[name], pieces.get(name, {}))
        listing[name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "holes": holes}
    sources = sorted({hole[1] for part in listing.values() for hole in part["holes"]})
    content: _Listing = {"sources": {name: sha256_of(root / name) for name in sources}, "files": listing}
    with zipfile.ZipFile(archive, "w") as packed:
        for name, data in {LISTING: json.dumps(content).encode(), **rests, **(beside or {})}.items():
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same archive whenever it is made
            packed.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
