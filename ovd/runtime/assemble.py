# SPDX-License-Identifier: Apache-2.0
"""The export of the shipped default without torch: graphs without their weights, filled from the weights' files.

Tracing a network needs torch; its weights lie in the repository already. So an archive beside them
(``weights/NAME-graphs.zip``, some hundred kilobytes) holds the files of an export with the tensors cut out, and says
which tensor goes where. What comes out is the export, byte for byte. ``scripts/build_graphs.py`` writes the archive.

    holes.json    {"sources": {file: sha256}, "files": {name: {"sha256": …, "holes": [hole, …]}}}
    NAME          each file without what is in its holes
    int8/NAME     the same of files that are others in 8 bits
    ranges.json   of activations, which those were quantised with (`ovd.runtime.quantise`)

A hole is ``[offset, file, tensor, form, patches]``: the offset in the file that results, one of `FORMS`, and bytes of
the tensor to be replaced, ``[[offset, hex], …]``: of weights in 8 bits the channels whose sign a batch norm flips, and
those that ONNX Runtime gives another scale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from ovd.runtime.files import CARD, COPIED, EXPORT_FOLDER, INT8_FOLDER, graphs_of, read_runtime_card
from pretrain.engine.errors import NEEDS_TORCH, UserError
from pretrain.engine.files import sha256_of, whole_folder, write_atomically

if TYPE_CHECKING:
    from safetensors import safe_open

Patches: TypeAlias = Sequence[tuple[int, str]]
Hole: TypeAlias = tuple[int, str, str, str, Patches]
LISTING, RANGES = "holes.json", "ranges.json"
INT8 = "int8/"


class _PackedGraph(TypedDict):
    sha256: str
    holes: list[Hole]


class _Listing(TypedDict):
    sources: dict[str, str]
    files: dict[str, _PackedGraph]


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
"""Forms of a stored tensor in a graph: its bytes, little-endian."""


def assemble(folder: Path, target: Path, *, int8: bool = False) -> None:
    """Write the export of a detector's folder.

    Args:
        folder: of the weights, with its archive beside it; tensors are read from files named relative to its parent.
        target: is made, and replaced where it is another export.
        int8: the one in 8 bits.

    Raises:
        UserError: no archive, or one of other weights.
    """
    archive = graphs_of(folder)
    if not archive.is_file():
        raise UserError(
            f"{folder}: no {archive.name} beside it, which an export is built from without torch; install torch "
            f"to write one: {NEEDS_TORCH}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(target) as folder_in_work, zipfile.ZipFile(archive) as packed:
            _write_files(packed, folder.parent, folder_in_work, int8=int8)
            for name in COPIED:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, folder_in_work / name)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as problem:
        raise UserError(f"{archive}: cannot be read ({problem}); restore it from the repository") from problem


def _write_files(packed: zipfile.ZipFile, root: Path, target: Path, *, int8: bool) -> None:
    """Write the archive's files with their tensors, which are read from files below ``root``.

    Raises:
        UserError: no such export in the archive, other weights, or a damaged archive.
    """
    archive = Path(str(packed.filename))
    listing: _Listing = json.loads(packed.read(LISTING))
    if int8 and INT8 + CARD not in listing["files"]:
        raise UserError(f"{archive.name}: has no graphs in 8 bits; rebuild it with scripts/build_graphs.py")
    for name, digest in listing["sources"].items():
        if not (root / name).is_file() or sha256_of(root / name) != digest:
            raise UserError(
                f"{root / name}: is not what {archive.name} was made of; scripts/build_graphs.py makes it "
                "anew (this needs torch)"
            )
    tensors = _Tensors(root)
    for name, stored in _archived_names(listing, int8=int8).items():
        entry = listing["files"][stored]
        data = fill_holes(packed.read(stored), entry["holes"], tensors)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise UserError(f"{archive}: damaged, {stored} comes out wrong; restore it from the repository")
        write_atomically(target / name, data)


def _archived_names(listing: _Listing, *, int8: bool) -> dict[str, str]:
    """File of an export → its name in the archive."""
    names = {name: name for name in listing["files"] if not name.startswith(INT8)}
    if int8:
        names |= {name.removeprefix(INT8): name for name in listing["files"] if name.startswith(INT8)}
    return names


def bundled_export(folder: Path, *, int8: bool) -> Path | None:
    """The export of a detector's folder, written from its archive where there is none, or one of another version.

    It lies in the folder, or, where that may not be written, among the user's files. One in 8 bits for photos of
    somebody's own is left as it is.

    Returns:
        None: there is no archive that has it.

    Raises:
        UserError: see `assemble`.
    """
    from ovd.weights import user_folder

    archive, name = graphs_of(folder), INT8_FOLDER if int8 else EXPORT_FOLDER
    if not has_export(archive, int8=int8):
        return None
    target = folder / name
    if not _is_outdated(archive, target, int8=int8):
        return target
    if not os.access(folder, os.W_OK):
        target = user_folder("exports", "XDG_CACHE_HOME", ".cache") / folder.name / name
        if not _is_outdated(archive, target, int8=int8):
            return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"the export of {folder.name} cannot be written beside the weights or to {target.parent} "
            f"({problem.strerror}); set WORDBOX_HOME to a folder that you can write"
        ) from problem
    assemble(folder, target, int8=int8)
    return target


def has_export(archive: Path, *, int8: bool) -> bool:
    """Whether an archive is there, and has an export of this kind."""
    if not archive.is_file():
        return False
    try:
        with zipfile.ZipFile(archive) as packed:
            return not int8 or INT8 + CARD in packed.namelist()
    except zipfile.BadZipFile:
        return True  # `assemble` says what is wrong with it


def _is_outdated(archive: Path, export: Path, *, int8: bool) -> bool:
    """Whether an export is missing or of another version; one in 8 bits for a user's own photos never is."""
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
        for name, stored in _archived_names(listing, int8=int8).items()
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


