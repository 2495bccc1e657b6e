# SPDX-License-Identifier: Apache-2.0
"""Sticker Scenes: drawings of 552 nouns that are composed onto photos, with exact boxes and masks.

This package has the drawings, the photos, and what all sources of composed pictures share. There are three sources:

* `pretrain.data.scenes.SceneSource`: scenes with labels, for detection;
* `pretrain.data.images.SceneSet`: their pictures only, for self-supervised learning;
* `pretrain.data.pairs.PairSource`: single stickers, as a detector's crop shows them, with a caption, for CLIP.

All follow the sample source protocol (`__len__`, `sample(index, draw)`, `collate`), and every sample is a pure function
of (split, seed, index[, draw]). `python -m pretrain.data.stickers` exports scenes as a COCO data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.data import render
from pretrain.data.dice import Dice
from pretrain.data.folder import EXTENSIONS, list_images, read_image
from pretrain.data.render import U8, Sprite
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.engine.identity import files_identity, text_identity

Split = Literal["train", "val"]

SPLIT_KEY: Mapping[str, int] = {"train": 0, "val": 1}
SCENE, PAIR, ORDER, CROP, SHAPE = range(5)  # last part of a random key: what is being drawn

WHERE = "set OVD_DATA to the data set folder"
EXTRA_TABLE = "extra_styles.json"
SHAPES = 96  # abstract distractor shapes per split


def data_root() -> Path:
    """The data set folder: `$OVD_DATA`, or `datasets/stickers` of this repository."""
    chosen = os.environ.get("OVD_DATA")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[3] / "datasets" / "stickers"


@dataclass
class Stickers:
    """The concept table, the split and the sprites; pictures are decoded when first drawn and kept.

    Attributes:
        nouns: class names, sorted; a class id is an index into it.
        supercategory: one per class.
        base: ids that may be labelled in detector training.
        novel: all other ids.
        validated: ids that have a sprite in the validation style.
        near_synonyms: groups of ids that users could call by one name.
        styles: drawing styles by split.
        split_hash: sha256 of the split file's content.
        extra_hash: sha256 of the table of further training styles; empty when they are left out.
    """

    root: Path
    nouns: tuple[str, ...]
    supercategory: tuple[str, ...]
    base: frozenset[int]
    novel: frozenset[int]
    validated: frozenset[int]
    near_synonyms: tuple[frozenset[int], ...]
    styles: Mapping[str, tuple[str, ...]]
    split_hash: str
    drawings: Mapping[str, Mapping[int, tuple[str, ...]]]  # style -> class id -> hexcodes
    unlabelled: Mapping[str, tuple[str, ...]]  # style -> hexcodes of distractors
    extra_hash: str = ""
    _sprites: dict[tuple[str, str], Sprite] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, root: Path | str | None = None, *, extra_styles: bool = False) -> Stickers:
        """Read the tables of `root` (default: `data_root()`).

        Args:
            root: the data set folder.
            extra_styles: train on the styles of `extra_styles.json` too. Validation stays as it is.

        Raises:
            UserError: a missing or damaged file, by name.
        """
        folder = Path(root) if root is not None else data_root()
        split = read_json(folder / "splits.json", hint=WHERE)
        rows = read_json(folder / "concepts.json", hint=WHERE)["concepts"]
        content = {key: value for key, value in split.items() if key != "sha256"}
        if split.get("sha256") != content_hash(content):
            raise UserError(f"{folder / 'splits.json'} was changed: its hash is {content_hash(content)}, "
                            f"not {split.get('sha256')}. Restore the file from the repository.")  # fmt: skip
        nouns = tuple(split["nouns"])
        number = {noun: index for index, noun in enumerate(nouns)}
        drawings: dict[str, dict[int, tuple[str, ...]]] = {}
        unlabelled: dict[str, tuple[str, ...]] = {}
        for listed in split["styles"].values():
            for style in listed:
                drawings[style], unlabelled[style] = {}, ()
        for row in rows:
            for style in row["styles"]:
                if row["labelled"]:
                    files = drawings[style].get(number[row["noun"]], ())
                    drawings[style][number[row["noun"]]] = (*files, row["hexcode"])
                else:
                    unlabelled[style] += (row["hexcode"],)
        styles = {name: tuple(listed) for name, listed in split["styles"].items()}
        extra = read_json(folder / EXTRA_TABLE, hint=WHERE) if extra_styles else {"styles": {}}
        for style, more in extra_drawings(extra, number, where=folder / EXTRA_TABLE).items():
            drawings[style], unlabelled[style] = more, ()
            styles["train"] += (style,)
        groups_file = folder / "near_synonyms.json"
        groups = read_json(groups_file)["groups"] if groups_file.exists() else []
        return cls(
            root=folder,
            nouns=nouns,
            supercategory=tuple(split["supercategory"]),
            base=frozenset(number[noun] for noun in split["base"]),
            novel=frozenset(number[noun] for noun in split["novel"]),
            validated=frozenset(number[noun] for noun in split["validated"]),
            near_synonyms=tuple(frozenset(number[noun] for noun in group) for group in groups),
            styles=styles,
            split_hash=split["sha256"],
            drawings=drawings,
            unlabelled=unlabelled,
            extra_hash=content_hash(extra) if extra_styles else "",
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_sprites": {}}  # a worker decodes what it draws

    def identity(self) -> dict[str, str]:
        """Tables, and the content of the drawings and photos."""
        names = []
        for where, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if Path(where).name != "sprites" or f in self.drawings]
            names += [os.path.relpath(os.path.join(where, f), self.root) for f in files if f.endswith(EXTENSIONS)]
        return {
            **files_identity("drawings and photos", self.root, sorted(names)),
            "tables": text_identity(self.split_hash, self.extra_hash),
        }

    def drawable(self, split: Split) -> tuple[int, ...]:
        """Sorted ids of the classes that have a sprite in a style of `split`."""
        return tuple(sorted(set().union(*(self.drawings[style] for style in self.styles[split]))))

    def sprite(self, style: str, hexcode: str) -> Sprite:
        """One drawing, decoded.

        Raises:
            BadImageError: unreadable file.
        """
        key = (style, hexcode)
        if key not in self._sprites:
            path = self.root / "sprites" / style / f"{hexcode}.webp"
            self._sprites[key] = Sprite.from_rgba(read_image(path, alpha=True))
        return self._sprites[key]

    def photos(self, split: Split) -> list[Path]:
        """The shipped background photos of `split`."""
        return list_images(self.root / "backgrounds" / split)

    def draw_class(self, class_id: int, split: Split, dice: Dice) -> Sprite:
        """A random drawing of a class: the style first, then one of the style's drawings, both uniformly."""
        style = dice.choice([style for style in self.styles[split] if class_id in self.drawings[style]])
        return self.sprite(style, dice.choice(self.drawings[style][class_id]))


