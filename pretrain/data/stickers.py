# SPDX-License-Identifier: Apache-2.0
"""Sticker Scenes: drawings of 552 nouns composed onto photos, with exact boxes and masks.

Three views of one source:

* `SceneSource`: scenes with labels, for detection;
* `PairSource`: single stickers, as a detector's crop shows them, with a caption, for CLIP;
* `ImageView`: images only, for self-supervised learning.

All follow the sample source protocol (`__len__`, `sample(index, draw)`, `collate`), and every sample is a pure function
of (split, seed, index[, draw]). `python -m pretrain.data.stickers` exports scenes as a COCO data set.

N images, n objects, m distractors, H, W height and width, S side of a square picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pretrain.data import render
from pretrain.data.captions import caption_for
from pretrain.data.folder import list_images, read_image
from pretrain.data.render import U8, Dice, Patch, Sprite, Stage, extent
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

Split = Literal["train", "val"]
Labels = Literal["all", "base"]

SPLIT_KEY: Mapping[str, int] = {"train": 0, "val": 1}
_SCENE, _PAIR, _ORDER, _CROP, _SHAPE = range(5)  # last part of a random key: what is being drawn

WHERE = "set OVD_DATA to the data set folder"
SHAPES = 96  # abstract distractor shapes per split


def data_root() -> Path:
    """The data set folder: `$OVD_DATA`, or `datasets/stickers` of this repository."""
    chosen = os.environ.get("OVD_DATA")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "datasets" / "stickers"


@dataclass
class Stickers:
    """The concept table, the split and the sprites; pictures are decoded when first drawn and kept.

    Attributes:
        nouns: class names, sorted; a class id is an index into it.
        supercategory: one per class.
        base: ids that may be labelled in detector training.
        novel: all other ids.
        validated: ids that have a sprite in the validation style.
        near_synonyms: groups of ids that a person could call by one name.
        styles: drawing styles by split.
        split_hash: sha256 of the split file's content.
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
    _sprites: dict[tuple[str, str], Sprite] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, root: Path | str | None = None) -> Stickers:
        """Read the tables of `root` (default: `data_root()`).

        Raises:
            UserError: a missing or damaged file, by name.
        """
        folder = Path(root) if root is not None else data_root()
        split = read_json(folder / "splits.json", hint=WHERE)
        rows = read_json(folder / "concepts.json", hint=WHERE)["concepts"]
        content = {key: value for key, value in split.items() if key != "sha256"}
        if split.get("sha256") != split_hash(content):
            raise UserError(f"{folder / 'splits.json'} was changed: its hash is {split_hash(content)}, "
                            f"not {split.get('sha256')}. Restore the file from the repository.")  # fmt: skip
        nouns = tuple(split["nouns"])
        number = {noun: index for index, noun in enumerate(nouns)}
        drawings: dict[str, dict[int, tuple[str, ...]]] = {}
        unlabelled: dict[str, tuple[str, ...]] = {}
        for styles in split["styles"].values():
            for style in styles:
                drawings[style], unlabelled[style] = {}, ()
        for row in rows:
            for style in row["styles"]:
                if row["labelled"]:
                    known = drawings[style].get(number[row["noun"]], ())
                    drawings[style][number[row["noun"]]] = (*known, row["hexcode"])
                else:
                    unlabelled[style] += (row["hexcode"],)
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
            styles={name: tuple(styles) for name, styles in split["styles"].items()},
            split_hash=split["sha256"],
            drawings=drawings,
            unlabelled=unlabelled,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sprites": {}}  # a worker decodes what it draws

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


