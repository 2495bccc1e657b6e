# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures for detection, from Sticker Scenes or COCO files.

Class indices count the whole vocabulary of the split (base and novel, in the order of ``names``); which of them a
training may see is decided here, once, by ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ovd.data.splits import Split
from pretrain.data.coco import Annotation, GroundTruth, ImageId, read_ground_truth
from pretrain.data.folder import read_image, require_files
from pretrain.data.masks import decode
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.identity import file_identity, files_identity, text_identity


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One picture with its labels.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels.
        masks: (n, H, W) bool.
        classes: (n,) int64 index into the vocabulary.
        image_id: of the data set.
    """

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    classes: np.ndarray
    image_id: ImageId


class LabelledImages(Protocol):
    """A data set of labelled pictures."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def novel(self) -> frozenset[int]: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Labelled: ...


class StickerImages:
    """Sticker Scenes with labels.

    Args:
        stickers: the loaded sprites.
        split: ``train`` or ``val``.
        seed, length, size: of :class:`~pretrain.data.scenes.SceneSource`.
        labels: ``base`` leaves out the annotations (never the pixels) of novel nouns.
    """

    def __init__(
        self,
        *,
        stickers: Stickers,
        split: Literal["train", "val"],
        seed: int,
        length: int,
        size: int,
        labels: Literal["base", "all"],
    ) -> None:
        self.source = SceneSource(stickers, split=split, seed=seed, size=size, length=length, labels=labels)
        self.names = tuple(stickers.nouns)
        self.novel = frozenset(stickers.novel)
        self.split_hash = stickers.split_hash

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the drawings."""
        return self.source.stickers.identity()

    def load(self, index: int) -> Labelled:
        """Scene ``index``; its image id is the index."""
        scene = self.source.scene(index)
        return Labelled(image=scene.image, boxes=scene.boxes, masks=scene.masks, classes=scene.classes, image_id=index)


def read_annotated(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture whose annotations state its (height, width), or None.

    Raises:
        BadImageError: it cannot be read, or is of another size.
    """
    image = read_image(path)
    refuse_other_size(path, size, image.shape[:2])
    return image


def refuse_other_size(path: Path, stated: tuple[int, int] | None, actual: tuple[int, int]) -> None:
    """Refuse a picture whose (height, width) is not the one that its annotations state, if they state one.

    Raises:
        BadImageError: they differ.
    """
    if stated is not None and stated != actual:
        raise BadImageError(
            path, f"is {actual[1]} × {actual[0]} pixels upright, the annotations say {stated[1]} × {stated[0]}"
        )


def refuse_boxes_outside(path: Path, corners: np.ndarray, size: tuple[int, int], *, where: str) -> None:
    """Refuse boxes outside a picture whose annotations do not state its size.

    Args:
        path: the picture.
        corners: (n, 4) x1, y1, x2, y2.
        size: its (height, width).
        where: the annotations, for messages.

    Raises:
        BadImageError: one lies wholly outside.
    """
    height, width = size
    if bool((corners[:, :2] >= (width, height)).any() | (corners[:, 2:] <= 0).any()):
        raise BadImageError(path, f"is {width} × {height} pixels upright, and {where} has a box outside of it")


