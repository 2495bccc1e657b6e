# SPDX-License-Identifier: Apache-2.0
"""One-shot detection: every class is given by crops in place of its name.

Of Sticker Scenes the crops are single stickers of the training styles on held-out photos; the scenes are the validation
scenes, whose style and photos no training saw. Of COCO annotations they are boxes of the first pictures, which then are
not evaluated. A class's first crop is the same whether one or three are given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ovd.data.splits import some_of
from ovd.detector import Detector
from ovd.evaluation.predictor import Predictor, PretextPredictor
from ovd.examples import MIN_SIDE, Crop, Example
from ovd.inference.postprocess import MAX_DETECTIONS, NMS_IOU
from ovd.inference.region_model import PatchLocator
from pretrain.data.coco import image_sizes, picture_file
from pretrain.data.coco_entries import CocoJson, ImageId
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
    drawings: dict[int, dict[str, list[int]]] = {}
    for style, source in sources.items():
        for index, label in enumerate(source.class_ids.tolist()):
            if label in classes:
                drawings.setdefault(label, {}).setdefault(style, []).append(index)
    crops: dict[int, list[Crop]] = {}
    for label, drawn in drawings.items():
        order = sorted(drawn)
        order = order[label % len(order) :] + order[: label % len(order)]  # one crop: all styles equally often
        # Each style once, then each once more with another photo.
        picks = [(style, drawn[style][turn]) for turn in range(count) for style in order if turn < len(drawn[style])]
        crops[label] = [
            Crop(np.ascontiguousarray(sources[style].sample(index)[0].transpose(1, 2, 0)))
            for style, index in picks[:count]
        ]
    return crops


def coco_crops(
    gt: CocoJson, folder: Path, *, count: int, categories: Collection[int] | None = None
) -> tuple[dict[int, list[Crop]], CocoJson]:
    """``count`` boxes of each category, and the annotations without the pictures that they are from.

    Pictures are taken in the file's order; each gives a category its largest box that is no crowd, with what is around
    it. Categories without any annotation are left out.

    Args:
        gt: COCO annotations, checked.
        folder: of the pictures.
        count: crops per category.
        categories: ids of those that crops are wanted of; None: all.

    Raises:
        UserError: a category has boxes in too few pictures, or nothing is left to be evaluated.
    """
    names = {category["id"]: category["name"] for category in gt["categories"]}
    labelled = {annotation["category_id"] for annotation in gt["annotations"]}
    crops: dict[int, list[Crop]] = {i: [] for i in names if i in labelled and (categories is None or i in categories)}
    sizes = image_sizes(gt)
    boxes: dict[ImageId, dict[int, tuple[float, float, float, float]]] = {}
    for annotation in gt["annotations"]:
        if annotation.get("iscrowd") or annotation["category_id"] not in crops:
            continue
        x, y, wide, high = (float(value) for value in annotation["bbox"])
        height, width = sizes[annotation["image_id"]] or (np.inf, np.inf)
        box = (max(x, 0.0), max(y, 0.0), min(x + wide, float(width)), min(y + high, float(height)))
        largest = boxes.setdefault(annotation["image_id"], {})
        best = largest.get(annotation["category_id"])
        if min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE and (best is None or _area(box) > _area(best)):
            largest[annotation["category_id"]] = box
    used = set()
    for n, entry in enumerate(gt["images"]):
        missing = {c: box for c, box in boxes.get(entry["id"], {}).items() if len(crops[c]) < count}
        if not missing:
            continue
        used.add(entry["id"])
        pixels = read_image(folder / picture_file(entry, where=f"images[{n}]"))
        for category, box in missing.items():
            crops[category].append(Crop(pixels, box))
    few = [repr(names[i]) for i, crops_of in crops.items() if len(crops_of) < count]
    if few:
        raise UserError(
            f"--examples {count}: too few pictures have boxes of {MIN_SIDE} pixels of {some_of(few)}; ask for fewer, "
            "or name the other categories in a file for --split"
        )
    images = [entry for entry in gt["images"] if entry["id"] not in used]
    if not images:
        raise UserError(
            f"--examples {count}: every picture is needed for the crops; give more pictures, or ask for fewer"
        )
    annotations = [annotation for annotation in gt["annotations"] if annotation["image_id"] not in used]
    return crops, {**gt, "images": images, "annotations": annotations}


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def category_crops(stickers: Stickers, names: Mapping[int, str], *, count: int) -> dict[int, list[Crop]]:
    """COCO id → sticker crops of some categories (COCO id → noun)."""
    number = {noun: index for index, noun in enumerate(stickers.nouns)}
    id_of = {number[noun]: category for category, noun in names.items()}
    crops = sticker_crops(stickers, count=count, classes=frozenset(id_of))
    return {id_of[label]: crops_of for label, crops_of in crops.items()}


def example_predictor(
    detector: Detector,
    crops: Mapping[int, Sequence[Crop]],
    *,
    present: Mapping[ImageId, frozenset[int]] | None = None,
    limit: int = MAX_DETECTIONS,
) -> Predictor | PretextPredictor:
    """A predictor whose classes are given by crops; scores are those of the page.

    Args:
        detector: loaded; with regions to compare, or a pretext model.
        crops: COCO id → crops, of the classes that are looked for.
        present: see `Predictor`.
        limit: detections per image.

    Raises:
        UserError: these weights have no image tower.
    """
    ids, examples = tuple(crops), class_examples(crops)
    model = detector.model
    if isinstance(model, PatchLocator):
        rows = detector.patch_rows(model, examples)
        return PretextPredictor(model=model, category_ids=ids, rows=rows, nms_iou=NMS_IOU, present=present, limit=limit)
    rows = detector.embed_examples(examples)
    scorer = model.example_scorer(rows, model.background_words, rows[:0])
    return Predictor(detector=detector, category_ids=ids, scorer=scorer, present=present, limit=limit)


def class_examples(crops: Mapping[int, Sequence[Crop]]) -> list[Example]:
    """One example for each class, in the mapping's order."""
    return [Example(str(c), tuple(crops_of)) for c, crops_of in crops.items()]
