# SPDX-License-Identifier: Apache-2.0
"""Photos with named boxes, and the soft targets of their proposals for every word of the vocabulary.

A word is a meaning of the lexicon: files that spell it differently (tv, television) give one word. A box of a terrier
is also one of a dog and of an animal; whether a box of a dog is a terrier is unknown.

Shapes: ``P`` proposals of a photo, ``V`` words of the vocabulary.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from ovd.data.catalog import read_annotated
from ovd.data.joined import check_withheld, join_images, no_such_part
from pretrain.data.coco import GroundTruth, ImageId, read_ground_truth
from pretrain.data.folder import require_files
from pretrain.data.lexicon import Lexicon
from pretrain.data.photos import novel_names, read_labels
from pretrain.engine.errors import UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.files import read_json
from pretrain.engine.identity import files_identity, text_identity

F32 = NDArray[np.float32]

MIN_IOU, FULL_IOU = 0.4, 0.9
"""A proposal's target grows from 0 at IoU .3 to the label's score at .9, and is 0 below .4: a head that learns to call
every overlapping box right lets duplicates rise."""
LABELLED = 0.25
"""Proposals with a target from here on are labelled: every unrelated word is wrong for them."""
BOX_SCORE = 0.4
"""A box from here on may be refined by the photo's noun."""
CONFIDENT = 0.3
"""Labels from here on have a localisation quality; for the others nobody knows whether there is an object."""


@dataclass(frozen=True, kw_only=True)
class WordTable:
    """The vocabulary of a training.

    Attributes:
        words: V, one spelling of each meaning: the labels, and the words above them.
        always_labelled: number of words, from the first, that are labelled in every photo.
        lexicon: what they mean.
    """

    words: tuple[str, ...]
    always_labelled: int
    lexicon: Lexicon

    @cached_property
    def index(self) -> dict[str, int]:
        """Word -> its number."""
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def implied(self) -> tuple[tuple[int, ...], ...]:
        """For each word itself and the words of the vocabulary above it."""
        by_meaning = {self.lexicon.meaning(word): number for number, word in enumerate(self.words)}
        by_meaning.pop(None, None)
        return tuple(
            (number, *(by_meaning[key] for key in self.lexicon.above(self.lexicon.meaning(word)) if key in by_meaning))
            for number, word in enumerate(self.words)
        )

    @cached_property
    def below(self) -> tuple[tuple[int, ...], ...]:
        """For each word those of the vocabulary that it is above of."""
        below: list[list[int]] = [[] for _ in self.words]
        for number, above in enumerate(self.implied):
            for other in above[1:]:
                below[other].append(number)
        return tuple(tuple(numbers) for numbers in below)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo and its labels.

    Attributes:
        file: path.
        size: (height, width) as the annotations state it, or None.
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        words: (n,) numbers of the vocabulary.
        scores: (n,) 0…1.
        noun: number of the one thing that the photo shows, or None.
        image_id: in the annotation files.
    """

    file: Path
    size: tuple[int, int] | None
    boxes: F32
    words: NDArray[np.int64]
    scores: F32
    noun: int | None
    image_id: ImageId = -1


class RegionTargets(NamedTuple):
    """Targets of a photo's proposals.

    Attributes:
        target: (P, V) 0…1: how likely the proposal is that word and a good box.
        mask: (P, V) bool: where there is a target; elsewhere the word has no loss.
    """

    target: F32
    mask: NDArray[np.bool_]


def region_targets(photo: Photo, boxes_P4: F32, table: WordTable) -> RegionTargets:
    """Targets of a photo's proposals (x1, y1, x2, y2 in its pixels)."""
    count, width = len(boxes_P4), len(table.words)
    target = np.zeros((count, width), dtype=np.float32)
    mask = np.zeros((count, width), dtype=bool)
    mask[:, : table.always_labelled] = True
    boxes, words, scores = _with_noun(photo, boxes_P4, table)
    if not len(boxes) or not count:
        return RegionTargets(target, mask)
    overlap = box_iou(torch.from_numpy(boxes_P4.astype(np.float32)), torch.from_numpy(boxes)).numpy()
    quality = np.where(overlap >= MIN_IOU, ((overlap - 0.3) / (FULL_IOU - 0.3)).clip(0, 1), 0) * scores
    for label, word in enumerate(words.tolist()):
        for column in table.implied[word]:
            np.maximum(target[:, column], quality[:, label], out=target[:, column])
    labelled = quality >= LABELLED
    mask[labelled.any(axis=1)] = True
    for region, label in zip(*np.nonzero(labelled), strict=True):
        mask[region, list(table.below[int(words[label])])] = False  # a dog may be a terrier
    mask |= target > 0
    return RegionTargets(target, mask)


