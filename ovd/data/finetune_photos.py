# SPDX-License-Identifier: Apache-2.0
"""Labelled photos that a detector is fine-tuned on, and which of them are held out.

Photos without any object are kept: they show what the classes are not.

Shapes: ``T`` boxes of a photo.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.data.catalog import read_annotated, refuse_boxes_outside, refuse_other_size
from ovd.data.copies import photo_groups
from ovd.data.finetune_labels import name_notices, no_object_message
from ovd.data.joined import corners_of, is_object
from ovd.pictures import frame_count, require_decodable, upright_size
from ovd.words import cleaned
from pretrain.data.coco import GroundTruth
from pretrain.data.coco_boxes import BORDER
from pretrain.data.coco_entries import CocoAnnotation, CocoJson, ImageId
from pretrain.data.folder import require_files
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.identity import files_identity, text_identity

SMALL = 8
"""Pixels between two points of the finest grid that finds boxes."""


@dataclass(frozen=True, kw_only=True)
class BoxLabels:
    """Labels of a photo.

    Attributes:
        corners: (T, 4) float32 x1, y1, x2, y2 in pixels.
        classes: (T,) int64, -1 for a doubtful box or a crowd.
    """

    corners: NDArray[np.float32]
    classes: NDArray[np.int64]


def draw_photos(count: int, *, limit: int | None, seed: int) -> list[int]:
    """Indices of ``limit`` of ``count`` photos in random order; None: of all."""
    order: list[int] = np.random.default_rng([seed, 11]).permutation(count)[:limit].tolist()
    return order


class FinetunePhotos:
    """Photos with boxes of classes.

    Photos that are missing, of which a few may, or cannot be read are left out, with a notice.

    Args:
        folder: that the file names are relative to.
        truth: what was read from their labels.
        confident, doubtful: thresholds on an annotation's ``score``; without one it is confident, a crowd doubtful.

    Attributes:
        names: of the classes that have a confident box, as typed (`ovd.words.cleaned`).
        image_ids: of the photos, in the order of their indices.
        notices: on the labels, to be shown to the user.

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
            raise UserError(f"{truth.where}: {no_object_message(truth.annotations, confident=confident)}")
        self.names = tuple(cleaned(truth.categories[category]) for category in used)
        self.notices += name_notices([truth.categories[category] for category in used], where=truth.where)
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

    def boxes(self, index: int) -> BoxLabels:
        """Labels of photo ``index``."""
        return self._boxes.get(self.image_ids[index]) or _labels([], [])

    def small_boxes_notice(self, side: int) -> str | None:
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
        order = draw_photos(len(self), limit=limit, seed=seed)
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


def _labels(boxes: Sequence[Sequence[float]], classes: Sequence[int]) -> BoxLabels:
    return BoxLabels(corners=corners_of(boxes), classes=np.array(classes, dtype=np.int64))
