# SPDX-License-Identifier: Apache-2.0
"""Pictures in uncompressed tar files, in webdataset's layout."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.data.folder import EXTENSIONS, U8, read_image
from pretrain.engine.errors import BadImageError, UserError, warn
from pretrain.engine.files import write_atomically
from pretrain.engine.identity import files_identity

NO_LABEL = -1
MAX_SHARDS = 1_000_000
FORMAT = "shard-index/3"
MAX_PADDING = 1 << 20
"""Bytes of zeros after the end of an archive: tar fills its last record, of 10 kB or what --blocking-factor says."""


def expand_braces(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` → a-00.tar, a-01.tar, a-02.tar; ``{x,y}`` → x and y; several groups multiply.

    Raises:
        UserError: a range that runs backwards or gives more than a million names.
    """
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < MAX_SHARDS:
            raise UserError(f"{pattern}: {{{group[1]}}} must run upwards and give at most {MAX_SHARDS:,} names")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 1
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = group[1].split(",")
    head, tail = pattern[: group.start()], pattern[group.end() :]
    return [head + choice + tails for choice in choices for tails in expand_braces(tail)]


class ShardSet:
    """Pictures in uncompressed tar files: ``KEY.jpg`` (or another picture) and, if they are there, ``KEY.cls`` with a
    class number and ``KEY.txt`` with a caption.

    The place of every picture is noted once, in ``NAME.tar.index.json`` beside the shard (or only in memory, when its
    folder cannot be written); after that a picture is one read at a known position. Nothing is extracted.

    Of several pictures of a key those with a longer ending (``KEY.seg.png`` beside ``KEY.jpg``) are left out. This, and
    other things that look odd, are told with their number on standard error.

    Args:
        pattern: path with ``{000..146}``, ``{a,b}`` or wildcards.

    Raises:
        UserError: no such file, no tar file, a compressed one, one cut off or joined to another, or no picture in it.
    """

    def __init__(self, pattern: str) -> None:
        self.paths: list[Path] = []
        for name in expand_braces(pattern):
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            for match in matches:
                if not Path(match).is_file():
                    raise UserError(f"{match} does not exist; data.pattern {pattern} names it")
                self.paths.append(Path(match))
        if not self.paths:
            raise UserError(f"data.pattern {pattern} matches no file")
        keys: list[str] = []
        rows: list[tuple[int, ...]] = []
        odd: dict[str, tuple[int, str]] = {}
        for number, path in enumerate(self.paths):
            index = _index_of(path)
            for key, *entry in index.pictures:
                keys.append(key)
                rows.append((number, *entry))
            for what, (count, first) in index.odd.items():
                before, earliest = odd.get(what, (0, f"{path}/{first}"))
                odd[what] = (before + count, earliest)
        if odd and os.environ.get("RANK", "0") == "0":
            for what, (count, earliest) in odd.items():
                warn(f"{pattern}: {count:,} {what}, such as {earliest}")
        if not rows:
            raise UserError(f"{pattern}: no picture ({', '.join(EXTENSIONS)}) in {len(self.paths)} tar files")
        self._keys, self._rows = np.array(keys), np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self) -> dict[str, str]:
        """Names and content of the shards."""
        return files_identity(
            "shards", self.paths[0].parent, [os.path.relpath(p, self.paths[0].parent) for p in self.paths]
        )

    def image(self, index: int) -> U8:
        """Read and decode one member."""
        try:
            return read_image(self._read(index, *self._rows[index, 1:3]))
        except BadImageError as error:
            raise BadImageError(self.name(index), error.reason) from error

    def label(self, index: int) -> int:
        """The number in ``KEY.cls``; −1 without."""
        return int(self._rows[index, 3])

    @property
    def captioned(self) -> NDArray[np.bool_]:
        """(N,) whether there is a ``KEY.txt``."""
        return self._rows[:, 5] > 0

    def caption(self, index: int) -> str:
        """The text of ``KEY.txt``; empty without. ``BadImageError`` if it cannot be read, or is not UTF-8."""
        try:
            return self._read(index, *self._rows[index, 4:6]).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadImageError(self.name(index), f"has a caption that is not UTF-8 (byte {error.start})") from error

    def name(self, index: int) -> str:
        """Shard and member, for messages."""
        return f"{self.paths[int(self._rows[index, 0])]}/{self._keys[index]}"

    def _read(self, index: int, start: int, size: int) -> bytes:
        try:
            with self.paths[int(self._rows[index, 0])].open("rb") as shard:
                shard.seek(int(start))
                return shard.read(int(size))
        except OSError as error:
            raise BadImageError(self.name(index), f"cannot be read: {error.strerror}") from error