def localization_quality(photo: Photo, boxes_P4: F32, table: WordTable) -> F32:
    """(P,) best IoU of each proposal with a confident label, whatever it names; 0 without one."""
    labels, _, scores = _with_noun(photo, boxes_P4, table)
    labels = labels[scores >= CONFIDENT]
    if not len(labels) or not len(boxes_P4):
        return np.zeros(len(boxes_P4), np.float32)
    overlap = box_iou(torch.from_numpy(boxes_P4.astype(np.float32)), torch.from_numpy(labels))
    return np.asarray(overlap.max(dim=1).values.numpy())


def _with_noun(photo: Photo, boxes_P4: F32, table: WordTable) -> tuple[F32, NDArray[np.int64], F32]:
    """Labels of a photo, its noun included: on the box with a more general label, else on the largest proposal.

    The largest proposal takes a photo's label in Detic (arXiv:2201.02605, section 3.2).
    """
    boxes, words, scores = photo.boxes, photo.words, photo.scores
    if photo.noun is None or not len(boxes_P4):
        return boxes, words, scores
    general = [i for i in range(len(words)) if int(words[i]) in table.implied[photo.noun] and scores[i] >= BOX_SCORE]
    if general:
        chosen = max(general, key=lambda i: float(scores[i]))
        box, score = boxes[chosen], scores[chosen]
    else:
        area = (boxes_P4[:, 2] - boxes_P4[:, 0]) * (boxes_P4[:, 3] - boxes_P4[:, 1])
        box, score = boxes_P4[int(area.argmax())], np.float32(0.7)
    return (
        np.concatenate([boxes, np.asarray(box, dtype=np.float32)[None]]),
        np.concatenate([words, np.array([photo.noun])]),
        np.concatenate([scores, np.array([score], dtype=np.float32)]),
    )


