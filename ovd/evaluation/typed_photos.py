# SPDX-License-Identifier: Apache-2.0
"""Photos with a few typed words, some of them present and some absent, as in real use.

Two kinds. In photos with boxes the exhaustively labelled words are typed: a word with a box is present, a word without
a label is absent, and half of the absent words are those most easily confused with a present one. Photos of a single
named object have no box for it: there a word is right if it names the object, and half of the absent words are those
most easily confused with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ovd.data.photo_words import Photo, PhotoLabels, WordTable
from ovd.detector import Detector
from ovd.evaluation.typed import Outcome, TypedScene
from ovd.inference.arrays import Floats
from ovd.inference.postprocess import NMS_IOU, batched_nms
from ovd.inference.scorers import Scorer
from ovd.inference.scoring import RegionSet
from pretrain.engine.errors import BadImageError, warn

CONFIDENT = 0.3
"""A word is typed as present where a box has this score."""
CONFUSABLE = 8
"""Nearest words, by their text embeddings, that half of the absent words are drawn from."""


@dataclass(frozen=True, kw_only=True)
class NamedPhoto:
    """A photo of one thing: its regions, the word of the thing, and words that it does not show."""

    regions: RegionSet
    present: int
    absent: tuple[int, ...]


def related(table: WordTable, word: int) -> frozenset[int]:
    """The word, those above it and those below it."""
    return frozenset(table.implied[word]) | frozenset(table.below[word])


def confusable(rows_CD: Floats, table: WordTable, words: Sequence[int]) -> dict[int, list[int]]:
    """For each word, the nearest of the other words that are not related to it."""
    rows = rows_CD[list(words)]
    order = np.argsort(-(rows @ rows.T), axis=1, kind="stable").tolist()
    nearest = {word: [words[i] for i in near] for word, near in zip(words, order, strict=True)}
    return {word: [w for w in near if w not in related(table, word)][:CONFUSABLE] for word, near in nearest.items()}


def absent_words(alike: Sequence[int], others: Sequence[int], *, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` words that a photo does not show, half of them alike to what it shows, as far as there are any.

    Args:
        alike: words that are easily taken for what it shows.
        others: all that it does not show.
        count: how many.
        rng: of this photo.
    """
    chosen: list[int] = rng.permutation(alike).tolist()[: count // 2]
    return chosen + [w for w in rng.permutation(others).tolist() if w not in chosen][: count - len(chosen)]


def labelled_words(photo: Photo, table: WordTable) -> tuple[int, ...]:
    """The exhaustively labelled words that the photo certainly shows."""
    sure = (photo.words < table.always_labelled) & (photo.scores >= CONFIDENT)
    return tuple(sorted(set(photo.words[sure].tolist())))


def typed_photo(
    photo: Photo,
    regions: RegionSet,
    table: WordTable,
    *,
    near: Mapping[int, Sequence[int]],
    absent: int,
    rng: np.random.Generator,
) -> TypedScene | None:
    """A photo with boxes and its words; None if no word is certainly present.

    Args:
        photo: with labels.
        regions: of the detector.
        table: the vocabulary.
        near: of `confusable`.
        absent: how many absent words.
        rng: of this photo.
    """
    present = labelled_words(photo, table)
    if not present:
        return None
    named = {
        w
        for word in {*photo.words.tolist(), *([] if photo.noun is None else [photo.noun])}
        for w in related(table, word)
    }
    free = [w for w in range(table.always_labelled) if w not in named]
    alike = list(dict.fromkeys(w for word in present for w in near[word] if w not in named))
    chosen = absent_words(alike, free, count=absent, rng=rng)
    typed = np.isin(photo.words, present)
    return TypedScene(
        regions=regions,
        boxes=photo.boxes[typed],
        classes=photo.words[typed],
        certainty=photo.scores[typed],
        present=present,
        absent=tuple(chosen),
    )


def typed_photos(
    detector: Detector,
    photos: PhotoLabels,
    rows_CD: Floats,
    *,
    absent: int = 10,
    seed: int = 0,
    limit: int | None = None,
) -> tuple[list[TypedScene], list[NamedPhoto]]:
    """The photos with boxes and those of one thing whose word is not looked for everywhere, through the detector.

    Args:
        detector: of photographs.
        photos: with labels.
        rows_CD: text embeddings of the photos' words.
        absent: absent words in each photo.
        seed: of the words drawn.
        limit: photos at most, drawn by the seed; None: all.
    """
    table = photos.table
    near = confusable(rows_CD, table, range(table.always_labelled))
    nouns = sorted(
        {photo.noun for photo in photos.photos if photo.noun is not None and photo.noun >= table.always_labelled}
    )
    near_nouns = confusable(rows_CD, table, nouns)
    scenes, named = [], []
    chosen: Sequence[int] = range(len(photos.photos))
    if limit is not None and limit < len(chosen):
        chosen = sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit].tolist())
    for index in chosen:
        photo = photos.photos[index]
        rng = np.random.default_rng([seed, index])
        try:
            regions = detector.embed(photos.image(index)).regions
        except BadImageError as problem:
            warn(f"{problem}; left out")
            continue
        scene = typed_photo(photo, regions, table, near=near, absent=absent, rng=rng)
        if scene is not None:
            scenes.append(replace(scene, index=index))
        if photo.noun in nouns:
            others = [w for w in nouns if w not in related(table, photo.noun)]
            named.append(
                NamedPhoto(
                    regions=regions,
                    present=photo.noun,
                    absent=tuple(absent_words(near_nouns[photo.noun], others, count=absent, rng=rng)),
                )
            )
    return scenes, named


def named_outcome(named: Sequence[NamedPhoto], scorer: Scorer, *, floor: float) -> Outcome:
    """Boxes of the words typed for photos of one thing: the best box of its word is right, all others are wrong.

    Nobody drew that box. But a detector that shows the thing's parts beside it is wrong in most photos of one thing.
    """
    scores: list[float] = []
    right: list[float] = []
    best_absent: list[float] = []
    for photo in named:
        words = (photo.present, *photo.absent)
        score_RC = scorer.select(words)(photo.regions)
        best_absent += score_RC[:, 1:].max(axis=0).tolist() if len(score_RC) else [0.0] * len(photo.absent)
        region, word = np.nonzero(score_RC >= np.float32(floor))
        keep = batched_nms(photo.regions.boxes[region], score_RC[region, word], word, NMS_IOU)
        matched = False
        for i in keep.tolist():
            scores.append(float(score_RC[region[i], word[i]]))
            right.append(float(word[i] == 0 and not matched))
            matched = matched or bool(word[i] == 0)
    return Outcome(
        score=np.array(scores), correct=np.array(right), best_absent=np.array(best_absent), labels=float(len(named))
    )
