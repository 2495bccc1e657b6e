# SPDX-License-Identifier: Apache-2.0
"""Photographs for CLIP: whole photos of single named objects, and square crops of labelled boxes.

    words = read_photo_words(config)
    source = PhotoWordSource(words, size=224, seed=0, config=config)

A class is a meaning of the lexicon, so files that spell it differently (tv, television) give one class; a word that the
lexicon does not know is a class of its own. Half of the samples are balanced by class (frequency proportional to the
square root of its pictures), so that frequent classes do not crowd out rare ones.
"""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from pretrain.config_photos import PhotoWords
from pretrain.data.coco import GroundTruth, read_ground_truth
from pretrain.data.folder import U8, read_image, require_files
from pretrain.data.lexicon import Lexicon, read_lexicon
from pretrain.data.pairs import PairSource
from pretrain.data.render import Dice
from pretrain.engine.errors import UserError, warn
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.files import read_json
from pretrain.engine.identity import files_identity, text_identity

Part = Literal["train", "val", "all"]
Box = tuple[float, float, float, float]
GREY = 127  # what lies beyond the border of a photo: zero after the normalisation of the Lite networks


@dataclass(frozen=True)
class LabelledCrop:
    """A photo (`box` None) or a box of it (x, y, w, h in pixels), and its label."""

    file: Path
    word: str
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledPhotos:
    """Labelled photos and their words.

    Attributes:
        items: photos and boxes.
        class_ids: one per item.
        classes: the word of each class, the most frequent of its spellings.
        lexicon: what they mean.
        excluded: words that must not be learnt.
    """

    items: tuple[LabelledCrop, ...]
    class_ids: tuple[int, ...]
    classes: tuple[str, ...]
    lexicon: Lexicon
    excluded: frozenset[str]


def boxes_of(truth: GroundTruth, images: Path, *, part: Part, min_score: float, min_side: float) -> list[LabelledCrop]:
    """Boxes of a COCO file; crowds are left out.

    Args:
        truth: what was read of it.
        images: folder of the photos.
        part: by ``images[].split``; "all": every photo.
        min_score: annotations with a ``score`` below are left out; those without a score are taken.
        min_side: shortest side in pixels.

    Raises:
        UserError: a photo has no file, or `part` is asked of a file that does not tell parts.
    """
    chosen = {key for key in truth.sizes if part == "all" or truth.parts.get(key) == part}
    if truth.sizes and not chosen:
        raise UserError(
            f"{truth.where}: no photo has split {part!r} (images[].split); set data.part=all to take every one"
        )
    items = []
    for annotation in truth.annotations:
        x, y, w, h = (float(value) for value in annotation["bbox"])
        if annotation["image_id"] not in chosen or annotation["iscrowd"] or min(w, h) < min_side:
            continue
        if annotation.get("score", 1.0) < min_score:
            continue
        file = images / truth.file_of(annotation["image_id"])
        items.append(LabelledCrop(file, truth.categories[annotation["category_id"]], (x, y, w, h)))
    return items


def parts_of(truths: Sequence[GroundTruth]) -> tuple[dict[str, str], set[str]]:
    """File name -> its ``split`` in the COCO files, and the names whose ``content`` is a scene of several things."""
    parts = {truth.files[key]: part for truth in truths for key, part in truth.parts.items() if key in truth.files}
    return parts, {name for truth in truths for name in truth.scenes}


def read_labels(
    path: Path, images: Path, *, parts: Mapping[str, str], scenes: set[str], part: Part
) -> list[LabelledCrop]:
    """Photos with one noun, from a JSON table file -> nouns, without those that a COCO file marks as scenes.

    Raises:
        UserError: it is no such table.
    """
    content = read_json(path, hint="a table of file names and lists of nouns")
    if not isinstance(content, dict) or not all(isinstance(nouns, list) for nouns in content.values()):
        raise UserError(f"{path}: not a table of file names and lists of nouns")
    return [
        LabelledCrop(images / name, str(nouns[0]))
        for name, nouns in content.items()
        if len(nouns) == 1 and name not in scenes and (part == "all" or parts.get(name, "train") == part)
    ]