def split_hash(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a split file's content (without its own hash)."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


class Backgrounds:
    """Photos to compose on, decoded when first used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._levels: dict[int, tuple[U8, ...]] = {}

    @classmethod
    def of(cls, stickers: Stickers, split: Split, folders: Path | str | Sequence[Path | str] | None) -> Backgrounds:
        """The shipped photos of `split`, or all photos of the given folders instead.

        Raises:
            UserError: no image in a folder.
        """
        if folders is None:
            return cls(stickers.photos(split))
        listed = [folders] if isinstance(folders, (str, Path)) else list(folders)
        return cls([path for folder in listed for path in list_images(folder)])

    def __getstate__(self) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Scene:
    """One picture and what is visible in it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) float32 x0 y0 x1 y1, the extent of the visible pixels; x1, y1 are exclusive.
        masks: (n, H, W) bool, the visible pixels.
        classes: (n,) int64 class ids.
        visible: (n,) float32, visible fraction of the sticker's own pixels (cut off by the border or covered).
        truncated: (n,) bool, reaches over the border of the picture.
        caption: names every object of the scene, also those whose labels were left out.
        distractors: (m, 4) float32 visible extents of things that are no class.
    """

    image: U8
    boxes: NDArray[np.float32]
    masks: NDArray[np.bool_]
    classes: NDArray[np.int64]
    visible: NDArray[np.float32]
    truncated: NDArray[np.bool_]
    caption: str
    distractors: NDArray[np.float32]


class _Source:
    """What scenes and pairs share: classes of a split in balanced order, photos, shapes."""

    def __init__(
        self,
        stickers: Stickers,
        *,
        split: Split,
        seed: int,
        length: int,
        backgrounds: Path | str | Sequence[Path | str] | None,
    ) -> None:
        if split not in SPLIT_KEY:
            raise UserError(f"split is {split!r}; choose train or val.")
        if length < 1:
            raise UserError(f"length is {length}; a source needs at least one sample.")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative.")
        self.stickers, self.split, self.seed, self.length = stickers, split, seed, length
        self.backgrounds = Backgrounds.of(stickers, split, backgrounds)
        self.classes = stickers.drawable(split)
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._shapes: dict[int, Sprite] = {}
        self._grain = render.grain_tile()
        self._rare = [(style, code) for style in stickers.styles[split] for code in stickers.unlabelled[style]]

    def __len__(self) -> int:
        return self.length

    def _dice(self, kind: int, *key: int) -> Dice:
        return Dice(self.seed, SPLIT_KEY[self.split], kind, *key)

    def _class_at(self, slot: int, kind: int) -> int:
        """Class of a slot: each run of len(classes) slots holds every class once, in random order."""
        turn, place = divmod(slot, len(self.classes))
        if (kind, turn) not in self._orders:
            if len(self._orders) >= 1024:
                self._orders.clear()
            self._orders[kind, turn] = self._dice(_ORDER, kind, turn).permutation(len(self.classes))
        return self.classes[self._orders[kind, turn][place]]

    def _distractor(self, dice: Dice) -> Sprite:
        if self._rare and dice.chance(0.15):
            return self.stickers.sprite(*dice.choice(self._rare))
        number = dice.below(SHAPES)
        if number not in self._shapes:
            own = self._dice(_SHAPE, number)
            self._shapes[number] = render.shape_sprite(own, self.backgrounds.photo(own))
        return self._shapes[number]

    def _finish(self, image: U8, dice: Dice, *, soft: float, jpeg: float) -> U8:
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


class SceneSource(_Source):
    """Labelled scenes: 3 to 8 stickers and up to 3 distractors on a photo.

    Args:
        stickers: the loaded data set.
        split: "train", or "val": only the held-out style on held-out photos.
        seed: scenes of different seeds share nothing.
        size: (H, W), or the side of a square.
        length: how many scenes there are.
        labels: "base" leaves out the labels of novel objects; the pixels stay the same.
        backgrounds: folder or folders of photos to use in place of the shipped ones.

    Raises:
        UserError: a value out of range, or a folder without photos.
    """

    def __init__(
        self,
        stickers: Stickers,
        *,
        split: Split,
        seed: int = 0,
        size: tuple[int, int] | int = (320, 320),
        length: int = 1000,
        labels: Labels = "all",
        backgrounds: Path | str | Sequence[Path | str] | None = None,
    ) -> None:
        super().__init__(stickers, split=split, seed=seed, length=length, backgrounds=backgrounds)
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 64 or max(self.size) > 4096:
            raise UserError(f"scene size is {self.size}; each side must be 64 to 4096 pixels.")
        if labels not in ("all", "base"):
            raise UserError(f"labels is {labels!r}; choose all or base.")
        self.labels = labels

    def scene(self, index: int) -> Scene:
        """Scene number `index`, 0 <= index < len(self)."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        dice = self._dice(_SCENE, index)
        height, width = self.size
        stage = Stage(self.backgrounds.crop(height, width, dice, plain=0.15 if self.split == "train" else 0.0))
        count, distractors = 3 + dice.below(6), (0, 0, 1, 1, 2, 3)[dice.below(6)]
        order = [self._class_at(index * 8 + k, _SCENE) for k in range(count)]
        if dice.chance(0.12):
            order[-1] = order[0]
        todo: list[int | None] = [*order, *[None] * distractors]
        labels: list[int | None] = []
        for position in dice.permutation(len(todo)):
            if self._add(stage, todo[position], dice):
                labels.append(todo[position])
        image = self._finish(stage.canvas, dice, soft=0.25, jpeg=0.3 if self.split == "train" else 0.0)
        present = [self.stickers.nouns[label] for label in labels if label is not None]
        caption = caption_for(present, dice)
        keep = [
            k + 1
            for k, label in enumerate(labels)
            if label is not None and (self.labels == "all" or label in self.stickers.base)
        ]
        masks = np.array([stage.mask(k) for k in keep], bool).reshape(len(keep), height, width)
        others = [extent(stage.mask(k + 1)) for k, label in enumerate(labels) if label is None]
        return Scene(
            image=image,
            boxes=np.array([extent(mask) for mask in masks], np.float32).reshape(-1, 4),
            masks=masks,
            classes=np.array([labels[k - 1] for k in keep], np.int64),
            visible=np.array([stage.seen[k] / stage.own[k] for k in keep], np.float32),
            truncated=np.array([stage.truncated[k] for k in keep], bool),
            caption=caption,
            distractors=np.array(others, np.float32).reshape(-1, 4),
        )

    def _add(self, stage: Stage, label: int | None, dice: Dice) -> bool:
        """Draw one object and try places for it, smaller each time."""
        sprite = self._distractor(dice) if label is None else self.stickers.draw_class(label, self.split, dice)
        height, width = self.size
        side = min(height, width)
        low, high = (0.08, 0.35) if label is None else (0.12, 0.50)
        long_side = side * low * (high / low) ** dice.random()
        stretch = dice.uniform(0.9, 1.1)
        degrees, mirror = dice.uniform(-20, 20), dice.chance(0.5)
        softness = dice.uniform(0.3, 1.1)
        vivid = self.split == "train"
        shear, bend = render.distortion(dice, 0.8) if vivid and dice.chance(0.5) else (0.0, ())
        harmony = dice.below(64) if dice.chance(0.5) else 0
        shadow = 40 + dice.below(90) if dice.chance(0.35) else 0
        for attempt in range(6):
            if attempt in (0, 3):
                wide = max(long_side * min(1.0, sprite.aspect) * stretch, 4.0)
                tall = max(long_side * min(1.0, 1 / sprite.aspect), 4.0)
                rgba = sprite.draw(wide, tall, degrees=degrees, mirror=mirror, pad=3, shear=shear, bend=bend)
                patch = Patch.of(render.blur(render.recolour(rgba, dice, vivid=vivid), softness))
                long_side = max(0.6 * long_side, side * low)
            h, w = patch.solid.shape
            margin = 0.2 if dice.chance(0.2) else 0.0  # one in five may reach over the border
            top = int(dice.uniform(-margin * h, height - h + margin * h))
            left = int(dice.uniform(-margin * w, width - w + margin * w))
            if stage.place(patch, top, left, harmony=harmony, shadow=shadow):
                return True
        return False

    def sample(self, index: int, draw: int = 0) -> Scene:
        """The scene; `draw` changes nothing because a scene is fixed."""
        return self.scene(index)

    @staticmethod
    def collate(samples: list[Scene]) -> list[Scene]:
        """A batch of scenes is their list."""
        return samples


