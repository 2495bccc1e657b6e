# SPDX-License-Identifier: Apache-2.0
"""Labelled photos of a person's own, and the canvases that a detector learns their classes from.

Photos without any object are kept: they show what the classes are not.

Shapes: ``T`` boxes of a photo or canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.data.catalog import read_annotated, refuse_boxes_outside, refuse_other_size
from ovd.data.copies import photo_groups
from ovd.data.joined import corners_of, is_object
from ovd.data.own_labels import about_names, why_no_box
from ovd.pictures import frame_count, require_decodable, resized, upright_size
from ovd.words import cleaned
from pretrain.data.coco import GroundTruth
from pretrain.data.coco_boxes import BORDER
from pretrain.data.coco_entries import CocoAnnotation, CocoJson, ImageId
from pretrain.data.folder import require_files
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.identity import file_identity, files_identity, text_identity

if TYPE_CHECKING:
    from ovd.data.negatives import NegativePhotos

NEGATIVE_SCALE = (0.5, 4.0)
"""Range of the factor on a negative's size: what it shows is seen from afar and from near."""
MIN_VISIBLE = 0.25
"""Share of a box that a cut must leave for it to stay a label; less is neither object nor background."""
SMALL = 8
"""Pixels between two points of the finest grid that finds boxes."""


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Labels of a photo.

    Attributes:
        corners: (T, 4) float32 x1, y1, x2, y2 in pixels.
        classes: (T,) int64, -1 for a doubtful box or a crowd.
    """

    corners: NDArray[np.float32]
    classes: NDArray[np.int64]


def drawn(count: int, *, limit: int | None, seed: int) -> list[int]:
    """Which of so many photos a training uses, in the order drawn; None: all."""
    order: list[int] = np.random.default_rng([seed, 11]).permutation(count)[:limit].tolist()
    return order


class Tile(NamedTuple):
    """A picture that is put onto a canvas.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: of it.
        scale: range of a random factor on its size.
    """

    image: NDArray[np.uint8]
    labels: Boxes
    scale: tuple[float, float]


class FinetuneSample(TypedDict):
    """A training canvas.

    Attributes:
        image: (3, S, S) uint8 RGB.
        boxes: (T, 4) x1, y1, x2, y2 in its pixels.
        classes: (T,) int64, -1 where the class is unknown.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor


class FinetunePhotos:
    """Photos with boxes of classes.

    Photos that are missing, of which a few may, or cannot be read are left out, with a notice.

    Args:
        folder: that the file names are relative to.
        truth: what was read from their labels.
        confident, doubtful: thresholds on an annotation's ``score``; without one it is confident, a crowd doubtful.

    Attributes:
        names: of the classes that have a confident box, in the form that a person types (`ovd.words.cleaned`).
        image_ids: of the photos, in the order of their indices.
        notices: what a person should know of the labels.

    Raises:
        UserError: no confident box at all, two classes of one name, or too many photos that are missing or unreadable.
    """

    def __init__(self, *, folder: Path, truth: GroundTruth, confident: float, doubtful: float) -> None:
        self.folder, self.where = folder, truth.where
        self._sizes = truth.sizes
        self._files = {image_id: truth.file_of(image_id) for image_id in truth.sizes}
        self.notices = [f"{truth.where}: {warning}" for warning in truth.warnings]
        every_box: dict[ImageId, list[list[float]]] = {}
        for annotation in truth.annotations:
            every_box.setdefault(annotation["image_id"], []).append(annotation["bbox"])
        self.image_ids: list[ImageId] = self._usable(every_box)
        usable = set(self.image_ids)
        boxes: dict[ImageId, list[tuple[list[float], int]]] = {}
        for annotation in truth.annotations:
            sure = is_object(annotation, confident=confident, doubtful=doubtful)
            if sure is None or annotation["image_id"] not in usable:
                continue
            category_id = annotation["category_id"] if sure else -1
            boxes.setdefault(annotation["image_id"], []).append((annotation["bbox"], category_id))
        labelled = {category for labels in boxes.values() for _, category in labels}
        used = [category for category in truth.categories if category in labelled]
        if not used:
            raise UserError(f"{truth.where}: {why_no_box(truth.annotations, confident=confident)}")
        self.names = tuple(cleaned(truth.categories[category]) for category in used)
        self.notices += about_names([truth.categories[category] for category in used], where=truth.where)
        number = {-1: -1, **{category: n for n, category in enumerate(used)}}
        self._boxes = {
            image_id: _labels([box for box, _ in labels], [number[category] for _, category in labels])
            for image_id, labels in boxes.items()
        }
        unused = [name for category, name in truth.categories.items() if category not in labelled]
        if unused:
            self.notices.append(f"{truth.where}: no box of {', '.join(map(repr, unused))}: not trained")
        self._groups = photo_groups(self.paths())
        copies = [number for number, group in enumerate(self._groups) if group != number]
        if copies:
            one, other = (self._files[self.image_ids[number]] for number in (copies[0], self._groups[copies[0]]))
            self.notices.append(
                f"{truth.where}: {len(copies)} photos are another one's copies or augmentations (first: {one}, of "
                f"{other}); such photos are held out together or not at all"
            )

    def paths(self) -> list[Path]:
        """The photos' files, in the order of their indices."""
        return [self.folder / self._files[image_id] for image_id in self.image_ids]

    def _usable(self, boxes: Mapping[ImageId, list[list[float]]]) -> list[ImageId]:
        """The photos that can be decoded and have the size that the labels say, or one that their boxes fit.

        Few as they are, one that is found damaged in the middle of the training would be too many for it.

        Raises:
            UserError: more than a few are missing, or more than half cannot be read.
        """
        files = self._files
        if missing := require_files(list(files.values()), self.folder, where=self.where, allowed=BAD_IMAGES_ALLOWED):
            self.notices.append(missing)
        usable, unread, several, over = [], [], [], 0
        for image_id, name in files.items():
            path = self.folder / name
            if not path.is_file():
                continue
            try:
                size, stated = upright_size(path), self._sizes[image_id]
                refuse_other_size(path, stated, size)
                if stated is None:  # else the reader of the file has looked
                    corners = corners_of(boxes.get(image_id, []))
                    refuse_boxes_outside(path, corners, size, where=self.where)
                    limit = np.array([size[1], size[0]] * 2, dtype=np.float32)
                    over += int(((corners < -BORDER) | (corners > limit + BORDER)).any(axis=1).sum())
                require_decodable(path)
                several += [name] if frame_count(path) > 1 else []
                usable.append(image_id)
            except BadImageError as problem:
                unread.append(str(problem))
        if unread:
            text = f"{self.where}: {len(unread)} of {len(files)} photos cannot be used (first: {unread[0]})"
            if len(unread) > len(usable):
                raise UserError(f"{text}; repair or remove them")
            self.notices.append(f"{text}; left out")
        if several:
            self.notices.append(
                f"{self.where}: {len(several)} photos have several frames or pages; the first is used (first: "
                f"{several[0]})"
            )
        if over:
            self.notices.append(f"{self.where}: {over} boxes reach over the border of their photo")
        return usable

    def __len__(self) -> int:
        return len(self.image_ids)

    def boxes(self, index: int) -> Boxes:
        """Labels of photo ``index``."""
        return self._boxes.get(self.image_ids[index]) or _labels([], [])

    def about_small_boxes(self, side: int) -> str | None:
        """A notice where most objects are too small to be learned in photos whose longest side is ``side`` pixels."""
        longest: list[float] = []
        for index, image_id in enumerate(self.image_ids):
            labels, size = self.boxes(index), self._sizes[image_id] or upright_size(self.folder / self._files[image_id])
            corners = labels.corners[labels.classes >= 0]
            longest += ((corners[:, 2:] - corners[:, :2]).max(axis=1) * side / max(size)).tolist()
        small = sum(one < SMALL for one in longest)
        if 2 * small <= len(longest):
            return None
        return (
            f"{self.where}: {small} of {len(longest)} boxes are below {SMALL} pixels at data.side={side}: hardly "
            "anything is learned from them; set a larger data.side, or cut the photos into parts"
        )

    def as_coco(self, chosen: Collection[int]) -> CocoJson:
        """COCO's form of the labels of some photos, which are numbered by index; doubtful boxes are crowds."""
        annotations: list[CocoAnnotation] = []
        for index in chosen:
            labels = self.boxes(index)
            for (x1, y1, x2, y2), number in zip(labels.corners.tolist(), labels.classes.tolist(), strict=True):
                w, h = x2 - x1, y2 - y1
                for category in range(len(self.names)) if number < 0 else [number]:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": category + 1,
                            "bbox": [x1, y1, w, h],
                            "area": w * h,
                            "iscrowd": int(number < 0),
                        }
                    )
        return {
            "images": [{"id": index} for index in chosen],
            "categories": [{"id": n + 1, "name": name} for n, name in enumerate(self.names)],
            "annotations": annotations,
        }

    def image(self, index: int) -> NDArray[np.uint8]:
        """Photo ``index``, (H, W, 3) RGB.

        Raises:
            BadImageError: it cannot be read, or is not of the size that the annotations say.
        """
        image_id = self.image_ids[index]
        return read_annotated(self.folder / self._files[image_id], self._sizes[image_id])

    def identity(self, chosen: Collection[int]) -> dict[str, str]:
        """Names and content of some photos, and their labels."""
        labels = [(self.boxes(i).corners.tolist(), self.boxes(i).classes.tolist()) for i in chosen]
        names = [self._files[self.image_ids[i]] for i in chosen]
        return {**files_identity("photos", self.folder, names), "boxes": text_identity(self.names, labels)}

    def divided(self, share: float, *, limit: int | None, seed: int) -> tuple[list[int], list[int]]:
        """(to train on, held out): photos drawn by the seed, in their order.

        Every class keeps at least half of its boxes for training: a rare class's photos are taken back. What shows one
        photo stays together. None is held out where no object is in them: they could choose nothing.

        Args:
            share: of the photos that are held out.
            limit: use so many photos in all; None: all.
            seed: of the draw.
        """
        order = drawn(len(self), limit=limit, seed=seed)
        together: dict[int, list[int]] = {}
        for photo in order:
            together.setdefault(self._groups[photo], []).append(photo)
        held_out: list[int] = []
        for photos in together.values():
            if len(held_out) < round(share * len(order)):
                held_out += photos
        training = [photo for photo in order if photo not in held_out]
        for number in range(len(self.names)):

            def count(photos: Sequence[int], number: int = number) -> int:
                return sum(int((self.boxes(i).classes == number).sum()) for i in photos)

            for photo in [i for i in held_out if count([i])]:
                if count(training) >= count(held_out):
                    break
                taken = [i for i in together[self._groups[photo]] if i in held_out]
                held_out = [i for i in held_out if i not in taken]
                training += taken
        if not any((self.boxes(photo).classes >= 0).any() for photo in held_out):
            training, held_out = [*training, *held_out], []
        return sorted(training), sorted(held_out)