def read_photo_words(config: PhotoWords) -> LabelledPhotos:
    """Everything that a section names.

    Raises:
        UserError: files are missing or damaged, or nothing is left to learn from.
    """
    lexicon = read_lexicon(config.lexicon)
    excluded = frozenset(str(noun) for noun in read_json(config.leave_out)) if config.leave_out else frozenset()
    excluded |= novel_names(config.novel, lexicon)
    truths = [read_ground_truth(path, hint="data.annotations must be COCO files") for path in config.annotations]
    for truth in truths:
        for warning in truth.warnings:
            warn(f"{truth.where}: {warning}")
    parts, scenes = parts_of(truths)
    named: list[LabelledCrop] = []
    if config.labels is not None:
        named = read_labels(config.labels, config.images, parts=parts, scenes=scenes, part=config.part)
    closed = {item.file for item in named if item.word in excluded}
    boxes: list[LabelledCrop] = []
    rng = random.Random(0)
    for truth in truths:
        by_word: dict[str, list[LabelledCrop]] = defaultdict(list)
        for item in boxes_of(
            truth, config.images, part=config.part, min_score=config.min_score, min_side=config.min_side
        ):
            by_word[item.word].append(item)
        for _, group in sorted(by_word.items()):
            rng.shuffle(group)
            boxes += group[: config.per_word]
    items = [item for item in named + boxes if item.word not in excluded and item.file not in closed]
    if not items:
        raise UserError("data: neither data.annotations nor data.labels leaves anything to learn from")
    names = dict.fromkeys(os.path.relpath(item.file, config.images) for item in items)
    if missing := require_files(names, config.images, where="data", allowed=BAD_IMAGES_ALLOWED):
        warn(missing)
    spellings: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    keys = [lexicon.meaning(item.word) or item.word for item in items]
    for key, item in zip(keys, items, strict=True):
        spellings[key][item.word] += 1
    number = {key: i for i, key in enumerate(sorted(spellings))}
    classes = tuple(max(sorted(spellings[key]), key=lambda word: spellings[key][word]) for key in number)
    return LabelledPhotos(
        items=tuple(items),
        class_ids=tuple(number[key] for key in keys),
        classes=classes,
        lexicon=lexicon,
        excluded=excluded,
    )


def novel_names(novel: Collection[str], lexicon: Lexicon) -> frozenset[str]:
    """All names of withheld words and of their hyponyms: dog, domestic dog, terrier, …

    Raises:
        UserError: the lexicon does not know a word, so what its kinds are cannot be told.
    """
    if unknown := [word for word in novel if lexicon.meaning(word) is None]:
        raise UserError(f"data.novel: the lexicon does not know {unknown[0]!r}; leave it out with data.leave_out")
    below = lexicon.at_or_below(novel)
    spellings = (noun for noun, key in lexicon.nouns.items() if key in below)
    return frozenset((*spellings, *(name for key in below for name in lexicon.meanings[key].names)))


class PhotoWordSource:
    """Squares of photos with the word of their class: a sample source for CLIP.

    A sample is (image uint8 (3, S, S), word, class id).

    Args:
        words: from `read_photo_words`.
        size: S.
        seed: crops of different seeds share nothing.
        config: shares, sizes of crops, length.
    """

    def __init__(self, words: LabelledPhotos, *, size: int, seed: int, config: PhotoWords) -> None:
        self.words, self.size, self.seed, self.config = words, size, seed, config
        boxed = np.array([item.box is not None for item in words.items])
        ids = np.array(words.class_ids)
        share = config.box_share if boxed.any() and not boxed.all() else float(boxed.any())
        weights = np.zeros(len(ids))
        for chosen, part in ((boxed, share), (~boxed, 1 - share)):
            counts = np.bincount(ids[chosen], minlength=len(words.classes))
            class_weights = 1 / np.sqrt(counts[ids[chosen]])  # a class as often as the root of its number
            weights[chosen] = part * class_weights / class_weights.sum() if len(class_weights) else class_weights
        self._cumulative = np.cumsum(weights) / weights.sum()

    def __len__(self) -> int:
        return self.config.length

    def identity(self) -> dict[str, str]:
        """Names and content of the photos, and their labels."""
        items = self.words.items
        files = sorted({item.file for item in items})
        root = Path(os.path.commonpath([file.parent for file in files]))
        names = [os.path.relpath(file, root) for file in files]
        labels = [(os.path.relpath(item.file, root), item.word, item.box) for item in items]
        return {**files_identity("photos", root, names), "words and boxes": text_identity(labels)}

    def sample(self, index: int, draw: int = 0) -> tuple[U8, str, int]:
        """The item, its crop and resolution are drawn by (seed, index, draw).

        Raises:
            BadImageError: the photo cannot be read.
        """
        dice = Dice(self.seed, index, draw)
        number = min(int(np.searchsorted(self._cumulative, dice.random(), side="right")), len(self.words.items) - 1)
        item = self.words.items[number]
        picture = read_image(item.file)
        low, high = self.config.resolution
        side = round(math.exp(dice.uniform(math.log(low), math.log(high))))
        square = cut_square(picture, self._window(item, picture.shape[0], picture.shape[1], dice), min(side, self.size))
        if square.shape[0] != self.size:
            square = cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(square.transpose(2, 0, 1)), item.word, self.words.class_ids[number]

    def _window(self, item: LabelledCrop, height: int, width: int, dice: Dice) -> Box:
        if item.box is None:
            side = min(height, width) * dice.uniform(0.55, 1.0) if dice.chance(0.7) else float(max(height, width))
            x, y = (max(0.0, extent - side) * (dice.random() - 0.5) + extent / 2 for extent in (width, height))
            return x - side / 2, y - side / 2, side, side
        low, high = (math.log(value) for value in self.config.crop_side)
        left, top, w, h = item.box
        side = max(w, h) * math.exp(dice.uniform(low, high))
        x, y = left + w * dice.uniform(0.4, 0.6), top + h * dice.uniform(0.4, 0.6)
        return x - side / 2, y - side / 2, side, side

    collate = staticmethod(PairSource.collate)


