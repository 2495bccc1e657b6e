# SPDX-License-Identifier: Apache-2.0
"""Drawing of Sticker Scenes: sprites, shapes and photos to pixels, boxes and masks.

Every picture is a function of numbers drawn from one PCG64 generator, and every pixel operation is integer
arithmetic (numpy integers, fixed-point `cv2.remap`, 8-bit blurs and area averages), so that a scene has the same bytes
on every machine. Sprites are premultiplied RGBA: interpolating them needs no division and gives clean edges.

The pixels are frozen: models were trained on them, and a golden test guards them. New features are options that are off
by default.

H, W: picture height and width. h, w: patch height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pretrain.data.dice import Dice

U8 = NDArray[np.uint8]

SOLID = 128  # alpha from which a pixel belongs to the object's mask
MIN_VISIBLE = 0.35  # of a sticker's own pixels; below it the object would be a guess
MIN_PIXELS = 30  # a sticker with fewer visible pixels is not placed


def premultiply(rgba: U8) -> U8:
    """Straight RGBA (h, w, 4) to premultiplied RGBA, rounded to nearest."""
    alpha = rgba[..., 3:].astype(np.uint16)
    out = rgba.copy()
    out[..., :3] = (rgba[..., :3].astype(np.uint16) * alpha + 127) // 255
    return out


def halve(image: U8) -> U8:
    """Exact 2x2 area average of (h, w, C); an odd last row or column is dropped."""
    h, w = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    quads = image[:h, :w].astype(np.uint16)
    return ((quads[0::2, 0::2] + quads[1::2, 0::2] + quads[0::2, 1::2] + quads[1::2, 1::2] + 2) >> 2).astype(np.uint8)


@dataclass(frozen=True)
class Sprite:
    """A cut-out drawing as an image pyramid: premultiplied RGBA, each level half of the one before."""

    levels: tuple[U8, ...]

    @classmethod
    def from_rgba(cls, rgba: U8) -> Sprite:
        """Crop straight RGBA to its visible extent and build the pyramid.

        Raises:
            ValueError: when nothing is opaque.
        """
        solid = rgba[..., 3] >= 16
        if not solid.any():
            raise ValueError("a sprite needs visible pixels")
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        base = premultiply(np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
        levels = [base]
        while min(levels[-1].shape[:2]) >= 16:
            levels.append(halve(levels[-1]))
        return cls(tuple(levels))

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.levels[0].shape[1] / self.levels[0].shape[0]

    def draw(
        self,
        width: float,
        height: float,
        *,
        degrees: float = 0.0,
        mirror: bool = False,
        pad: int = 1,
        shear: float = 0.0,
        bend: Sequence[float] = (),
    ) -> U8:
        """The sprite at width x height pixels, turned by degrees: premultiplied RGBA (h, w, 4).

        The patch is as large as the turned rectangle plus `pad` transparent pixels on each side.

        Args:
            width, height: pixels of the upright sprite.
            degrees: turn.
            mirror: left and right exchanged.
            pad: transparent margin, pixels.
            shear: columns lean by this many pixels per pixel of height.
            bend: (amplitude in parts of the sprite's size, phase in turns, waves) of the row displacement and
                the same of the column displacement: six numbers, a smooth distortion of the drawing.
        """
        level = self.levels[0]
        for smaller in self.levels[1:]:
            if smaller.shape[1] < width or smaller.shape[0] < height:
                break
            level = smaller
        sh, sw = level.shape[:2]
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        wide = width + abs(shear) * height
        if bend:
            pad += math.ceil(max(bend[0] * width, bend[3] * height))
        w = math.ceil(abs(wide * cosine) + abs(height * sine)) + 2 * pad
        h = math.ceil(abs(wide * sine) + abs(height * cosine)) + 2 * pad
        kx, ky = sw / width, sh / height
        if mirror:
            kx = -kx
        # Source position of each patch pixel in 1/65536 pixels, then in the 1/32 pixels of cv2's fixed-point maps.
        dx = np.arange(w, dtype=np.int32) * 2 - (w - 1)
        dy = (np.arange(h, dtype=np.int32) * 2 - (h - 1))[:, None]
        unit = 1 << 15  # dx and dy count half pixels
        row_x = dy * round(kx * (sine + shear * cosine) * unit) + ((sw - 1) * unit + 1024)
        row_y = dy * round(ky * cosine * unit) + ((sh - 1) * unit + 1024)
        column_x = dx * round(kx * (cosine - shear * sine) * unit)
        column_y = dx * round(-ky * sine * unit)
        if bend:
            row_x = row_x + _wave(h, bend[0] * sw, bend[1], bend[2])[:, None]
            column_y = column_y + _wave(w, bend[3] * sh, bend[4], bend[5])
        x, y = (row_x + column_x) >> 11, (row_y + column_y) >> 11
        integer = np.empty((h, w, 2), np.int16)
        integer[..., 0], integer[..., 1] = x >> 5, y >> 5
        fraction = (((y & 31) << 5) | (x & 31)).astype(np.uint16)
        return cv2.remap(level, integer, fraction, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


def _wave(count: int, amplitude: float, phase: float, waves: float) -> NDArray[np.int32]:
    """`count` displacements in 1/65536 pixels along a sine."""
    turns = np.arange(count) * (waves / count) + phase
    return np.floor(np.sin(2 * math.pi * turns) * (amplitude * 65536) + 0.5).astype(np.int32)


def tone_table(gain: float, offset: float, gamma: float) -> U8:
    """256-entry table of round(255 * (x/255)**gamma * gain + offset), clipped."""
    x = np.arange(256) / 255.0
    return np.clip(np.floor(255.0 * gain * x**gamma + offset + 0.5), 0, 255).astype(np.uint8)


def apply_tables(image: U8, tables: U8) -> U8:
    """Per-channel look-up: image (H, W, 3), tables (3, 256)."""
    return cv2.LUT(image, np.ascontiguousarray(tables.T)[None])


def spread(channel: U8, channels: int) -> U8:
    """One channel (h, w) repeated as (h, w, channels), which is faster than numpy's broadcasting."""
    return cv2.merge([channel] * channels)


def saturate(image: U8, amount: int) -> U8:
    """Scale the distance from grey by amount/64 (64 leaves the image) of (h, w, 3), or of premultiplied (h, w, 4)."""
    channels = cv2.split(image)
    red, green, blue = (channel.astype(np.int16) for channel in channels[:3])
    grey = (red * 2 + green * 5 + blue) >> 3
    out = []
    for channel in (red, green, blue):
        channel -= grey
        channel *= amount
        channel >>= 6
        channel += grey
        out.append(np.clip(channel, 0, 255).astype(np.uint8))
    return cv2.merge([*out, *channels[3:]])


def over(canvas: U8, patch: U8) -> None:
    """Lay a premultiplied patch (h, w, 4) over canvas (h, w, 3) in place."""
    blend = cv2.bitwise_not(spread(cv2.extractChannel(patch, 3), 3)).astype(np.uint16)
    blend *= canvas
    blend += 128
    blend += blend >> 8
    blend >>= 8
    canvas[...] = cv2.add(blend.astype(np.uint8), cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB))