def _labels(boxes: Sequence[Sequence[float]], classes: Sequence[int]) -> Boxes:
    return Boxes(corners=corners_of(boxes), classes=np.array(classes, dtype=np.int64))


class CanvasSource:
    """The training loop's samples: square canvases with one photo or four, each flipped, resized and cut by chance.

    All canvases have one size: each new shape costs seconds of planning on a CPU.

    Args:
        photos: with labels.
        chosen: of them, to be trained on.
        side: of a canvas, pixels.
        scale: range of a random factor on a photo whose longest side fits its place.
        mosaic: probability of four photos instead of one (YOLOv4, arXiv:2004.10934, section 3.3).
        flip, flip_vertical: probabilities.
        colour: largest change of each channel's brightness, as a share.
        seed: with the draw number it seeds each sample.
        negatives: photos of other kinds; None: there are none.
        negative_share: probability that a place of four, but for the first, shows one of them.
        detector: folder of the detector that is fine-tuned and exported with the classes; part of the identity.
    """

    def __init__(
        self,
        *,
        photos: FinetunePhotos,
        chosen: Sequence[int],
        side: int,
        scale: tuple[float, float],
        mosaic: float,
        flip: float,
        flip_vertical: float,
        colour: float,
        seed: int,
        negatives: NegativePhotos | None = None,
        negative_share: float = 0.0,
        detector: Path | None = None,
    ) -> None:
        self.photos, self.chosen, self.side, self.scale = photos, tuple(chosen), side, scale
        self.mosaic, self.flip, self.flip_vertical = mosaic, flip, flip_vertical
        self.colour, self.seed = colour, seed
        self.negatives, self.negative_share = negatives, negative_share
        self.detector = detector

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> dict[str, str]:
        """Fingerprint of all photos, held-out ones too, which choose the weights, and of the detector."""
        negatives = {} if self.negatives is None else self.negatives.identity()
        files = [] if self.detector is None else [self.detector / name for name in ("model.json", "model.safetensors")]
        detector = {"detector's files": file_identity(files)} if files else {}
        return {**self.photos.identity(range(len(self.photos))), **negatives, **detector}

    def sample(self, index: int, draw: int) -> FinetuneSample:
        """A canvas with photo ``index`` in it; pure function of (index, draw).

        Raises:
            BadImageError: one of its photos cannot be read. With another index the others are others, too.
        """
        rng = np.random.default_rng([self.seed, draw, index])
        canvas = np.zeros((self.side, self.side, 3), dtype=np.uint8)
        if rng.random() < self.mosaic:
            half = self.side // 2
            others = rng.integers(len(self.chosen), size=3).tolist()
            parts = [self._paste(self._labelled(index), canvas, 0, 0, half, rng)]
            for photo, (x, y) in zip(others, [(half, 0), (0, half), (half, half)], strict=True):
                is_negative = self.negatives is not None and rng.random() < self.negative_share
                tile = self._negative(rng) if is_negative else self._labelled(photo)
                parts.append(self._paste(tile, canvas, x, y, half, rng))
        else:
            parts = [self._paste(self._labelled(index), canvas, 0, 0, self.side, rng)]
        return FinetuneSample(
            image=torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1))),
            boxes=torch.from_numpy(np.concatenate([part.corners for part in parts])),
            classes=torch.from_numpy(np.concatenate([part.classes for part in parts])),
        )

    def _labelled(self, index: int) -> Tile:
        photo = self.chosen[index]
        return Tile(self.photos.image(photo), self.photos.boxes(photo), self.scale)

    def _negative(self, rng: np.random.Generator) -> Tile:
        assert self.negatives is not None
        index = int(rng.integers(len(self.negatives)))
        return Tile(self.negatives.image(index), self.negatives.boxes(index), NEGATIVE_SCALE)

    def _paste(
        self, tile: Tile, canvas: NDArray[np.uint8], left: int, top: int, side: int, rng: np.random.Generator
    ) -> Boxes:
        """Put a picture into a square of the canvas; its boxes there."""
        image, labels, scale = tile
        height, width = image.shape[:2]
        factor = side / max(height, width) * float(np.exp(rng.uniform(*np.log(scale))))
        image = resized(image, factor)
        boxes = labels.corners * np.array([image.shape[1] / width, image.shape[0] / height] * 2, dtype=np.float32)
        height, width = image.shape[:2]
        if rng.random() < self.flip:
            image = image[:, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if rng.random() < self.flip_vertical:
            image = image[::-1]
            boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        gain = rng.uniform(1 - self.colour, 1 + self.colour, 3).astype(np.float32)
        x, y = int(rng.integers(max(0, width - side) + 1)), int(rng.integers(max(0, height - side) + 1))
        cut = image[y : y + side, x : x + side]
        canvas[top : top + cut.shape[0], left : left + cut.shape[1]] = (cut * gain).clip(0, 255).astype(np.uint8)
        return _cut(boxes - np.array([x, y] * 2, dtype=np.float32), labels.classes, cut.shape[:2], (left, top))

    @staticmethod
    def collate(samples: list[FinetuneSample]) -> list[FinetuneSample]:
        """A list: canvases have different numbers of boxes."""
        return samples


def _cut(
    boxes: NDArray[np.float32], classes: NDArray[np.int64], size: tuple[int, int], offset: tuple[int, int]
) -> Boxes:
    """Boxes clipped to (height, width) and moved; the class of what is mostly cut off becomes unknown (-1)."""

    def area(corners: NDArray[np.float32]) -> NDArray[np.float32]:
        sides: NDArray[np.float32] = (corners[:, 2:] - corners[:, :2]).clip(0)
        return sides[:, 0] * sides[:, 1]

    limit = np.array([size[1], size[0]] * 2, dtype=np.float32)
    clipped = boxes.clip(0, limit)
    visible = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)
    mostly_inside = area(clipped) >= MIN_VISIBLE * area(boxes)
    moved = clipped + np.array(offset * 2, dtype=np.float32)
    return Boxes(corners=moved[visible], classes=np.where(mostly_inside, classes, -1)[visible])