def fill_holes(stripped: bytes, holes: Sequence[Hole], tensors: Callable[[str, str, str], bytes]) -> bytes:
    """A file with its tensors; the holes in the order of their offsets."""
    out, position = bytearray(), 0
    for offset, source, name, form, patches in holes:
        end = position + offset - len(out)
        out += stripped[position:end]
        position = end
        out += tensors(source, name, form)
        for start, replacement in patches:
            data = bytes.fromhex(replacement)
            out[offset + start : offset + start + len(data)] = data
    return bytes(out + stripped[position:])


def cut_tensors(data: bytes, tensors: Mapping[bytes, Tensor]) -> tuple[bytes, list[Hole]]:
    """The inverse of `fill_holes`: a file without the tensors found in it, and its holes.

    Args:
        data: the file.
        tensors: bytes of a tensor → where they come from.
    """
    occurrences = sorted(
        (offset, len(values), tensor) for values, tensor in tensors.items() if (offset := data.find(values)) >= 0
    )
    stripped, position = bytearray(), 0
    holes: list[Hole] = []
    for offset, length, tensor in occurrences:
        if offset >= position:
            stripped += data[position:offset]
            holes.append((offset, *tensor))
            position = offset + length
    return bytes(stripped + data[position:]), holes


def patches_of(data: bytes, other: bytes) -> list[tuple[int, str]]:
    """The runs of ``data``, in hexadecimal, where ``other``, of the same length, differs."""
    differs = np.frombuffer(data, np.uint8) != np.frombuffer(other, np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], differs.astype(np.int8), [0]])))
    return [(int(start), data[start:end].hex()) for start, end in edges.reshape(-1, 2)]


def write_archive(
    files: Mapping[str, bytes],
    archive: Path,
    tensors: Mapping[str, Mapping[bytes, Tensor]],
    root: Path,
    *,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write the archive of an export.

    Args:
        files: of the export that `wordbox export` wrote, with torch; those of the one in 8 bits begin with `INT8`.
        archive: `graphs_of` the weights.
        tensors: of `cut_tensors`, by the files.
        root: that the tensors' files are named relative to.
        extra: what else it holds, by name.
    """
    listing: dict[str, _PackedGraph] = {}
    stripped: dict[str, bytes] = {}
    for name in sorted(files):
        stripped[name], holes = cut_tensors(files[name], tensors.get(name, {}))
        listing[name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "holes": holes}
    sources = sorted({hole[1] for entry in listing.values() for hole in entry["holes"]})
    content: _Listing = {"sources": {name: sha256_of(root / name) for name in sources}, "files": listing}
    with zipfile.ZipFile(archive, "w") as packed:
        for name, data in {LISTING: json.dumps(content).encode(), **stripped, **(extra or {})}.items():
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same archive whenever it is made
            packed.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
