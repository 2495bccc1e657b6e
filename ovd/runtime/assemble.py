# SPDX-License-Identifier: Apache-2.0
"""The export of the shipped default without torch: graphs without their weights, filled from the weights' files.

Tracing a network needs torch; its weights lie in the repository already. So an archive beside them
(``weights/NAME-graphs.zip``, some hundred kilobytes) holds the files of an export with the tensors cut out, and says
which tensor goes where. What comes out is the export, byte for byte. ``scripts/build_graphs.py`` writes the archive.

    holes.json    {"sources": {file: sha256}, "files": {name: {"sha256": …, "holes": [hole, …]}}}
    NAME          each file without what is in its holes

A hole is ``[offset, file, tensor, form]``: where it begins in the file that results, and `FORMS`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from pretrain.engine.errors import NEEDS_TORCH, UserError
from pretrain.engine.files import sha256_of, whole_folder, write_atomically

if TYPE_CHECKING:
    from safetensors import safe_open

Tensor: TypeAlias = tuple[str, str, str]
"""File, name of the tensor in it, form."""
Hole: TypeAlias = tuple[int, str, str, str]
LISTING = "holes.json"
COPIED = ("model.json", "card.json", "card.md")
"""Files that an export has from the folder of its weights."""


class _File(TypedDict):
    sha256: str
    holes: list[Hole]


def graphs_of(folder: Path) -> Path:
    """The archive of a detector's folder, there or not."""
    return folder.with_name(f"{folder.name}-graphs.zip")


def bfloat16_rounded(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Single precision with 8 bits of mantissa, rounded to even: the networks are loaded so before they are traced."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _half(values: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(values).astype("<f2").tobytes()


def _single(values: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(values).astype("<f4").tobytes()


FORMS: Mapping[str, Callable[[NDArray[np.generic]], bytes]] = {
    "half": _half,
    "single": _single,
    "half transposed": lambda values: _half(values.T),
    "single transposed": lambda values: _single(values.T),
    "half bfloat16": lambda values: _half(bfloat16_rounded(values)),
    "single bfloat16": lambda values: _single(bfloat16_rounded(values)),
    "half bfloat16 transposed": lambda values: _half(bfloat16_rounded(values.T)),
    "single bfloat16 transposed": lambda values: _single(bfloat16_rounded(values.T)),
}
"""How a stored tensor stands in a graph: its bytes, little-endian."""


def assemble(folder: Path, target: Path) -> None:
    """Write the export of a detector's folder.

    Args:
        folder: of the weights, with its archive beside it; tensors are read from files named relative to its parent.
        target: is made, and replaced where it is an export.

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
    with whole_folder(target) as fresh:
        try:
            with zipfile.ZipFile(archive) as packed:
                listing = json.loads(packed.read(LISTING))
                for name, digest in listing["sources"].items():
                    if not (root / name).is_file() or sha256_of(root / name) != digest:
                        raise UserError(
                            f"{root / name}: is not what {archive.name} was made of; scripts/build_graphs.py makes it "
                            "anew (this needs torch)"
                        )
                tensors = _Tensors(root)
                for name, part in listing["files"].items():
                    data = filled(packed.read(name), part["holes"], tensors)
                    if hashlib.sha256(data).hexdigest() != part["sha256"]:
                        raise UserError(f"{archive}: damaged, {name} comes out wrong; restore it from the repository")
                    write_atomically(fresh / name, data)
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as problem:
            raise UserError(f"{archive}: cannot be read ({problem}); restore it from the repository") from problem
        for name in COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, fresh / name)


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
    for offset, source, name, form in holes:
        upto = used + offset - len(out)
        out += rest[used:upto]
        used = upto
        out += tensors(source, name, form)
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
    for offset, length, (source, name, form) in found:
        if offset >= used:
            rest += data[used:offset]
            holes.append((offset, source, name, form))
            used = offset + length
    return bytes(rest + data[used:]), holes


def write_archive(export: Path, archive: Path, pieces: Mapping[str, Mapping[bytes, Tensor]], root: Path) -> None:
    """Write the archive of an export.

    Args:
        export: folder that `wordbox export` wrote, with torch.
        archive: `graphs_of` the weights.
        pieces: of `cut`, by the export's files.
        root: that the files of the pieces are named relative to.
    """
    listing: dict[str, _File] = {}
    rests: dict[str, bytes] = {}
    for file in sorted(export.iterdir()):
        if file.name not in COPIED:
            data = file.read_bytes()
            rests[file.name], holes = cut(data, pieces.get(file.name, {}))
            listing[file.name] = {"sha256": hashlib.sha256(data).hexdigest(), "holes": holes}
    sources = sorted({source for part in listing.values() for _, source, _, _ in part["holes"]})
    content = {"sources": {name: sha256_of(root / name) for name in sources}, "files": listing}
    with zipfile.ZipFile(archive, "w") as packed:
        for name, data in {LISTING: json.dumps(content).encode(), **rests}.items():
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same archive whenever it is made
            packed.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