class PairSource(_Source):
    """Image-caption pairs for CLIP: mostly one sticker, as a detector's crop of it would look.

    A sample is (image uint8 (3, S, S), caption, class id of the main sticker).

    Args:
        stickers: the loaded data set.
        split: "train", or "val" for the held-out style and photos.
        size: S.
        seed: pairs of different seeds share nothing.
        length: how many indices there are; each run of len(classes) of them holds every class once.
        backgrounds: folder or folders of photos to use in place of the shipped ones.

    Raises:
        UserError: a value out of range, or a folder without photos.
    """

    def __init__(
        self,
        stickers: Stickers,
        *,
        split: Split,
        size: int = 64,
        seed: int = 0,
        length: int = 552 * 128,
        backgrounds: Path | str | Sequence[Path | str] | None = None,
    ) -> None:
        super().__init__(stickers, split=split, seed=seed, length=length, backgrounds=backgrounds)
        if not 16 <= size <= 1024:
            raise UserError(f"pair size is {size}; it must be 16 to 1024 pixels.")
        self.size = size

    def sample(self, index: int, draw: int = 0) -> tuple[U8, str, int]:
        """One pair: the index gives the class, (index, draw) everything else."""
        dice = self._dice(_PAIR, index, draw)
        class_id = self._class_at(index, _PAIR)
        size = self.size
        stage = Stage(self.backgrounds.crop(size, size, dice, plain=0.2 if self.split == "train" else 0.0))
        named = [class_id]
        if dice.chance(0.1):  # a small scene: everything in it is named
            others = [dice.choice(self.classes) for _ in range(1 + dice.below(2))]
            named = []
            for label in [class_id, *others]:
                if self._stick(stage, label, dice, force=not named):
                    named.append(label)
        else:
            for _ in range((0, 0, 1, 1, 2, 3)[dice.below(6)]):
                self._clutter(stage, dice)
            self._main(stage, class_id, dice)
            if dice.chance(0.2):
                self._clutter(stage, dice)
        image = stage.canvas
        if dice.chance(0.35):  # a crop of a small object is an enlarged picture
            small = max(8, round(size * dice.uniform(0.3, 0.9)))
            image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
        image = self._finish(image, dice, soft=0.2, jpeg=0.15 if self.split == "train" else 0.0)
        caption = caption_for([self.stickers.nouns[label] for label in named], dice)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), caption, class_id

    def _draw(self, sprite: Sprite, wide: float, tall: float, dice: Dice) -> Patch:
        degrees = dice.uniform(-20, 20) if dice.chance(0.6) else dice.uniform(-4, 4)
        vivid = self.split == "train"
        shear, bend = render.distortion(dice, 1.0) if vivid and dice.chance(0.6) else (0.0, ())
        rgba = sprite.draw(
            max(wide, 4.0), max(tall, 4.0), degrees=degrees, mirror=dice.chance(0.5), pad=2, shear=shear, bend=bend
        )
        return Patch.of(render.blur(render.recolour(rgba, dice, vivid=vivid), dice.uniform(0.0, 0.7)))

    def _main(self, stage: Stage, class_id: int, dice: Dice) -> None:
        """The named sticker: 45 to 100 % of the frame, sometimes stretched towards the square of the crop."""
        sprite = self.stickers.draw_class(class_id, self.split, dice)
        size = self.size
        wide, tall = min(1.0, sprite.aspect), min(1.0, 1 / sprite.aspect)
        if dice.chance(0.5):  # a detector's crop is a tight box resized to a square
            power = dice.random()
            wide, tall = wide ** (1 - power), tall ** (1 - power)
        fill = size * dice.uniform(0.45, 1.0)
        squeeze = dice.uniform(0.88, 1.12)
        patch = self._draw(sprite, fill * wide * squeeze, fill * tall / squeeze, dice)
        h, w = patch.solid.shape
        harmony = dice.below(64) if dice.chance(0.4) else 0
        shadow = 40 + dice.below(90) if dice.chance(0.3) else 0
        margin = 0.12 if dice.chance(0.3) else 0.0
        top = round((size - h) * dice.random() + margin * h * dice.uniform(-1, 1))
        left = round((size - w) * dice.random() + margin * w * dice.uniform(-1, 1))
        stage.place(patch, top, left, harmony=harmony, shadow=shadow, force=True)  # clutter below it may vanish

    def _clutter(self, stage: Stage, dice: Dice) -> None:
        """A piece of something else at the border of the frame."""
        if dice.chance(0.3):
            sprite = self._distractor(dice)
        else:
            sprite = self.stickers.draw_class(dice.choice(self.classes), self.split, dice)
        fill = self.size * dice.uniform(0.25, 0.8)
        patch = self._draw(sprite, fill * min(1.0, sprite.aspect), fill * min(1.0, 1 / sprite.aspect), dice)
        h, w = patch.solid.shape
        along, inside = dice.random(), dice.uniform(0.4, 0.7)
        edge = dice.below(4)
        top, left = int((self.size - h) * along), int((self.size - w) * along)
        if edge == 0:
            top = int(-h * (1 - inside))
        elif edge == 1:
            top = int(self.size - h * inside)
        elif edge == 2:
            left = int(-w * (1 - inside))
        else:
            left = int(self.size - w * inside)
        stage.place(patch, top, left)

    def _stick(self, stage: Stage, label: int, dice: Dice, *, force: bool) -> bool:
        """One of several stickers; True when there was a place for it."""
        sprite = self.stickers.draw_class(label, self.split, dice)
        fill = self.size * dice.uniform(0.35, 0.65)
        patch = self._draw(sprite, fill * min(1.0, sprite.aspect), fill * min(1.0, 1 / sprite.aspect), dice)
        h, w = patch.solid.shape
        for _ in range(5):
            top, left = int((self.size - h) * dice.random()), int((self.size - w) * dice.random())
            if stage.place(patch, top, left, force=force):
                return True
        return False

    @staticmethod
    def collate(samples: list[tuple[U8, str, int]]) -> dict[str, Any]:
        """{"image": uint8 (N, 3, S, S), "caption": list of N, "class_id": int64 (N,)} as tensors."""
        import torch

        return {
            "image": torch.from_numpy(np.stack([sample[0] for sample in samples])),
            "caption": [sample[1] for sample in samples],
            "class_id": torch.tensor([sample[2] for sample in samples], dtype=torch.int64),
        }