def blur(image: U8, sigma: float) -> U8:
    """8-bit Gaussian blur; sigma is rounded to 1/16 pixel. Nothing happens below 0.25."""
    sigma = round(sigma * 16) / 16
    if sigma < 0.25:
        return image
    side = 2 * math.ceil(2.5 * sigma) + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)


@dataclass(frozen=True)
class Patch:
    """A sticker ready to be laid down: premultiplied RGBA (h, w, 4) and what fraction of it is solid."""

    rgba: U8
    solid: NDArray[np.bool_]
    pixels: int

    @classmethod
    def of(cls, rgba: U8) -> Patch:
        """Measure the mask of a drawn sticker."""
        solid = rgba[..., 3] >= SOLID
        return cls(rgba, solid, int(np.count_nonzero(solid)))


def _ramp(factor: int) -> U8:
    """256-entry table of round(x * factor / 256), clipped."""
    return np.minimum((np.arange(256) * factor + 128) >> 8, 255).astype(np.uint8)


def recolour(rgba: U8, dice: Dice, *, vivid: bool) -> U8:
    """Brightness, tint and saturation of one sticker (h, w, 4), drawn at random; alpha stays.

    Args:
        rgba: premultiplied.
        dice: source of chance.
        vivid: also strong tints and nearly grey ones, for training.
    """
    if dice.chance(0.5):
        rgba = saturate(rgba, 36 + dice.below(46))
    elif vivid and dice.chance(0.1):
        rgba = saturate(rgba, dice.below(24))
    if dice.chance(0.7):
        common = dice.uniform(0.75, 1.12)
        tint = 0.22 if vivid and dice.chance(0.2) else 0.07
        tables = [_ramp(round(256 * common * dice.uniform(1 - tint, 1 + tint))) for _ in range(3)]
        tables.append(_ramp(256))
        rgba = cv2.LUT(rgba, np.ascontiguousarray(np.stack(tables).T)[None])
    return cv2.min(rgba, spread(cv2.extractChannel(rgba, 3), 4))


