# SPDX-License-Identifier: Apache-2.0
"""Labelled scenes of stickers on photos, for detection, and their labels in COCO's form.

Shapes: N images, n objects, m distractors, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from pretrain.data import render
from pretrain.data.caption_templates import caption_for
from pretrain.data.dice import Dice
from pretrain.data.masks import JsonRle, encode_mask
from pretrain.data.render import U8, Compositor, Patch, extent
from pretrain.data.stickers import SCENE, Split, Stickers, StickerSource
from pretrain.engine.errors import UserError

Labels = Literal["all", "base"]


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


class SceneSource(StickerSource):
    """Labelled scenes: 3 to 8 stickers and up to 3 distractors on a photo.

    Args:
        stickers: the loaded data set.
        split: "train", or "val": only the held-out style on held-out photos.
        seed: scenes of different seeds share nothing.
        size: (H, W), or the side of a square.
        length: how many scenes there are.
        labels: "base" leaves out the labels of novel objects; the pixels stay the same.
        backgrounds: folders of photos to use in place of the shipped ones.

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
        backgrounds: Sequence[Path] | None = None,
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
        dice = self.dice(SCENE, index)
        height, width = self.size
        compositor = Compositor(
            self.backgrounds.crop(height, width, dice, plain=0.15 if self.split == "train" else 0.0)
        )
        count, distractors = 3 + dice.below(6), (0, 0, 1, 1, 2, 3)[dice.below(6)]
        order = [self.class_at(index * 8 + k, SCENE) for k in range(count)]
        if dice.chance(0.12):
            order[-1] = order[0]
        todo: list[int | None] = [*order, *[None] * distractors]
        labels: list[int | None] = []
        for position in dice.permutation(len(todo)):
            if self._add(compositor, todo[position], dice):
                labels.append(todo[position])
        image = self.finish(compositor.canvas, dice, soft=0.25, jpeg=0.3 if self.split == "train" else 0.0)
        present = [self.stickers.nouns[label] for label in labels if label is not None]
        caption = caption_for(present, dice)
        keep = [
            k + 1
            for k, label in enumerate(labels)
            if label is not None and (self.labels == "all" or label in self.stickers.base)
        ]
        masks = np.array([compositor.mask(k) for k in keep], bool).reshape(len(keep), height, width)
        others = [extent(compositor.mask(k + 1)) for k, label in enumerate(labels) if label is None]
        return Scene(
            image=image,
            boxes=np.array([extent(mask) for mask in masks], np.float32).reshape(-1, 4),
            masks=masks,
            classes=np.array([labels[k - 1] for k in keep], np.int64),
            visible=np.array([compositor.visible[k] / compositor.patch_pixels[k] for k in keep], np.float32),
            truncated=np.array([compositor.truncated[k] for k in keep], bool),
            caption=caption,
            distractors=np.array(others, np.float32).reshape(-1, 4),
        )

    def _add(self, compositor: Compositor, label: int | None, dice: Dice) -> bool:
        """Draw one object and try places for it, smaller each time."""
        sprite = self.distractor(dice) if label is None else self.stickers.draw_class(label, self.split, dice)
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
            if compositor.place(patch, top, left, harmony=harmony, shadow=shadow):
                return True
        return False

    def sample(self, index: int, draw: int = 0) -> Scene:
        """The scene; `draw` changes nothing because a scene is fixed."""
        return self.scene(index)

    @staticmethod
    def collate(samples: list[Scene]) -> list[Scene]:
        """A batch of scenes is their list."""
        return samples


class SceneEntry(TypedDict):
    """A scene in COCO's ``images``."""

    id: int
    width: int
    height: int
    caption: str


class ObjectEntry(TypedDict):
    """An object of a scene in COCO's ``annotations``; visible: share of its pixels that nothing covers."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: int
    segmentation: JsonRle
    iscrowd: int
    visible: float
    truncated: bool


def coco_objects(scene: Scene, *, image_id: int, first_annotation_id: int) -> tuple[SceneEntry, list[ObjectEntry]]:
    """A scene as COCO's `images` entry and `annotations` entries.

    Category ids are class ids plus 1, because COCO tools count from 1. Masks are compressed RLE with text counts; the
    area is that of the mask and the box is its extent.
    """
    height, width = scene.image.shape[:2]
    objects: list[ObjectEntry] = []
    for k, (mask, box) in enumerate(zip(scene.masks, scene.boxes, strict=True)):
        x0, y0, x1, y1 = (float(side) for side in box)
        objects.append(
            {
                "id": first_annotation_id + k,
                "image_id": image_id,
                "category_id": int(scene.classes[k]) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(np.count_nonzero(mask)),
                "segmentation": encode_mask(mask),
                "iscrowd": 0,
                "visible": round(float(scene.visible[k]), 4),
                "truncated": bool(scene.truncated[k]),
            }
        )
    return {"id": image_id, "width": width, "height": height, "caption": scene.caption}, objects