def square_around(box: Box, scale: float) -> Box:
    """The square around a box, `scale` times its longer side."""
    x, y, w, h = box
    side = scale * max(w, h)
    return x + w / 2 - side / 2, y + h / 2 - side / 2, side, side


def cut_square(picture: U8, window: Box, size: int) -> U8:
    """A window (x, y, side, side) of a photo, antialiased, grey beyond the border.

    Args:
        picture: (H, W, 3) uint8.
        window: may hang out of the photo.
        size: side of the result.

    Returns:
        (size, size, 3) uint8.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    x, y, w, h = window
    x0, y0, x1, y1 = max(0, math.floor(x)), max(0, math.floor(y)), math.ceil(x + w), math.ceil(y + h)
    inner = picture[y0 : max(y0 + 1, min(height, y1)), x0 : max(x0 + 1, min(width, x1))]
    left, top = x0 - math.floor(x), y0 - math.floor(y)
    right, bottom = (
        max(0, x1 - math.floor(x) - left - inner.shape[1]),
        max(0, y1 - math.floor(y) - top - inner.shape[0]),
    )
    canvas = np.pad(inner, ((top, bottom), (left, right), (0, 0)), constant_values=GREY)
    offset_x, offset_y = x - math.floor(x), y - math.floor(y)
    box = (offset_x, offset_y, min(offset_x + w, canvas.shape[1]), min(offset_y + h, canvas.shape[0]))
    return np.asarray(Image.fromarray(canvas).resize((size, size), Image.Resampling.BILINEAR, box=box))


@dataclass(frozen=True, kw_only=True)
class ClassCaptions:
    """Captions of a class: its word, synonyms and hypernyms, as numbers of the vocabulary."""

    word: int
    synonyms: tuple[int, ...]
    hypernyms: tuple[int, ...]


def vocabulary_of(words: LabelledPhotos) -> tuple[list[str], np.ndarray, list[ClassCaptions]]:
    """The words that a picture is contrasted with, and which of them are correct for a class.

    Returns:
        V words: the classes, their synonyms and hypernyms; (C, V) bool, True where a word means the class itself, or
        something above or below it; the captions of each class.
    """
    lexicon = words.lexicon
    related: list[tuple[str, list[str], list[str]]] = []
    for word in words.classes:
        names, above = lexicon.synonyms(word), lexicon.hypernyms(word)
        related.append(
            (word, [n for n in names if n not in words.excluded], [n for n in above if n not in words.excluded])
        )
    vocabulary = sorted({name for word, names, above in related for name in (word, *names, *above)})
    number = {name: i for i, name in enumerate(vocabulary)}
    meaning = [lexicon.meaning(name) for name in vocabulary]
    above_of = {key: set(lexicon.above(key)) for key in meaning if key is not None}
    not_negative = np.zeros((len(words.classes), len(vocabulary)), bool)
    rows = []
    for row, (word, synonyms, hypernyms) in enumerate(related):
        meaning_of_class = lexicon.meaning(word)
        not_negative[row, [number[word], *(number[name] for name in synonyms + hypernyms)]] = True
        if meaning_of_class is not None:
            for column, key in enumerate(meaning):
                if key is not None and (
                    key == meaning_of_class or key in above_of[meaning_of_class] or meaning_of_class in above_of[key]
                ):
                    not_negative[row, column] = True
        rows.append(
            ClassCaptions(
                word=number[word],
                synonyms=tuple(number[n] for n in synonyms),
                hypernyms=tuple(number[n] for n in hypernyms),
            )
        )
    return vocabulary, not_negative, rows