def distortion(dice: Dice, strength: float) -> tuple[float, tuple[float, ...]]:
    """A random `shear` and `bend` for `Sprite.draw`, so that one drawing makes many shapes."""
    shear = dice.uniform(-0.2, 0.2) * strength
    bend = [
        number for _ in range(2) for number in (dice.random() * 0.06 * strength, dice.random(), dice.uniform(0.4, 1.6))
    ]
    return shear, tuple(bend)


def harmonise(patch: U8, canvas: U8, amount: int) -> U8:
    """Mix the colours of a patch (h, w, 4) with the mean colour of the canvas below: amount/256 of it."""
    below = [math.floor(mean + 0.5) for mean in cv2.mean(canvas)[:3]]
    alpha = spread(cv2.extractChannel(patch, 3), 4)
    patch_table = np.stack([_ramp(256 - amount)] * 3 + [_ramp(256)])
    mixed = np.stack([_ramp(colour * amount // 255) for colour in below] + [np.zeros(256, np.uint8)])
    patch_part = cv2.LUT(patch, np.ascontiguousarray(patch_table.T)[None])
    mixed_part = cv2.LUT(alpha, np.ascontiguousarray(mixed.T)[None])
    return cv2.min(cv2.add(patch_part, mixed_part), alpha)


def photo_pyramid(image: U8) -> tuple[U8, ...]:
    """A photo (H, W, 3) and its halvings down to 64 pixels on the short side."""
    levels = [np.ascontiguousarray(image)]
    while min(levels[-1].shape[:2]) >= 128:
        levels.append(halve(levels[-1]))
    return tuple(levels)


def crop_photo(levels: Sequence[U8], height: int, width: int, dice: Dice) -> U8:
    """A random window of a photo at height x width, mirrored half of the time: (height, width, 3)."""
    full_h, full_w = levels[0].shape[:2]
    largest = min(full_h / height, full_w / width)  # source pixels per output pixel
    scale = largest * (0.3 + 0.7 * dice.random()) if largest > 0 else 1.0
    octave = 0
    while octave + 1 < len(levels) and scale >= 2 ** (octave + 1):
        octave += 1
    level = levels[octave]
    h = max(1, min(level.shape[0], round(height * scale / 2**octave)))
    w = max(1, min(level.shape[1], round(width * scale / 2**octave)))
    y, x = dice.below(level.shape[0] - h + 1), dice.below(level.shape[1] - w + 1)
    window = level[y : y + h, x : x + w]
    if dice.chance(0.5):
        window = window[:, ::-1]
    return cv2.resize(np.ascontiguousarray(window), (width, height), interpolation=cv2.INTER_LINEAR_EXACT)


def gradient(height: int, width: int, dice: Dice) -> U8:
    """A smooth field of random colours: a 3x3 grid of colours enlarged, (height, width, 3)."""
    base = [dice.below(256) for _ in range(3)]
    spread = dice.below(90)
    corners = [[[c + dice.below(2 * spread + 1) - spread for c in base] for _ in range(3)] for _ in range(3)]
    grid = np.clip(np.array(corners), 0, 255).astype(np.uint8)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)


def grain_tile() -> NDArray[np.int8]:
    """A fixed 512x512x3 tile of bell-shaped noise, standard deviation about 37."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(20)))
    return (generator.integers(-32, 33, (4, 512, 512, 3), dtype=np.int8).sum(0, dtype=np.int16)).astype(np.int8)


def add_grain(image: U8, tile: NDArray[np.int8], dice: Dice) -> U8:
    """Sensor noise of random strength, in place of none."""
    height, width = image.shape[:2]
    strength = 6 + dice.below(44)  # in 1/256 of the tile: up to 7 grey levels
    if height > 512 or width > 512:
        tile = np.tile(tile, (-(-height // 512), -(-width // 512), 1))
    y, x = dice.below(tile.shape[0] - height + 1), dice.below(tile.shape[1] - width + 1)
    noisy = tile[y : y + height, x : x + width] * np.int16(strength)
    noisy >>= 8
    noisy += image
    return np.clip(noisy, 0, 255).astype(np.uint8)


def scene_tone(dice: Dice) -> U8:
    """Light of a whole scene (stickers and photo alike): tables (3, 256)."""
    gamma, gain = dice.uniform(0.8, 1.3), dice.uniform(0.8, 1.08)
    offset = dice.uniform(-8, 14)
    return np.stack([tone_table(gain * dice.uniform(0.92, 1.06), offset, gamma) for _ in range(3)])


def jpeg_noise(image: U8, quality: int) -> U8:
    """The image after JPEG coding."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"cannot code an image of shape {image.shape} as JPEG")
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def shape_sprite(dice: Dice, texture: Sequence[U8]) -> Sprite:
    """An abstract distractor: an irregular blob or polygon, filled with colour, stripes or photo.

    The corners are drawn on a circle with very uneven radii, so that stars, hearts, discs and boxes, which are like
    drawings of the vocabulary, do not occur.
    """
    corners = 5 + dice.below(5)
    start, points = dice.uniform(0, 2 * math.pi), []
    for corner in range(corners):
        angle = start + 2 * math.pi * (corner + dice.uniform(-0.3, 0.3)) / corners
        radius = 120 * dice.uniform(0.3, 1.0)
        points.append((round(128 + radius * math.cos(angle)), round(128 + radius * math.sin(angle))))
    polygon = np.array(points, np.int32)
    mask = np.zeros((256, 256), np.uint8)
    cv2.fillPoly(mask, [polygon], 255)
    if dice.chance(0.6):  # a blob: the polygon with round corners
        mask = ((cv2.blur(mask, (41, 41)) >= 128) * 255).astype(np.uint8)
    if not mask.any():
        cv2.circle(mask, (128, 128), 60, 255, -1)
    rgb = gradient(256, 256, dice)
    kind = dice.below(3)
    if kind == 1:
        rgb = crop_photo(texture, 256, 256, dice)
    elif kind == 2:
        period, slant = 10 + dice.below(30), dice.below(5) - 2
        ramp = np.arange(256)[None] * 2 + np.arange(256)[:, None] * slant
        stripes = (ramp // period) % 2 == 0
        rgb = np.where(stripes[..., None], gradient(256, 256, dice), rgb)
    return Sprite.from_rgba(halve(np.dstack([rgb, mask])))


class Compositor:
    """Lays patches on a canvas and keeps for each pixel which of them is on top."""

    def __init__(self, canvas: U8) -> None:
        self.canvas = canvas
        self.owner: U8 = np.zeros(canvas.shape[:2], np.uint8)  # 0 background, k the k-th patch
        self.patch_pixels: list[int] = [1]  # pixels of the whole patch
        self.visible: list[int] = [1]  # pixels still visible
        self.truncated: list[bool] = [False]

    def place(
        self, patch: Patch, top: int, left: int, *, harmony: int = 0, shadow: int = 0, force: bool = False
    ) -> bool:
        """Lay `patch` at (top, left) unless it, or one below it, would be too little visible; True when laid.

        With `force` it is laid wherever it touches the canvas.
        """
        height, width = self.owner.shape
        h, w = patch.solid.shape
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
        if y0 >= y1 or x0 >= x1:
            return False
        inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        solid = patch.solid[inner]
        pixels = int(np.count_nonzero(solid))
        if not force and (pixels < MIN_PIXELS or pixels < MIN_VISIBLE * patch.pixels):
            return False
        window = self.owner[y0:y1, x0:x1]
        covered = np.bincount(window[solid], minlength=len(self.patch_pixels))
        for k in range(1, len(self.patch_pixels)):
            remaining = self.visible[k] - int(covered[k])
            if not force and covered[k] and (remaining < MIN_PIXELS or remaining < MIN_VISIBLE * self.patch_pixels[k]):
                return False
        view = self.canvas[y0:y1, x0:x1]
        rgba = np.ascontiguousarray(patch.rgba[inner])
        if harmony:
            rgba = harmonise(rgba, view, harmony)
        if shadow:
            self._shadow(patch.rgba[..., 3], top, left, shadow)
        over(view, rgba)
        self.visible = [visible - int(hidden) for visible, hidden in zip(self.visible, covered, strict=True)]
        window[solid] = len(self.patch_pixels)
        self.patch_pixels.append(patch.pixels)
        self.visible.append(pixels)
        self.truncated.append(pixels < patch.pixels)
        return True

    def _shadow(self, alpha: U8, top: int, left: int, strength: int) -> None:
        """Darken the canvas a little below and right of a patch."""
        step = 2 + max(alpha.shape) // 24
        soft = np.zeros((alpha.shape[0] + 2 * step, alpha.shape[1] + 2 * step), np.uint8)
        soft[step:-step, step:-step] = alpha
        soft = cv2.blur(soft, (2 * step + 1, 2 * step + 1))
        y, x = top, left  # the margin of `step` is the offset
        y0, x0 = max(y, 0), max(x, 0)
        y1, x1 = min(y + soft.shape[0], self.canvas.shape[0]), min(x + soft.shape[1], self.canvas.shape[1])
        part = soft[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.uint16)
        part *= strength
        keep = spread(cv2.bitwise_not((part >> 8).astype(np.uint8)), 3).astype(np.uint16)
        view = self.canvas[y0:y1, x0:x1]
        keep *= view
        keep += 255
        view[...] = keep >> 8

    def mask(self, k: int) -> NDArray[np.bool_]:
        """Visible pixels (H, W) of the k-th patch."""
        return self.owner == k


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (exclusive) of the true pixels of a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
