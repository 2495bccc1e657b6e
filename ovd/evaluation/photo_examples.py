# SPDX-License-Identifier: Apache-2.0
"""Photos with a crop from another photo in place of each typed word, to calibrate scores of crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ovd.data.photo_words import Photo, PhotoLabels
from ovd.detector import Detector
from ovd.evaluation.typed import TypedScene
from ovd.examples import Crop, Example
from ovd.inference.arrays import Floats
from pretrain.engine.errors import BadImageError, warn

CERTAIN = 0.5
"""Only boxes with this score are cut out."""
SIDE = 32.0
"""Minimum shorter side of a crop, in pixels: what a user would plausibly cut out."""
CROPS = 2
"""Of each word, from two photos: neither photo is searched for its own crop."""


@dataclass(frozen=True, kw_only=True)
class WordCrops:
    """Crops of the words that are labelled in every photo.

    Attributes:
        rows: (2, C, D) unit image embeddings; zeros of words without two photos.
        sources: word -> numbers of the two photos.
    """

    rows: Floats
    sources: Mapping[int, tuple[int, ...]]

    def rows_for(self, index: int) -> Floats:
        """(C, D) of crops that are not from photo ``index``."""
        rows = self.rows[0].copy()
        for word, (first, _) in self.sources.items():
            if first == index:
                rows[word] = self.rows[1, word]
        return rows


def boxes_to_cut(photo: Photo, words: int) -> dict[int, tuple[float, float, float, float]]:
    """The largest certain box of each of the first ``words`` words."""
    largest: dict[int, tuple[float, float, float, float]] = {}
    sides = photo.boxes[:, 2:] - photo.boxes[:, :2]
    for i in np.argsort(sides.prod(axis=1), kind="stable").tolist():  # the largest one stays
        if photo.words[i] < words and photo.scores[i] >= CERTAIN and sides[i].min() >= SIDE:
            x1, y1, x2, y2 = photo.boxes[i].tolist()
            largest[int(photo.words[i])] = (x1, y1, x2, y2)
    return largest


def word_crops(detector: Detector, photos: PhotoLabels, *, seed: int = 0) -> WordCrops:
    """Cut two crops of each word out of randomly drawn photos, and embed them as a user's examples are."""
    always_labelled = photos.table.always_labelled
    boxes_of: dict[int, list[tuple[int, tuple[float, float, float, float]]]] = {}
    for index in np.random.default_rng(seed).permutation(len(photos.photos)).tolist():
        for word, box in boxes_to_cut(photos.photos[index], always_labelled).items():
            if len(boxes_of.setdefault(word, [])) < CROPS:
                boxes_of[word].append((index, box))
    rows = np.zeros((CROPS, len(photos.table.words), detector.model.background_words.shape[1]), np.float32)
    sources = {}
    for word, locations in sorted(boxes_of.items()):
        if len(locations) < CROPS:
            continue
        try:
            crops = [Crop(photos.image(index), box) for index, box in locations]
        except BadImageError as problem:
            warn(f"{problem}; left out")
            continue
        rows[:, word] = detector.embed_examples([Example(photos.table.words[word], (crop,)) for crop in crops])
        sources[word] = tuple(index for index, _ in locations)
    return WordCrops(rows=rows, sources=sources)


def with_crops(scenes: Sequence[TypedScene], crops: WordCrops) -> list[TypedScene]:
    """The scenes with crops in place of their words; those where no present word has one are left out."""
    result = []
    for scene in scenes:
        present = tuple(word for word in scene.present if word in crops.sources)
        labelled = np.isin(scene.classes, present)
        if present:
            result.append(
                replace(
                    scene,
                    rows=crops.rows_for(scene.index),
                    present=present,
                    absent=tuple(word for word in scene.absent if word in crops.sources),
                    boxes=scene.boxes[labelled],
                    classes=scene.classes[labelled],
                    certainty=None if scene.certainty is None else scene.certainty[labelled],
                )
            )
    return result