class ImageView:
    """The pictures of a scene source without anything else, for learning without labels."""

    def __init__(self, source: SceneSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, draw: int = 0) -> U8:
        """uint8 (3, H, W)."""
        return np.ascontiguousarray(self.source.sample(index, draw).image.transpose(2, 0, 1))

    @staticmethod
    def collate(samples: list[U8]) -> dict[str, Any]:
        """{"image": uint8 tensor (N, 3, H, W)}."""
        import torch

        return {"image": torch.from_numpy(np.stack(samples))}


class StickerCrops:
    """Every drawing of one style alone on a photo: the zero-shot test of an image encoder.

    A sample is (image uint8 (3, S, S), noun, class id). The sticker fills 70 to 95 % of the frame, upright or nearly
    so, with nothing else in it.

    Args:
        stickers: the loaded data set.
        style: which drawings; default the held-out style. A folder of `sprites/` with another style also serves.
        size: S.
        views: pictures per drawing, each with its own photo, place and light.
        seed: of photos, places and lights.
        photos: "val" for the held-out ones, "train" for those of training.

    Raises:
        UserError: unknown style or value out of range.
    """

    def __init__(
        self,
        stickers: Stickers,
        *,
        style: str = "emojione",
        size: int = 64,
        views: int = 1,
        seed: int = 0,
        photos: Split = "val",
    ) -> None:
        if style not in stickers.drawings:
            raise UserError(f"style is {style!r}; the data set has {', '.join(sorted(stickers.drawings))}.")
        if not 16 <= size <= 1024 or views < 1:
            raise UserError(f"size is {size} and views is {views}; size must be 16 to 1024, views at least 1.")
        self.stickers, self.style, self.size, self.views, self.seed = stickers, style, size, views, seed
        self.drawings = [(label, code) for label, codes in sorted(stickers.drawings[style].items()) for code in codes]
        self.photos = photos
        self.backgrounds = Backgrounds.of(stickers, photos, None)

    def __len__(self) -> int:
        return len(self.drawings) * self.views

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """(N,) class of each sample."""
        return np.array([label for label, _ in self.drawings] * self.views, np.int64)

    def sample(self, index: int, draw: int = 0) -> tuple[U8, str, int]:
        """Sample number `index`; `draw` changes nothing."""
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} of {len(self)}")
        label, code = self.drawings[index % len(self.drawings)]
        dice = Dice(self.seed, SPLIT_KEY[self.photos], _CROP, index)
        sprite = self.stickers.sprite(self.style, code)
        stage = Stage(self.backgrounds.crop(self.size, self.size, dice, plain=0.0))
        fill = self.size * dice.uniform(0.70, 0.95)
        rgba = sprite.draw(
            max(4.0, fill * min(1.0, sprite.aspect)),
            max(4.0, fill * min(1.0, 1 / sprite.aspect)),
            degrees=dice.uniform(-8, 8),
            mirror=dice.chance(0.5),
        )
        patch = Patch.of(render.blur(rgba, dice.uniform(0.0, 0.5)))
        h, w = patch.solid.shape
        top, left = round((self.size - h) * dice.random()), round((self.size - w) * dice.random())
        stage.place(patch, top, left, force=True)
        return np.ascontiguousarray(stage.canvas.transpose(2, 0, 1)), self.stickers.nouns[label], label

    collate = staticmethod(PairSource.collate)