def extra_drawings(
    content: Mapping[str, Any], number: Mapping[str, int], *, where: Path
) -> dict[str, dict[int, tuple[str, ...]]]:
    """Style → class id → file names of the further training styles.

    Args:
        content: of the table.
        number: noun → class id.
        where: the table's file, for messages.

    Raises:
        UserError: a noun that is not a class.
    """
    drawings: dict[str, dict[int, tuple[str, ...]]] = {}
    for style, table in content["styles"].items():
        drawings[style] = {}
        for name, entry in table.items():
            if entry["noun"] not in number:
                raise UserError(f"{where}: {style}/{name} is a {entry['noun']!r}, which is not a class.")
            class_id = number[entry["noun"]]
            drawings[style][class_id] = (*drawings[style].get(class_id, ()), name)
    return drawings


def content_hash(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a table (a split file without its own hash)."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


class Backgrounds:
    """Photos to compose on, decoded when first used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._levels: dict[int, tuple[U8, ...]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_levels": {}}

    def photo(self, dice: Dice) -> tuple[U8, ...]:
        """The pyramid of a random photo."""
        number = dice.below(len(self.paths))
        if number not in self._levels:
            self._levels[number] = render.photo_pyramid(read_image(self.paths[number], max_side=1280))
        return self._levels[number]

    def crop(self, height: int, width: int, dice: Dice, *, plain: float) -> U8:
        """A random background (height, width, 3); `plain`: how often a photo is replaced by a colour field."""
        if dice.chance(plain):
            return render.gradient(height, width, dice)
        canvas = render.crop_photo(self.photo(dice), height, width, dice)
        if plain and dice.chance(0.15):  # two photos as one: few photos make many backgrounds
            other = render.crop_photo(self.photo(dice), height, width, dice)
            canvas = ((canvas.astype(np.uint16) + other + 1) >> 1).astype(np.uint8)
        if dice.chance(0.5):
            canvas = render.saturate(canvas, dice.below(110))
        if dice.chance(0.3):
            canvas = render.blur(canvas, dice.uniform(0.5, 2.5))
        if dice.chance(0.6):
            tables = [
                render.tone_table(dice.uniform(0.6, 1.2), dice.uniform(-10, 30), dice.uniform(0.75, 1.35))
                for _ in range(3)
            ]
            if dice.chance(0.5):
                tables = [tables[0]] * 3
            canvas = render.apply_tables(canvas, np.stack(tables))
        return canvas


class StickerSource:
    """Base class of scenes and pairs: classes of a split in balanced order, photos, shapes."""

    def __init__(
        self,
        stickers: Stickers,
        *,
        split: Split,
        seed: int,
        length: int,
        backgrounds: Sequence[Path] | None = None,
    ) -> None:
        if split not in SPLIT_KEY:
            raise UserError(f"split is {split!r}; choose train or val.")
        if length < 1:
            raise UserError(f"length is {length}; a source needs at least one sample.")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative.")
        self.stickers, self.split, self.seed, self.length = stickers, split, seed, length
        photos = [path for folder in backgrounds or () for path in list_images(folder)]
        self.backgrounds = Backgrounds(stickers.photos(split) if backgrounds is None else photos)
        self.classes = stickers.drawable(split)
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._shapes: dict[int, Sprite] = {}
        self._grain = render.grain_tile()
        self._rare = [(style, code) for style in stickers.styles[split] for code in stickers.unlabelled[style]]

    def __len__(self) -> int:
        return self.length

    def dice(self, kind: int, *key: int) -> Dice:
        """Random numbers of one thing of this source: of a kind (`SCENE` …) and a key within it."""
        return Dice(self.seed, SPLIT_KEY[self.split], kind, *key)

    def class_at(self, slot: int, kind: int) -> int:
        """Class of a slot: each run of len(classes) slots holds every class once, in random order."""
        turn, position = divmod(slot, len(self.classes))
        if (kind, turn) not in self._orders:
            if len(self._orders) >= 1024:
                self._orders.clear()
            self._orders[kind, turn] = self.dice(ORDER, kind, turn).permutation(len(self.classes))
        return self.classes[self._orders[kind, turn][position]]

    def distractor(self, dice: Dice) -> Sprite:
        """Something that is no class: a drawing of an unlabelled thing, or an abstract shape."""
        if self._rare and dice.chance(0.15):
            return self.stickers.sprite(*dice.choice(self._rare))
        number = dice.below(SHAPES)
        if number not in self._shapes:
            dice_of_shape = self.dice(SHAPE, number)
            self._shapes[number] = render.shape_sprite(dice_of_shape, self.backgrounds.photo(dice_of_shape))
        return self._shapes[number]

    def finish(self, image: U8, dice: Dice, *, soft: float, jpeg: float) -> U8:
        """Camera effects on the whole picture; they join stickers and photo."""
        if dice.chance(0.6):
            image = render.apply_tables(image, render.scene_tone(dice))
        if dice.chance(soft):
            image = render.blur(image, dice.uniform(0.4, 1.0))
        if dice.chance(0.4):
            image = render.add_grain(image, self._grain, dice)
        if dice.chance(jpeg):
            image = render.jpeg_noise(image, 40 + dice.below(56))
        return image
