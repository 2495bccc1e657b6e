# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures to learn from: a folder, ImageNet's layout, CIFAR-10, tar shards, Sticker Scenes.

Captioned pictures are in `pretrain.data.image_text`.

Each is an `ImageSet`: `Pictures`, and `label(index)` → class number, −1 for none. All of them can be sent to loader
workers. Other sources are `Pictures` with captions (`CaptionedSet`) or with ids (`IdentifiedPictures`): those of a
region store (`ovd.regions.layout.ImageSource`), of an evaluation, and of `wordbox predict` (`ovd.picture_files`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from pretrain.config_views import CifarData, FolderData, ImageData, ShardData, StickerScenes, StickerSingles
from pretrain.data.coco_entries import ImageId
from pretrain.data.folder import U8, list_images, read_image
from pretrain.data.pairs import StickerCrops
from pretrain.data.scenes import SceneSource
from pretrain.data.shards import NO_LABEL, ShardSet
from pretrain.data.stickers import Split, Stickers
from pretrain.engine.errors import UserError
from pretrain.engine.identity import files_identity

CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2  # a label, then the red, green and blue plane


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
        config: the section.
        more: builders of sections that are not in this module's table.

    Raises:
        UserError: they are not there, or there is none.
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
        root: the folder.
        classes: the folders directly below it are classes, numbered by name, as in ImageNet's layout.

    Raises:
        UserError: no folder, no picture, or a picture outside of a class folder.
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
        UserError: a file is missing or damaged.
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
        stickers: the data set.
        split: "train": the training styles on training photos; "val": the held-out style on held-out photos.
        size: side of a picture.
        views: pictures of each drawing.
        seed: of photos, places and lights.
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