def coco_objects(
    scene: Scene, *, image_id: int, first_annotation_id: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A scene as COCO's `images` entry and `annotations` entries.

    Category ids are class ids plus 1, because COCO tools count from 1. Masks are compressed RLE with text counts; the
    area is that of the mask and the box is its extent.
    """
    from pycocotools import mask as rle

    height, width = scene.image.shape[:2]
    objects = []
    for k, (mask, box) in enumerate(zip(scene.masks, scene.boxes, strict=True)):
        code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        x0, y0, x1, y1 = (float(side) for side in box)
        objects.append(
            {
                "id": first_annotation_id + k,
                "image_id": image_id,
                "category_id": int(scene.classes[k]) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(np.count_nonzero(mask)),
                "segmentation": {"size": [height, width], "counts": code["counts"].decode("ascii")},
                "iscrowd": 0,
                "visible": round(float(scene.visible[k]), 4),
                "truncated": bool(scene.truncated[k]),
            }
        )
    return {"id": image_id, "width": width, "height": height, "caption": scene.caption}, objects


def scene_record(scene: Scene, index: int) -> dict[str, Any]:
    """A scene as one dict: image id (index + 1), height, width, caption, COCO annotations, unlabelled distractors."""
    image, objects = coco_objects(scene, image_id=index + 1, first_annotation_id=index * 100 + 1)
    for entry in objects:
        entry["class_id"] = entry["category_id"] - 1
    return {
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "caption": image["caption"],
        "annotations": objects,
        "distractors": [[float(side) for side in box] for box in scene.distractors],
    }


def main(argv: list[str]) -> int:
    """The export command; see `pretrain.data.export`."""
    from pretrain.data.export import main as export_main

    return export_main(argv)


if __name__ == "__main__":
    from pretrain.engine.errors import run_cli

    run_cli(main, sys.argv[1:])
