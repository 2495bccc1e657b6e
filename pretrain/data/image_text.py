# SPDX-License-Identifier: Apache-2.0
"""Photos with captions for CLIP: a table of paths and texts, COCO's captions, or tar shards.

    source = CaptionedSource(build_captioned(config), size=224, seed=0)

A picture is cut to a random square of its short side and resized, CLIP's only augmentation (arXiv:2103.00020, §2.3);
where a picture has several captions one is drawn. Both are pure functions of (seed, index, draw).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.config import CaptionedConfig, CaptionedShards, CaptionTable, CocoCaptions
from pretrain.data.coco import read_captions
from pretrain.data.crops import resized
from pretrain.data.dice import Dice
from pretrain.data.folder import U8, read_image, require_files
from pretrain.data.images import Pictures
from pretrain.data.pairs import PairSource
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import is_main
from pretrain.engine.errors import BadImageError, UserError, warn
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.identity import files_identity, identity_of, text_identity


class CaptionedSet(Pictures, Protocol):
    """Pictures with their captions, by number."""

    def captions(self, index: int) -> Sequence[str]:
        """At least one."""


def build_captioned(config: CaptionedConfig) -> CaptionedSet:
    """The pictures a config section describes.

    Raises:
        UserError: they are not there, or have no captions.
    """
    builders: Mapping[type, Callable[..., CaptionedSet]] = {
        CaptionTable: table_of,
        CocoCaptions: coco_captions,
        CaptionedShards: lambda c: CaptionedShardSet(c.pattern),
    }
    return builders[type(config)](config)


class CaptionedFiles:
    """Files with their captions.

    Args:
        paths: one per picture.
        texts: one or more per picture.
    """

    def __init__(self, paths: Sequence[Path], texts: Sequence[Sequence[str]]) -> None:
        self.paths, self.texts = paths, texts

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> dict[str, str]:
        """Names and content of the files, and the captions."""
        root = Path(os.path.commonpath([path.parent for path in self.paths]))
        names = [os.path.relpath(path, root) for path in self.paths]
        return {**files_identity("pictures", root, names), "captions": text_identity(self.texts)}

    def image(self, index: int) -> U8:
        """Decode one file."""
        return read_image(self.paths[index])

    def captions(self, index: int) -> Sequence[str]:
        """Those of the file."""
        return self.texts[index]


def table_of(config: CaptionTable) -> CaptionedFiles:
    """Rows of a .csv (commas) or .tsv (tabs) file with a header; rows of the same picture are its captions.

    Raises:
        UserError: the file is not there, lacks a column, or has a row without a path or a caption.
    """
    path = config.path
    tabs = path.suffix.lower() in (".tsv", ".tab")
    root = path.parent if config.root is None else config.root
    texts: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if tabs:  # a .tsv has no quotes: one in a caption is a character like others
                rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                rows = csv.DictReader(file, strict=True)
            if not rows.fieldnames:
                raise UserError(f"{path} is empty; it needs a header with the columns {config.image}, {config.caption}")
            missing = [name for name in (config.image, config.caption) if name not in rows.fieldnames]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}, but {', '.join(map(repr, rows.fieldnames))}; name the "
                    "columns of paths and texts with data.image and data.caption"
                )
            for row in rows:
                if None in row:
                    hint = "" if tabs else "; a caption with a comma in it stands in double quotes"
                    raise UserError(f"{path}, line {rows.line_num}: more fields than the header has columns{hint}")
                name, text = (str(row[key] or "").strip() for key in (config.image, config.caption))
                if not name or not text:
                    raise UserError(
                        f"{path}, line {rows.line_num}: a row needs a path and a caption; {dict(row)} lacks one"
                    )
                texts.setdefault(name, []).append(text)
    except FileNotFoundError:
        raise UserError(f"data.path {path} does not exist; give a .csv or .tsv file with a header") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path} cannot be read as a table in UTF-8: {problem}") from problem
    if not texts:
        raise UserError(f"{path} has a header and no rows")
    _warn_of_missing(texts, root, where=f"{path}, column {config.image!r} (data.image)")
    return CaptionedFiles([root / name for name in texts], list(texts.values()))


def coco_captions(config: CocoCaptions) -> CaptionedFiles:
    """COCO's captions_*.json: every picture that has one; the others are counted in a warning.

    Raises:
        UserError: not such a file, or its first picture is not in the folder.
    """
    path = config.annotations
    hint = "data.annotations is captions_train2017.json of annotations_trainval2017.zip, not instances_train2017.json"
    captions = read_captions(path, hint=hint)
    if not captions.files:
        raise UserError(f"{path} has no captions")
    _warn_of_uncaptioned(captions.without, len(captions.files) + captions.without, where=str(path))
    _warn_of_missing(captions.files, config.images, where=str(path))
    return CaptionedFiles([config.images / name for name in captions.files], captions.texts)


def _warn_of_uncaptioned(without: int, pictures: int, *, where: str) -> None:
    if without and is_main():
        warn(f"{where}: {without:,} of {pictures:,} pictures have no caption and are left out")


def _warn_of_missing(names: Iterable[str], folder: Path, *, where: str) -> None:
    """Warn of a few pictures that are missing, which the loop passes over; refuse more."""
    missing = require_files(names, folder, where=where, allowed=BAD_IMAGES_ALLOWED)
    if missing and is_main():
        warn(missing)


class CaptionedShardSet:
    """Pictures of tar shards that have a ``KEY.txt``.

    Raises:
        UserError: no such shard, or no captions in them.
    """

    def __init__(self, pattern: str) -> None:
        self.shards = ShardSet(pattern)
        self._chosen = np.flatnonzero(self.shards.captioned)
        if not len(self._chosen):
            raise UserError(
                f"{pattern}: none of {len(self.shards):,} pictures has a caption (KEY.txt beside KEY.jpg; .json "
                "is not read)"
            )
        _warn_of_uncaptioned(len(self.shards) - len(self._chosen), len(self.shards), where=pattern)

    def __len__(self) -> int:
        return len(self._chosen)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the shards."""
        return self.shards.identity()

    def image(self, index: int) -> U8:
        """Read and decode one member."""
        return self.shards.image(int(self._chosen[index]))

    def captions(self, index: int) -> Sequence[str]:
        """Its text."""
        number = int(self._chosen[index])
        text = self.shards.caption(number)
        if not text:
            raise BadImageError(self.shards.name(number), "has an empty caption")
        return [text]


class CaptionedSource:
    """Squares of pictures, each with one of its captions: a sample source for CLIP.

    A sample is (image uint8 (3, S, S), caption, index).

    Args:
        images: the pictures.
        size: S.
        seed: squares of different seeds share nothing.
    """

    def __init__(self, images: CaptionedSet, *, size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures and captions."""
        return identity_of(self.images)

    def sample(self, index: int, draw: int = 0) -> tuple[U8, str, int]:
        """Picture ``index``.

        Raises:
            BadImageError: it, or its caption, cannot be read.
        """
        dice = Dice(self.seed, index, draw)
        texts = self.images.captions(index)
        picture = self.images.image(index)
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = dice.below(height - side + 1), dice.below(width - side + 1)
        square = resized(picture[top : top + side, left : left + side], self.size, "bicubic")
        return np.ascontiguousarray(square.transpose(2, 0, 1)), texts[dice.below(len(texts))], index

    collate = staticmethod(PairSource.collate)