ShardEntry = tuple[str, int, int, int, int, int]
"""Name of a picture in its shard, its first byte and length, its label, first byte and length of its caption or 0."""


class ShardIndex(NamedTuple):
    """What is in a shard.

    Attributes:
        pictures: where they are.
        odd: what looks odd -> how often, and the name of the first.
    """

    pictures: list[ShardEntry]
    odd: dict[str, tuple[int, str]]


def _index_of(path: Path) -> ShardIndex:
    """Where the pictures of a shard are, from its index file or by reading the headers."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    index_file = path.with_name(path.name + ".index.json")
    try:
        stored = json.loads(index_file.read_text(encoding="utf-8"))
        if stored["format"] == FORMAT and stored["shard"] == stamp:
            return ShardIndex(
                [(str(key), int(a), int(b), int(c), int(d), int(e)) for key, a, b, c, d, e in stored["pictures"]],
                {str(what): (int(count), str(first)) for what, (count, first) in stored["odd"].items()},
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none, or of another file: make it again
    index = _scan(path)
    if os.access(path.parent, os.W_OK):
        text = json.dumps({"format": FORMAT, "shard": stamp, **index._asdict()})
        write_atomically(index_file, text.encode("utf-8"))
    return index


def _scan(path: Path) -> ShardIndex:
    """Read the headers of a shard."""
    pictures: dict[str, tuple[str, bool, int, int]] = {}
    labels: dict[str, int] = {}
    captions: dict[str, tuple[int, int]] = {}
    twice: list[str] = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                # webdataset: what comes before the first dot of the file name is the key of a sample
                parent, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                key, extension = f"{parent}/{key}", extension.lower()
                if not member.isfile() or base.startswith("."):  # a hidden file, such as macOS's ._a.jpg
                    continue
                if f".{extension}".endswith(EXTENSIONS):
                    twice += [member.name] if member.name in pictures else []
                    plain = f".{extension}" in EXTENSIONS
                    pictures[member.name] = (key, plain, member.offset_data, member.size)
                elif extension == "cls":
                    twice += [member.name] if key in labels else []
                    content = shard.extractfile(member)
                    labels[key] = _label(content.read(32) if content else b"", path, member.name)
                elif extension == "txt":
                    twice += [member.name] if key in captions else []
                    captions[key] = (member.offset_data, member.size)
            _require_end(path, shard.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar file ({error}); unpack a compressed one first: pictures are "
            "read at their position"
        ) from error
    plain_keys = {key for key, plain, _, _ in pictures.values() if plain}
    chosen = [name for name, (key, plain, _, _) in pictures.items() if plain or key not in plain_keys]
    kept, keys = set(chosen), {pictures[name][0] for name in chosen}
    odd = {
        "files are there twice, and the later one counts": twice,
        "further pictures of a sample are left out": [name for name in pictures if name not in kept],
        "captions have no picture": [f"{key}.txt".lstrip("/") for key in captions if key not in keys],
    }
    entries: list[ShardEntry] = []
    for name in chosen:
        key, _, start, size = pictures[name]
        entries.append((name, start, size, labels.get(key, NO_LABEL), *captions.get(key, (0, 0))))
    return ShardIndex(entries, {what: (len(names), names[0]) for what, names in odd.items() if names})


def _require_end(path: Path, end: int) -> None:
    """Look behind the end of an archive: what lies there is not read.

    Raises:
        UserError: more files, or more zeros than tar writes.
    """
    with path.open("rb") as file:
        file.seek(end)
        zeros = 0
        while block := file.read(1 << 20):
            if block.count(0) < len(block):
                raise UserError(
                    f"{path}: goes on after its end, as tar files do that were joined with cat; what follows would not "
                    "be read: unpack it with tar --ignore-zeros, and pack it again"
                )
            zeros += len(block)
    if zeros > MAX_PADDING:
        raise UserError(f"{path}: ends in {zeros:,} bytes of zeros, as if it was not copied to its end; fetch it again")


def _label(content: bytes, path: Path, name: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"{path}/{name} holds {content[:20]!r}, but a .cls file holds a class number") from error
