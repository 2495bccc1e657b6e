# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures for detection, from Sticker Scenes or COCO files, and their entries in Detectron2's catalog.

Class indices count the whole vocabulary of the split (base and novel, in the order of ``names``); which of them a
training may see is decided here, once, by ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from ovd.data.lvis import picture_file
from ovd.data.splits import Split
from pretrain.data.folder import read_image
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import read_json


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
    image_id: int


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

    def load(self, index: int) -> Labelled:
        """Scene ``index``; its image id is the index."""
        scene = self.source.scene(index)
        return Labelled(image=scene.image, boxes=scene.boxes, masks=scene.masks, classes=scene.classes, image_id=index)


class CocoImages:
    """Photos with a COCO instances file.

    Crowd annotations are left out, as in ViLD's parser; so are categories outside the split. Images that have no
    annotation left are left out too (the 107,761 of COCO 48/17).

    Args:
        images: folder that ``file_name`` is relative to.
        annotations: instances JSON.
        split: base and novel category ids.
        labels: ``base`` leaves out the annotations of novel categories.
    """

    def __init__(self, *, images: Path, annotations: Path, split: Split, labels: Literal["base", "all"]) -> None:
        data = read_json(annotations, hint="data.annotations must be a COCO instances file")
        if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= set(data):
            raise UserError(
                f"data.annotations: {annotations} has no images, annotations and categories; "
                "a COCO instances file is needed"
            )
        # Ids that mean something else here (renumbered, another data set) would train wrong names without a word.
        split.check_categories({c["id"]: c["name"] for c in data["categories"]}, where=str(annotations))
        ids = list(split.ids)
        self.folder = images
        self.category_ids = tuple(ids)
        self.names = tuple(split.names[i] for i in ids)
        self.novel = frozenset(ids.index(i) for i in split.novel)
        index = {category: i for i, category in enumerate(ids)}
        wanted = set(split.base) if labels == "base" else set(ids)
        self._annotations: dict[int, list[dict[str, Any]]] = {}
        for annotation in data["annotations"]:
            if (
                annotation["category_id"] in wanted
                and annotation["category_id"] in index
                and not annotation.get("iscrowd")
            ):
                _, _, width, height = annotation["bbox"]
                if width > 0 and height > 0:
                    self._annotations.setdefault(annotation["image_id"], []).append(
                        {**annotation, "class": index[annotation["category_id"]]}
                    )
        self._images = [image for image in data["images"] if image["id"] in self._annotations]
        if not self._images:
            raise UserError(
                f"data.annotations: {annotations} has no annotation that split {split.name!r} (labels={labels}) keeps"
            )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_ids(self) -> list[int]:
        """Ids of the pictures that training draws from, in order."""
        return [image["id"] for image in self._images]

    def load(self, index: int) -> Labelled:
        """Decode image ``index``.

        Raises:
            BadImageError: it cannot be read.
        """
        info = self._images[index]
        image = read_image(self.folder / picture_file(info))
        height, width = image.shape[:2]
        stated = info.get("height", height), info.get("width", width)
        if stated != (height, width):
            raise BadImageError(
                self.folder / picture_file(info),
                f"is {width} × {height} pixels upright, the annotations say {stated[1]} × {stated[0]}",
            )
        annotations = self._annotations[info["id"]]
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(annotations), height, width), dtype=bool)
        for mask, annotation, box in zip(masks, annotations, boxes, strict=True):
            mask[:] = _decode_mask(annotation, box, height, width)
        classes = np.array([a["class"] for a in annotations], dtype=np.int64)
        return Labelled(image=image, boxes=boxes, masks=masks, classes=classes, image_id=info["id"])


def _decode_mask(annotation: dict[str, Any], box: np.ndarray, height: int, width: int) -> np.ndarray:
    """The annotation's mask; where a file has boxes only, the box stands for it."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, height, width)
        return coco_mask.decode(rle).astype(bool)
    mask = np.zeros((height, width), dtype=bool)
    x1, y1, x2, y2 = np.round(box).astype(int)
    mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return mask


def register_stickers(name: str, images: StickerImages) -> None:
    """Register labelled scenes in Detectron2's ``DatasetCatalog`` and ``MetadataCatalog``.

    Records carry ``scene`` (the index) instead of ``file_name``; ``annotations`` hold absolute boxes and RLE masks, so
    that any Detectron2 tool which reads records, evaluators included, works on them.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    from pretrain.data.scenes import scene_record

    def records() -> list[dict[str, Any]]:
        out = []
        for index in range(len(images)):
            scene = images.source.scene(index)
            record = scene_record(scene, index)
            out.append(
                {
                    "image_id": index,
                    "scene": index,
                    "height": scene.image.shape[0],
                    "width": scene.image.shape[1],
                    "annotations": [
                        {
                            "bbox": box.tolist(),
                            "bbox_mode": BoxMode.XYXY_ABS,
                            "category_id": int(category),
                            "segmentation": annotation["segmentation"],
                            "iscrowd": 0,
                        }
                        for box, category, annotation in zip(
                            scene.boxes, scene.classes, record["annotations"], strict=True
                        )
                    ],
                }
            )
        return out

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(
        thing_classes=list(images.names), novel_classes=sorted(images.novel), split_hash=images.split_hash
    )