class CocoImages:
    """Photos with a COCO instances file.

    Crowd annotations are left out, as in ViLD's parser; so are categories outside the split and boxes without area.
    Images that have no annotation left are left out too (of COCO 48/17, 107,761 remain). `notices` says how many.

    Args:
        images: folder that ``file_name`` is relative to.
        annotations: instances file, ``.json`` or ``.json.gz``, or what was read from another format's files.
        split: base and novel category ids.
        labels: ``base`` leaves out the annotations of novel categories.
        part: only images whose ``split`` is this; None: all of them.

    Raises:
        UserError: a file that `pretrain.data.coco.check_ground_truth` refuses, a split that does not fit it, no such
            part, or nothing left to learn from.
    """

    def __init__(
        self,
        *,
        images: Path,
        annotations: Path | GroundTruth,
        split: Split,
        labels: Literal["base", "all"],
        part: str | None = None,
    ) -> None:
        if isinstance(annotations, GroundTruth):
            truth = annotations
        else:
            truth = read_ground_truth(annotations, hint="data.annotations must be a COCO instances file")
        # Ids that mean something else here (renumbered, another data set) would train wrong names without a word.
        split.check_categories(truth.categories, where=truth.where)
        ids = list(split.ids)
        self.folder, self.where = images, truth.where
        self.category_ids = tuple(ids)
        self.names = tuple(split.names[i] for i in ids)
        self.novel = frozenset(ids.index(i) for i in split.novel)
        self._index = {category: i for i, category in enumerate(ids)}
        labelled = set(split.base) if labels == "base" else set(ids)
        chosen = {i for i in truth.sizes if part is None or truth.parts.get(i) == part}
        if not chosen:
            named = ", ".join(sorted(set(truth.parts.values()))) or "none"
            raise UserError(f"data.part {part}: no image of {truth.where} has this split (there: {named})")
        self._annotations: dict[ImageId, list[Annotation]] = {}
        crowds = flat = 0
        for annotation in truth.annotations:
            if annotation["category_id"] not in labelled or annotation["image_id"] not in chosen:
                continue
            _, _, width, height = annotation["bbox"]
            crowds += annotation["iscrowd"]
            flat += not annotation["iscrowd"] and not (width and height)
            if width and height and not annotation["iscrowd"]:
                self._annotations.setdefault(annotation["image_id"], []).append(annotation)
        self._sizes, self._files = truth.sizes, truth.files
        # In the order of the file.
        self.image_ids: list[ImageId] = [i for i in truth.files if i in self._annotations]
        nameless = [i for i in self._annotations if i not in truth.files]
        if nameless:
            truth.file_of(nameless[0])  # says what it lacks
        self.notices = [f"{truth.where}: {warning}" for warning in truth.warnings]
        names = [self._files[i] for i in self.image_ids]
        if missing := require_files(names, images, where=truth.where, allowed=BAD_IMAGES_ALLOWED):
            self.notices.append(missing)
        if crowds:
            self.notices.append(f"{truth.where}: {crowds} crowd annotations (iscrowd 1) are not trained on")
        if flat:
            self.notices.append(f"{truth.where}: {flat} boxes without area are not trained on")
        if empty := len(chosen) - len(self._annotations):
            self.notices.append(f"{truth.where}: {empty} of {len(chosen)} images have no object left and are not used")
        if not self.image_ids:
            raise UserError(
                f"data.annotations: {truth.where} has no annotation that split {split.name!r} (labels={labels}) keeps"
                + (f"; {crowds} are crowds (iscrowd 1): set it to 0 if each is one object" if crowds else "")
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def identity(self) -> dict[str, str]:
        """Names and content of the pictures, and the annotations: their COCO file, or what was read of other files."""
        names = [self._files[i] for i in self.image_ids]
        file = Path(self.where)
        if file.name.endswith((".json", ".json.gz")) and file.is_file():
            labels = file_identity([file])
        else:
            labels = text_identity(self.names, [self._annotations[i] for i in self.image_ids])
        return {**files_identity("pictures", self.folder, names), "annotations": labels}

    def load(self, index: int) -> Labelled:
        """Decode image ``index``.

        Raises:
            BadImageError: it cannot be read, or is not of the size that the annotations say.
        """
        image_id = self.image_ids[index]
        path = self.folder / self._files[image_id]
        size = self._sizes[image_id]
        image = read_annotated(path, size)
        height, width = image.shape[:2]
        annotations = self._annotations[image_id]
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        if size is None:
            refuse_boxes_outside(path, boxes, (height, width), where=self.where)
        masks = np.zeros((len(annotations), height, width), dtype=bool)
        for mask, annotation, box in zip(masks, annotations, boxes, strict=True):
            mask[:] = self._mask(annotation, box, (height, width))
        classes = np.array([self._index[a["category_id"]] for a in annotations], dtype=np.int64)
        return Labelled(image=image, boxes=boxes, masks=masks, classes=classes, image_id=image_id)

    def _mask(self, annotation: Annotation, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The annotation's mask; in a file with boxes only, the box as a mask."""
        if "segmentation" in annotation:
            entry = f"{self.where}: annotations[{annotation['id'] - 1}]"
            return decode(annotation["segmentation"], size, entry)
        mask = np.zeros(size, dtype=bool)
        x1, y1, x2, y2 = np.round(box).astype(int)
        mask[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = True
        return mask
