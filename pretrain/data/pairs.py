# SPDX-License-Identifier: Apache-2.0
"""Single stickers framed like a detector's crops, with captions, for CLIP; and alone on a photo, for its test.

Shapes: N images, S side of a square picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from pretrain.data import render
from pretrain.data.caption_templates import caption_for
from pretrain.data.dice import Dice
from pretrain.data.render import U8, Compositor, Patch, Sprite
from pretrain.data.stickers import CROP, PAIR, SPLIT_KEY, Backgrounds, Split, Stickers, StickerSource
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class PairBatch(TypedDict):
    """A batch of pictures with their captions.

    Attributes:
        image: uint8 (N, 3, S, S).
        caption: N texts.
        class_id: (N,) int64.
    """

    image: Tensor
    caption: list[str]
    class_id: Tensor


class PairSource(StickerSource):
    """Image-caption pairs for CLIP: mostly one sticker, as a detector's crop of it would look.

    A sample is (image uint8 (3, S, S), caption, class id of the main sticker).

    Args:
        stickers: the loaded data set.
        split: "train", or "val" for the held-out style and photos.
        size: S.
        seed: pairs of different seeds share nothing.
        length: how many indices there are; each run of len(classes) of them holds every class once.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        stickers: Stickers,
        *,
        split: Split,
        size: int = 64,
        seed: int = 0,
        length: int = 552 * 128,
    ) -> None:
        super().__init__(stickers, split=split, seed=seed, length=length)
        if not 16 <= size <= 1024:
            raise UserError(f"pair size is {size}; it must be 16 to 1024 pixels.")
        self.size = size

    def sample(self, index: int, draw: int = 0) -> tuple[U8, str, int]:
        """One pair: the index gives the class, (index, draw) everything else."""
        dice = self.dice(PAIR, index, draw)
        class_id = self.class_at(index, PAIR)
        size = self.size
        compositor = Compositor(self.backgrounds.crop(size, size, dice, plain=0.2 if self.split == "train" else 0.0))
        named = [class_id]
        if dice.chance(0.1):  # a small scene: everything in it is named
            others = [dice.choice(self.classes) for _ in range(1 + dice.below(2))]
            named = []
            for label in [class_id, *others]:
                if self._stick(compositor, label, dice, force=not named):
                    named.append(label)
        else:
            for _ in range((0, 0, 1, 1, 2, 3)[dice.below(6)]):
                self._clutter(compositor, dice)
            self._main(compositor, class_id, dice)
            if dice.chance(0.2):
                self._clutter(compositor, dice)
        image = compositor.canvas
        if dice.chance(0.35):  # a crop of a small object is an enlarged picture
            small = max(8, round(size * dice.uniform(0.3, 0.9)))
            image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
        image = self.finish(image, dice, soft=0.2, jpeg=0.15 if self.split == "train" else 0.0)
        caption = caption_for([self.stickers.nouns[label] for label in named], dice)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), caption, class_id

    def identity(self) -> dict[str, str]:
        """Fingerprint of the drawings and photos."""
        return self.stickers.identity()

    def _draw(self, sprite: Sprite, wide: float, tall: float, dice: Dice) -> Patch:
        degrees = dice.uniform(-20, 20) if dice.chance(0.6) else dice.uniform(-4, 4)
        vivid = self.split == "train"
        shear, bend = render.distortion(dice, 1.0) if vivid and dice.chance(0.6) else (0.0, ())
        rgba = sprite.draw(
            max(wide, 4.0), max(tall, 4.0), degrees=degrees, mirror=dice.chance(0.5), pad=2, shear=shear, bend=bend
        )
        return Patch.of(render.blur(render.recolour(rgba, dice, vivid=vivid), dice.uniform(0.0, 0.7)))

    def _main(self, compositor: Compositor, class_id: int, dice: Dice) -> None:
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
        compositor.place(patch, top, left, harmony=harmony, shadow=shadow, force=True)  # clutter below it may vanish

    def _clutter(self, compositor: Compositor, dice: Dice) -> None:
        """A piece of something else at the border of the frame."""
        if dice.chance(0.3):
            sprite = self.distractor(dice)
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
        compositor.place(patch, top, left)

    def _stick(self, compositor: Compositor, label: int, dice: Dice, *, force: bool) -> bool:
        """Place one of several stickers; True if there was room for it."""
        sprite = self.stickers.draw_class(label, self.split, dice)
        fill = self.size * dice.uniform(0.35, 0.65)
        patch = self._draw(sprite, fill * min(1.0, sprite.aspect), fill * min(1.0, 1 / sprite.aspect), dice)
        h, w = patch.solid.shape
        for _ in range(5):
            top, left = int((self.size - h) * dice.random()), int((self.size - w) * dice.random())
            if compositor.place(patch, top, left, force=force):
                return True
        return False

    @staticmethod
    def collate(samples: list[tuple[U8, str, int]]) -> PairBatch:
        """A batch."""
        import torch

        return {
            "image": torch.from_numpy(np.stack([sample[0] for sample in samples])),
            "caption": [sample[1] for sample in samples],
            "class_id": torch.tensor([sample[2] for sample in samples], dtype=torch.int64),
        }


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
        self.backgrounds = Backgrounds(stickers.photos(photos))

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
        dice = Dice(self.seed, SPLIT_KEY[self.photos], CROP, index)
        sprite = self.stickers.sprite(self.style, code)
        compositor = Compositor(self.backgrounds.crop(self.size, self.size, dice, plain=0.0))
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
        compositor.place(patch, top, left, force=True)
        return np.ascontiguousarray(compositor.canvas.transpose(2, 0, 1)), self.stickers.nouns[label], label

    collate = staticmethod(PairSource.collate)
