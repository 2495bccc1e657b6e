# SPDX-License-Identifier: Apache-2.0
"""One-shot detection: every class is shown by crops in place of its name, in another drawing style than the scenes'.

The crops are single stickers of the training styles on held-out photos; the scenes are the validation scenes, whose
style and photos no training saw. A class's first crop is the same whether one or three are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ovd.detector import Detector
from ovd.evaluation.predictor import Predictor
from ovd.examples import Crop, Example
from ovd.modeling.scoring import RegionSet, score_examples
from pretrain.data.stickers import StickerCrops, Stickers
from pretrain.engine.errors import UserError

CROP_SIDE = 96  # pixels, about the size of a sticker in a scene
SEED = 5000  # of the crops' photos and places; no scene has it


def sticker_crops(stickers: Stickers, *, count: int, classes: frozenset[int]) -> dict[int, list[NDArray[np.uint8]]]:
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
    found: dict[int, list[NDArray[np.uint8]]] = {}
    for label, drawn in places.items():
        order = sorted(drawn)
        order = order[label % len(order) :] + order[: label % len(order)]  # one crop: all styles equally often
        # Each style once, then each once more with another photo.
        picks = [(style, drawn[style][turn]) for turn in range(count) for style in order if turn < len(drawn[style])]
        found[label] = [
            np.ascontiguousarray(sources[style].sample(index)[0].transpose(1, 2, 0)) for style, index in picks[:count]
        ]
    return found


def example_rows(detector: Detector, crops: Mapping[int, list[NDArray[np.uint8]]]) -> Tensor:
    """(C, D) unit rows of the classes, in the mapping's order.

    Raises:
        UserError: these weights have no image tower.
    """
    if detector.examples is None:
        raise UserError("these weights cannot search by example: their encoder has no image tower")
    return detector.examples.embed([Example(str(c), tuple(Crop(p) for p in given)) for c, given in crops.items()])


@dataclass(frozen=True, kw_only=True)
class ExamplePredictor(Predictor):
    """A detector that is asked with crops; ``rows`` are their image embeddings, scores are those of the page."""

    def _class_scores(self, regions: RegionSet) -> Tensor:
        model = self.detector.model
        return score_examples(regions, self.rows, model.bank.to(self.rows), self.rows[:0], model.calibration)


def example_predictor(
    detector: Detector,
    stickers: Stickers,
    names: Mapping[int, str],
    *,
    count: int,
    limit: int = 300,
    masks: bool = True,
) -> ExamplePredictor:
    """A predictor whose classes are shown by ``count`` crops each.

    Args:
        detector: loaded.
        stickers: where the crops come from.
        names: COCO id → noun of the classes that are asked for.
        count: crops per class.
        limit: detections per image.
        masks: write masks too.
    """
    number = {noun: index for index, noun in enumerate(stickers.nouns)}
    id_of = {number[noun]: category for category, noun in names.items()}
    crops = sticker_crops(stickers, count=count, classes=frozenset(id_of))
    return ExamplePredictor(
        detector=detector,
        category_ids=tuple(id_of[label] for label in crops),
        rows=example_rows(detector, crops),
        scores="calibrated",
        limit=limit,
        masks=masks,
    )