class PhotoLabels:
    """Photos of several COCO files and a table of nouns, with one vocabulary.

    Args:
        folder: that ``file_name`` is relative to.
        annotations: COCO files of the same images, or what was read from any; the categories of the first are
            labelled in every photo.
        labels: JSON table, file name -> nouns; photos that no file calls a scene and that have one noun are used.
        lexicon: what the words mean.
        part: only images whose ``split`` is this; None: all.
        min_score: boxes with a lower score are left out.
        not_things, leave_out: nouns that are not learned; those left out take their photos with them.
        withheld: names of categories whose boxes are left out.
        novel: withheld words; boxes, photos and names of them and of their hyponyms are left out.

    Raises:
        UserError: unreadable or contradicting files, an unknown part or name, or no photo at all.
    """

    def __init__(
        self,
        *,
        folder: Path,
        annotations: Sequence[Path | GroundTruth],
        labels: Path | None,
        lexicon: Lexicon,
        part: str | None,
        min_score: float,
        not_things: Collection[str] = (),
        leave_out: Collection[str] = (),
        withheld: Collection[str] = (),
        novel: Collection[str] = (),
    ) -> None:
        truths = [
            f if isinstance(f, GroundTruth) else read_ground_truth(f, hint="data.annotations must be COCO files")
            for f in annotations
        ]
        check_withheld(withheld, truths)
        unknown = novel_names(novel, lexicon)
        leave_out = {*leave_out, *unknown}
        withheld = {*withheld, *(name for truth in truths for name in truth.categories.values() if name in unknown)}
        self.notices = [f"{truth.where}: {warning}" for truth in truths for warning in truth.warnings]
        self.lexicon = lexicon
        scenes = {name for truth in truths for name in truth.scenes}
        named = [] if labels is None else read_labels(labels, folder, parts={}, scenes=scenes, part="all")
        skipped = {item.file for item in named if item.word in leave_out}
        nouns = {i.file: i.word for i in named if i.word not in leave_out and i.word not in not_things}
        first, *rest = [[n for n in truth.categories.values() if n not in withheld] for truth in truths]
        others = [*(name for names in rest for name in names), *nouns.values()]
        self.table = _table(first, others, lexicon, excluded={*leave_out, *withheld})
        self.photos = self._join(truths, folder, nouns, skipped, part=part, min_score=min_score, withheld=withheld)
        if not self.photos:
            if part is None:
                raise UserError(f"{truths[0].where}: no photo to train on")
            raise no_such_part(part, (split for truth in truths for split in truth.parts.values()))
        files = [photo.file.relative_to(folder) for photo in self.photos]
        if missing := require_files(files, folder, where=truths[0].where, allowed=BAD_IMAGES_ALLOWED):
            self.notices.append(missing)

    def _join(
        self,
        truths: Sequence[GroundTruth],
        folder: Path,
        nouns: dict[Path, str],
        skipped: set[Path],
        *,
        part: str | None,
        min_score: float,
        withheld: Collection[str],
    ) -> list[Photo]:
        joined = join_images(truths)
        labels: dict[ImageId, list[tuple[list[float], int, float]]] = {}
        for truth in truths:
            for annotation in truth.annotations:
                name, score = truth.categories[annotation["category_id"]], float(annotation.get("score", 1.0))
                if score < min_score or annotation["iscrowd"] or name in withheld or min(annotation["bbox"][2:]) <= 0:
                    continue
                x, y, w, h = annotation["bbox"]
                labels.setdefault(annotation["image_id"], []).append(([x, y, x + w, y + h], self.number(name), score))
        photos = []
        for image_id in joined.of_part(part):
            path = folder / joined.files[image_id]
            if path in skipped:
                continue
            boxes_of = labels.get(image_id, [])
            photos.append(
                Photo(
                    file=path,
                    size=joined.sizes[image_id],
                    boxes=np.array([box for box, _, _ in boxes_of], dtype=np.float32).reshape(-1, 4),
                    words=np.array([word for _, word, _ in boxes_of], dtype=np.int64),
                    scores=np.array([score for _, _, score in boxes_of], dtype=np.float32),
                    noun=self.number(nouns[path]) if path in nouns else None,
                    image_id=image_id,
                )
            )
        return photos

    def number(self, name: str) -> int:
        """Of the word that a name means."""
        return self._numbers.get(self.lexicon.meaning(name) or name, self.table.index.get(name, -1))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {self.lexicon.meaning(word) or word: number for number, word in enumerate(self.table.words)}

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, str]:
        """Names and content of the photos, and their labels."""
        root = Path(os.path.commonpath([photo.file.parent for photo in self.photos]))
        names = [os.path.relpath(photo.file, root) for photo in self.photos]
        contents = [
            (name, photo.boxes.tolist(), photo.words.tolist(), photo.scores.tolist(), photo.noun)
            for name, photo in zip(names, self.photos, strict=True)
        ]
        labels = text_identity(self.table.words, self.table.always_labelled, contents)
        return {**files_identity("photos", root, names), "words and boxes": labels}

    def image(self, index: int) -> NDArray[np.uint8]:
        """Photo ``index``, (H, W, 3) RGB.

        Raises:
            BadImageError: it cannot be read, or is not of the size that the annotations say.
        """
        photo = self.photos[index]
        return read_annotated(photo.file, photo.size)


def _table(
    always_labelled: Sequence[str], others: Sequence[str], lexicon: Lexicon, *, excluded: Collection[str]
) -> WordTable:
    """Each meaning once: exhaustively labelled ones first, then the others, then their hypernyms unless excluded."""
    excluded_meanings = {lexicon.meaning(name) or name for name in excluded}
    usual = Counter(others)
    chosen: dict[str, str] = {}
    for name in (*always_labelled, *sorted(usual, key=lambda word: (-usual[word], word))):
        chosen.setdefault(lexicon.meaning(name) or name, name)
    above = [key for meaning in list(chosen) if meaning in lexicon.meanings for key in lexicon.above(meaning)]
    for key in sorted(set(above)):
        if key not in excluded_meanings:
            chosen.setdefault(key, lexicon.meanings[key].names[0])
    words = tuple(chosen.values())
    if len(set(words)) < len(words):  # two meanings above are spelt alike: the more frequent one keeps the name
        named: set[str] = set()
        words = tuple(word for word in words if not (word in named or named.add(word)))  # type: ignore[func-returns-value]
    count = len({lexicon.meaning(name) or name for name in always_labelled})
    return WordTable(words=words, always_labelled=count, lexicon=lexicon)


def nouns_of(path: str | None) -> frozenset[str]:
    """The nouns of a JSON list, or of an object of lists (by the reason why they are listed); none for None.

    Raises:
        UserError: it is neither.
    """
    if path is None:
        return frozenset()
    content = read_json(path)
    groups = list(content.values()) if isinstance(content, dict) else [content]
    if not all(isinstance(group, list) and all(isinstance(noun, str) for noun in group) for group in groups):
        raise UserError(f"{path}: neither a JSON list of nouns nor an object of such lists")
    return frozenset(noun for group in groups for noun in group)
