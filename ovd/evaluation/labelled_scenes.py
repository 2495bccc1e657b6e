# SPDX-License-Identifier: Apache-2.0
"""Labelled photographs as scenes for the calibration of `ovd.evaluation.typed`.

A picture's categories are typed, and words that are not in it: other categories of the data set, whose labels say so,
and, where it has few, shipped nouns that name none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ovd.data.catalog import CocoImages
from ovd.data.splits import Split
from ovd.detector import Detector
from ovd.evaluation.options import DataSpec
from ovd.evaluation.typed import TypedScene, draw_words
from ovd.formats.labels import Labels
from ovd.formats.read import read_labels, read_spec
from ovd.vocabulary import Vocabulary
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import BadImageError, UserError, warn

MANY = 30  # categories from which on absent words come from the data set alone
MIN_PICTURES = 10  # pictures for the fit, and for the report


@dataclass(frozen=True, kw_only=True)
class LabelledScenes:
    """Scenes of a data set: its pictures in turn for the fit and for the report.

    Attributes:
        names: the categories, then the further nouns; classes of the scenes are indices into it.
        fit, report: scenes.
    """

    names: tuple[str, ...]
    fit: list[TypedScene]
    report: list[TypedScene]


def labels_of(data: str, *, part: str | None = None) -> Labels:
    """The labels of ``--data``: ``coco:IMAGES:ANNOTATIONS.json``, or what `LabelSpec` reads.

    Args:
        data: as on the command line.
        part: of the data set; None: as ``data`` says, else ``val`` where there is one.

    Raises:
        UserError: generated scenes, or labels that cannot be read.
    """
    spec = DataSpec.parse(data)
    if spec.labels is not None:
        return read_spec(spec.labels if part is None else replace(spec.labels, part=part), prefer=("val",))
    if spec.annotations is None:
        raise UserError(f"--data {data}: leave it out; without it scores are fitted on Sticker Scenes")
    return read_labels(spec.annotations, kind="coco", images=spec.images, part=part, prefer=("val",))


def labelled_scenes(detector: Detector, labels: Labels, *, count: int, absent: int) -> LabelledScenes:
    """Run the detector over the pictures of a data set.

    Args:
        detector: loaded.
        labels: the data set.
        count: scenes for the fit, and again for the report.
        absent: words per picture that are not in it.

    Raises:
        UserError: labels that cannot be read, or too few pictures.
    """
    truth = labels.truth()
    split = Split.everything(truth.categories)
    photos = CocoImages(images=labels.root, annotations=truth, split=split, labels="all")
    for notice in photos.notices:
        warn(notice)
    if len(photos) < 2 * MIN_PICTURES:
        raise UserError(
            f"--data {labels.where}: {len(photos)} pictures with objects; at least {2 * MIN_PICTURES} are needed"
        )
    order = np.random.default_rng(1000).permutation(len(photos))[: 2 * count].tolist()
    names = photos.names + _further_nouns(photos.names)
    fit, report = (list(_scenes(detector, photos, order[start::2], len(names), absent)) for start in (0, 1))
    if min(len(fit), len(report)) < MIN_PICTURES:
        raise UserError(f"--data {labels.where}: fewer than {2 * MIN_PICTURES} of its pictures can be read")
    return LabelledScenes(names=names, fit=fit, report=report)


def _further_nouns(names: Sequence[str]) -> tuple[str, ...]:
    """Shipped nouns for data sets of few categories, without those that share a word with one."""
    if len(names) >= MANY:
        return ()
    used = {word for name in names for word in name.casefold().split()}
    return tuple(noun for noun in Stickers.load().nouns if not used & set(noun.casefold().split()))


def _scenes(
    detector: Detector, photos: CocoImages, indices: Sequence[int], words: int, absent: int
) -> Iterator[TypedScene]:
    for index in indices:
        try:
            labelled = photos.load(index)
        except BadImageError as problem:
            warn(f"{problem}; left out")
            continue
        classes = labelled.classes.tolist()
        rng = np.random.default_rng([1000, index])
        present, missing = draw_words(classes, words=range(words), others=classes, near={}, absent=absent, rng=rng)
        yield TypedScene(
            regions=detector.embed(labelled.image).regions,
            boxes=labelled.boxes,
            classes=labelled.classes,
            present=present,
            absent=missing,
        )


def vocabulary_of(scenes: LabelledScenes, detector: Detector) -> Vocabulary:
    """The names as words, with the detector's prompts."""
    return Vocabulary.of(scenes.names, templates=detector.templates)
