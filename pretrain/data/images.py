# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures to learn from: a folder, ImageNet's layout, CIFAR-10, tar shards, Sticker Scenes.

Captioned pictures are in `pretrain.data.image_text`.

Each is an `ImageSet`: `Pictures`, and `label(index)` → class number, −1 for none. All of them can be sent to loader
workers. Other sources are `Pictures` with captions (`CaptionedSet`) or with ids (`IdentifiedPictures`): those of a
region store (`ovd.regions.layout.ImageSource`), of an evaluation, and of `wordbox predict` (`ovd.picture_files`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.config_views import CifarData, FolderData, ImageData, ShardData, StickerScenes, StickerSingles
from pretrain.data.coco_entries import ImageId
from pretrain.data.folder import EXTENSIONS, U8, list_images, read_image
from pretrain.data.pairs import StickerCrops
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Split, Stickers
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import write_atomically
from pretrain.engine.identity import files_identity

NO_LABEL = -1
CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2  # a label, then the red, green and blue plane
MAX_SHARDS = 1_000_000


class Pictures(Protocol):
    """Pictures by number: what every source has that training, embedding and measuring read."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> U8:
        """uint8 (H, W, 3) RGB, upright. ``BadImageError`` if it cannot be read."""


class IdentifiedPictures(Pictures, Protocol):
    """Pictures with the ids that annotations, stores and results name them by."""

    @property
    def ids(self) -> Sequence[ImageId]:
        """That of picture ``index`` is ``ids[index]``."""


class ImageSet(Pictures, Protocol):
    """Pictures to learn from without captions."""

    def label(self, index: int) -> int:
        """Class number, or −1."""


Builders = Mapping[type[ImageData], Callable[[Any], ImageSet]]
"""What opens the pictures of a section, by the section's class."""


def build_images(config: ImageData, *, more: Builders = MappingProxyType({})) -> ImageSet:
    """The pictures a config section describes.

    Args:
        config: The section.
        more: Builders of sections that are not in this module's table.

    Raises:
        UserError: They are not there, or there is none.
    """
    builders: Builders = {
        FolderData: lambda c: FolderSet(c.root, classes=c.classes),
        CifarData: lambda c: CifarSet(c.root, split=c.split),
        ShardData: lambda c: ShardSet(c.pattern),
        StickerScenes: lambda c: SceneSet(
            SceneSource(Stickers.load(c.root), split=c.split, seed=c.seed, size=c.size, length=c.length)
        ),
        StickerSingles: lambda c: SingleSet(
            Stickers.load(c.root), split=c.split, size=c.size, views=c.views, seed=c.seed
        ),
        **more,
    }
    return builders[type(config)](config)


class FolderSet:
    """Pictures below a folder, sorted by path.

    Args:
        root: The folder.
        classes: The folders directly below it are classes, numbered by name, as in ImageNet's layout.

    Raises:
        UserError: No folder, no picture, or a picture outside of a class folder.
    """

    def __init__(self, root: Path, *, classes: bool = False) -> None:
        paths = list_images(root)
        self.root, self.names = root, [path.relative_to(root).as_posix() for path in paths]
        self.classes: tuple[str, ...] = ()
        self._labels: np.ndarray | None = None
        if classes:
            loose = next((name for name in self.names if "/" not in name), None)
            if loose is not None:
                raise UserError(
                    f"{root / loose} is in no class folder; move it into one, or set classes: false to ignore classes"
                )
            owners = [name.split("/", 1)[0] for name in self.names]
            self.classes = tuple(sorted(set(owners)))
            number = {name: i for i, name in enumerate(self.classes)}
            self._labels = np.array([number[owner] for owner in owners], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def identity(self) -> dict[str, str]:
        """Names and content of the files."""
        return files_identity("pictures", self.root, self.names)

    def image(self, index: int) -> U8:
        """Decode one file."""
        return read_image(self.root / self.names[index])

    def label(self, index: int) -> int:
        """Number of its folder in ``classes``; −1 without classes."""
        return NO_LABEL if self._labels is None else int(self._labels[index])


class CifarSet:
    """CIFAR-10 in its binary version; the version for Python is a pickle, which can run code and is not read.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, root: Path, *, split: str = "train") -> None:
        folder = root / "cifar-10-batches-bin" if (root / "cifar-10-batches-bin").is_dir() else root
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            pickled = [folder, root / "cifar-10-batches-py"]
            if any((directory / name).is_file() for directory in pickled for name in ("data_batch_1", "test_batch")):
                raise UserError(
                    f"{root} holds CIFAR-10's version for Python, which is a pickle and is not read: a pickle can run "
                    f"code; fetch the binary version (cifar-10-binary.tar.gz, with {names[0]})"
                )
            raise UserError(
                f"{folder / missing[0]} is missing; root must hold CIFAR-10's binary version ({', '.join(names)})"
            )
        parts = []
        for name in names:
            path = folder / name
            size = path.stat().st_size
            if size == 0 or size % CIFAR_RECORD:
                raise UserError(f"{path} has {size} bytes, not a multiple of {CIFAR_RECORD}; fetch it again")
            parts.append(np.fromfile(path, np.uint8).reshape(-1, CIFAR_RECORD))
        self._rows = np.concatenate(parts)
        if self._rows[:, 0].max() > 9:
            raise UserError(f"{folder} has labels above 9, so it is not CIFAR-10; fetch cifar-10-binary.tar.gz")

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self) -> dict[str, str]:
        """Content of the files."""
        return {"pictures": hashlib.sha256(self._rows.tobytes()).hexdigest()}

    def image(self, index: int) -> U8:
        """(32, 32, 3)."""
        return np.ascontiguousarray(self._rows[index, 1:].reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0))

    def label(self, index: int) -> int:
        """0 to 9."""
        return int(self._rows[index, 0])


def expand_braces(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` → a-00.tar, a-01.tar, a-02.tar; ``{x,y}`` → x and y; several groups multiply.

    Raises:
        UserError: A range that runs backwards or gives more than a million names.
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

    Args:
        pattern: Path with ``{000..146}``, ``{a,b}`` or wildcards.

    Raises:
        UserError: No such file, no tar file, a compressed one, or no picture in it.
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
        for number, path in enumerate(self.paths):
            for key, *entry in _index_of(path):
                keys.append(key)
                rows.append((number, *entry))
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
        """The text of ``KEY.txt``; empty without. ``BadImageError`` if it cannot be read."""
        return self._read(index, *self._rows[index, 4:6]).decode("utf-8", errors="replace").strip()

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


def _index_of(path: Path) -> list[ShardEntry]:
    """Where the pictures of a shard are, from its index file or by reading the headers."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    index_file = path.with_name(path.name + ".index.json")
    try:
        stored = json.loads(index_file.read_text(encoding="utf-8"))
        if stored["format"] == "shard-index/2" and stored["shard"] == stamp:
            return [(str(key), int(a), int(b), int(c), int(d), int(e)) for key, a, b, c, d, e in stored["pictures"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or of another file: make it again
    pictures: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    captions: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                # webdataset: what comes before the first dot of the file name is the key of a sample
                parent, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                key = f"{parent}/{key}"
                if f".{extension.lower()}".endswith(EXTENSIONS):
                    pictures.append((key, member.name, member.offset_data, member.size))
                elif extension.lower() == "cls":
                    content = shard.extractfile(member)
                    labels[key] = _label(content.read(32) if content else b"", path, member.name)
                elif extension.lower() == "txt":
                    captions[key] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar file ({error}); unpack a compressed one first: pictures are "
            "read at their position"
        ) from error
    entries: list[ShardEntry] = [
        (name, start, size, labels.get(key, NO_LABEL), *captions.get(key, (0, 0)))
        for key, name, start, size in pictures
    ]
    if os.access(path.parent, os.W_OK):
        text = json.dumps({"format": "shard-index/2", "shard": stamp, "pictures": entries})
        write_atomically(index_file, text.encode("utf-8"))
    return entries


def _label(content: bytes, path: Path, name: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"{path}/{name} holds {content[:20]!r}, but a .cls file holds a class number") from error


class SceneSet:
    """The pictures of sticker scenes, without labels."""

    def __init__(self, source: SceneSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the drawings."""
        return self.source.stickers.identity()

    def image(self, index: int) -> U8:
        """Compose one scene."""
        return self.source.scene(index).image

    def label(self, index: int) -> int:
        """−1: a scene shows several things."""
        return NO_LABEL


class SingleSet:
    """Single stickers with their class.

    Args:
        stickers: The data set.
        split: "train": the training styles on training photos; "val": the held-out style on held-out photos.
        size: Side of a picture.
        views: Pictures of each drawing.
        seed: Of photos, places and lights.
    """

    def __init__(self, stickers: Stickers, *, split: Split, size: int, views: int, seed: int) -> None:
        self.classes = stickers.nouns
        self.stickers = stickers
        self._styles = [  # each style with a seed of its own: a class must not be on one photo in all of them
            StickerCrops(stickers, style=style, size=size, views=views, seed=seed + (number << 32), photos=split)
            for number, style in enumerate(stickers.styles[split])
        ]
        self._ends = np.cumsum([len(style) for style in self._styles])
        self._labels = np.concatenate([style.class_ids for style in self._styles])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def identity(self) -> dict[str, str]:
        """Fingerprint of the drawings."""
        return self.stickers.identity()

    def image(self, index: int) -> U8:
        """Compose one picture."""
        style = int(np.searchsorted(self._ends, index, side="right"))
        first = 0 if style == 0 else int(self._ends[style - 1])
        return np.ascontiguousarray(self._styles[style].sample(index - first)[0].transpose(1, 2, 0))

    def label(self, index: int) -> int:
        """Class id of the sticker."""
        return int(self._labels[index])
