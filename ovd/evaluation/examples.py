# SPDX-License-Identifier: Apache-2.0
"""One-shot detection: every class is shown by crops in place of its name.

Of Sticker Scenes the crops are single stickers of the training styles on held-out photos; the scenes are the validation
scenes, whose style and photos no training saw. Of COCO annotations they are boxes of the first pictures, which then are
not evaluated. A class's first crop is the same whether one or three are given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms

from ovd.data.coco import ImageId, check_ground_truth, picture_file
from ovd.detector import NMS_IOU, Detector
from ovd.evaluation.predictor import Predictor, asked_columns, coco_result
from ovd.examples import MIN_SIDE, Crop, Example
from ovd.inference.scoring import RegionSet, score_examples
from pretrain.data.folder import read_image
from pretrain.data.pairs import StickerCrops
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError

CROP_SIDE = 96  # pixels, about the size of a sticker in a scene
SEED = 5000  # of the crops' photos and places; no scene has it


def sticker_crops(stickers: Stickers, *, count: int, classes: frozenset[int]) -> dict[int, list[Crop]]:
    """``count`` crops of each class, each in a style of its own as far as there are styles.

    Args:
        stickers: the data set.
        count: crops per class.
        classes: which ones.
    """
    styles = sorted(stickers.styles["train"])
    sources = {style: StickerCrops(stickers, style=style, size=CROP_SIDE, views=count, seed=SEED) for style in styles}
    places: dict[int, dict[str, list[int]]] = {}
    for style, source in sources.items():
        for index, label in enumerate(source.class_ids.tolist()):
            if label in classes:
                places.setdefault(label, {}).setdefault(style, []).append(index)
    found: dict[int, list[Crop]] = {}
    for label, drawn in places.items():
        order = sorted(drawn)
        order = order[label % len(order) :] + order[: label % len(order)]  # one crop: all styles equally often
        # Each style once, then each once more with another photo.
        picks = [(style, drawn[style][turn]) for turn in range(count) for style in order if turn < len(drawn[style])]
        found[label] = [
            Crop(np.ascontiguousarray(sources[style].sample(index)[0].transpose(1, 2, 0)))
            for style, index in picks[:count]
        ]
    return found


def coco_crops(
    gt: Mapping[str, Any], folder: Path, *, count: int, asked: Collection[int] | None = None
) -> tuple[dict[int, list[Crop]], dict[str, Any]]:
    """``count`` boxes of each category, and the annotations without the pictures that they are from.

    Pictures are taken in the file's order; each gives a category its largest box that is no crowd, with what is around
    it. Categories without any annotation are left out.

    Args:
        gt: COCO annotations, checked.
        folder: of the pictures.
        count: crops per category.
        asked: ids of the categories to show; None: all.

    Raises:
        UserError: a category has boxes in too few pictures, or nothing is left to be evaluated.
    """
    names = {category["id"]: category["name"] for category in gt["categories"]}
    labelled = {one["category_id"] for one in gt["annotations"]}
    found: dict[int, list[Crop]] = {i: [] for i in names if i in labelled and (asked is None or i in asked)}
    sizes = check_ground_truth(gt).sizes
    boxes: dict[Any, dict[int, tuple[float, float, float, float]]] = {}
    for one in gt["annotations"]:
        if one.get("iscrowd") or one["category_id"] not in found:
            continue
        x, y, wide, high = (float(value) for value in one["bbox"])
        height, width = sizes[one["image_id"]] or (np.inf, np.inf)
        box = (max(x, 0.0), max(y, 0.0), min(x + wide, float(width)), min(y + high, float(height)))
        largest = boxes.setdefault(one["image_id"], {})
        best = largest.get(one["category_id"])
        if min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE and (best is None or _area(box) > _area(best)):
            largest[one["category_id"]] = box
    used = set()
    for n, entry in enumerate(gt["images"]):
        wanted = {c: box for c, box in boxes.get(entry["id"], {}).items() if len(found[c]) < count}
        if not wanted:
            continue
        used.add(entry["id"])
        pixels = read_image(folder / picture_file(entry, where=f"images[{n}]"))
        for category, box in wanted.items():
            found[category].append(Crop(pixels, box))
    few = next((names[i] for i, crops in found.items() if len(crops) < count), None)
    if few is not None:
        raise UserError(
            f"--examples {count}: {few!r} has boxes of {MIN_SIDE} pixels in too few pictures; ask for fewer"
        )
    rest = [entry for entry in gt["images"] if entry["id"] not in used]
    if not rest:
        raise UserError(
            f"--examples {count}: every picture is needed for the crops; give more pictures, or ask for fewer"
        )
    kept = [one for one in gt["annotations"] if one["image_id"] not in used]
    return found, {**gt, "images": rest, "annotations": kept}


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def example_rows(detector: Detector, crops: Mapping[int, Sequence[Crop]]) -> Tensor:
    """(C, D) unit rows of the classes, in the mapping's order.

    Raises:
        UserError: these weights have no image tower.
    """
    examples = [Example(str(c), tuple(given)) for c, given in crops.items()]
    return detector.patches_of(examples) if detector.locates else detector.embed_examples(examples)


@dataclass(frozen=True, kw_only=True)
class ExamplePredictor(Predictor):
    """A detector that is asked with crops; ``rows`` are their image embeddings, scores are those of the page."""

    def _class_scores(self, regions: RegionSet) -> Tensor:
        model = self.detector.model
        return score_examples(regions, self.rows, model.bank.to(self.rows), self.rows[:0], model.calibration)


@dataclass(frozen=True, kw_only=True)
class LocatingPredictor:
    """A pretext's transformer that is told crops: what its queries find is what was shown, as certain as they are.

    Attributes:
        detector: one that `locates`.
        category_ids: (C,) COCO id of each row.
        rows: (C, D) what queries are told, of `example_rows`.
        present: see `Predictor`.
        limit: detections per image.
        nms: IoU of the per-class NMS.
    """

    detector: Detector
    category_ids: tuple[int, ...]
    rows: Tensor
    present: Mapping[ImageId, frozenset[int]] | None = None
    limit: int = 300
    nms: float = NMS_IOU

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> list[dict[str, Any]]:
        """COCO results of one picture (H, W, 3) uint8 RGB, best first."""
        columns = asked_columns(self.category_ids, self.present, image_id)
        if not columns:
            return []
        model: Any = self.detector.model
        boxes, score, owner = model.ask(image, self.rows[columns], at_once=model.patches)
        kept = batched_nms(boxes.float(), score, owner, self.nms)[: self.limit]
        return [
            coco_result(boxes[k].tolist(), image_id, self.category_ids[columns[int(owner[k])]], float(score[k]))
            for k in kept.tolist()
        ]


def shown_stickers(stickers: Stickers, names: Mapping[int, str], *, count: int) -> dict[int, list[Crop]]:
    """COCO id → crops, of the nouns that are asked for (COCO id → noun)."""
    number = {noun: index for index, noun in enumerate(stickers.nouns)}
    id_of = {number[noun]: category for category, noun in names.items()}
    crops = sticker_crops(stickers, count=count, classes=frozenset(id_of))
    return {id_of[label]: given for label, given in crops.items()}


def example_predictor(
    detector: Detector,
    shown: Mapping[int, Sequence[Crop]],
    *,
    present: Mapping[ImageId, frozenset[int]] | None = None,
    limit: int = 300,
) -> ExamplePredictor | LocatingPredictor:
    """A predictor whose classes are shown by crops.

    Args:
        detector: loaded; with regions to compare, or a pretext's transformer.
        shown: COCO id → crops, of the classes that are asked for.
        present: see `Predictor`.
        limit: detections per image.
    """
    rows, ids = example_rows(detector, shown), tuple(shown)
    if detector.locates:
        return LocatingPredictor(detector=detector, category_ids=ids, rows=rows, present=present, limit=limit)
    return ExamplePredictor(
        detector=detector, category_ids=ids, rows=rows, scores="calibrated", present=present, limit=limit
    )
