# SPDX-License-Identifier: Apache-2.0
"""Photos without the fine-tuned classes, as negatives (`data.negatives`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovd.config_finetune import PACKAGED, FinetuneDataConfig
from ovd.data.finetune_photos import FinetunePhotos
from ovd.data.negatives import NegativePhotos
from ovd.detector import Detector
from ovd.examples import MAX_EXAMPLES, Crop, Example
from ovd.picture_files import PACKAGED_PHOTOS
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import BadImageError

WORD_LEVEL = 0.1
"""Boxes where the detector scores a class's name this high are not learned as background."""
MIN_CROP_SIDE = 32
"""Pixels of the smaller side that a crop of a labelled object has, to be compared with."""


def negatives_of(
    config: FinetuneDataConfig, photos: FinetunePhotos, chosen: Sequence[int], *, detector: Path
) -> NegativePhotos | None:
    """The photos that ``data.negatives`` names; None: there are none, or no mosaic has a place for them.

    Args:
        config: the data section.
        photos: with labels.
        chosen: of them, that are trained on.
        detector: folder of the detector that is fine-tuned.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if config.negatives is None or not config.mosaic * config.negative_share:
        return None
    if config.negatives != PACKAGED:
        return NegativePhotos.of_folder(Path(config.negatives), labelled=photos.paths())
    packaged = NegativePhotos.of_folder(PACKAGED_PHOTOS)
    return without_classes(packaged, photos, chosen, Detector.load(detector, cache_size=0, masks=False))


def without_classes(
    negatives: NegativePhotos, photos: FinetunePhotos, chosen: Sequence[int], detector: Detector
) -> NegativePhotos:
    """The photos, with boxes marked doubtful that the detector takes for a class, by name or by its largest object."""
    names = Vocabulary.of(photos.names, templates=detector.templates)
    examples = largest_examples(photos, chosen)
    crops = detector.query(examples=examples) if examples else None
    doubtful = {}
    for index, name in enumerate(negatives.names):
        regions = detector.embed(negatives.image(index))
        by_name = regions.classify(names, threshold=WORD_LEVEL)
        by_crop = [] if crops is None else [regions.classify(crops).xyxy]
        doubtful[name] = np.concatenate([by_name.xyxy, *by_crop])
    return NegativePhotos(folder=negatives.folder, names=negatives.names, doubtful=doubtful)


def largest_examples(photos: FinetunePhotos, chosen: Sequence[int]) -> list[Example]:
    """For each class its largest labelled object, where it is large enough to be recognised."""
    largest: dict[int, tuple[float, int, tuple[float, float, float, float]]] = {}
    for photo in chosen:
        labels = photos.boxes(photo)
        for (x1, y1, x2, y2), number in zip(labels.corners.tolist(), labels.classes.tolist(), strict=True):
            side = min(x2 - x1, y2 - y1)
            if number >= 0 and side >= max(MIN_CROP_SIDE, largest.get(number, (0.0,))[0]):
                largest[number] = (side, photo, (x1, y1, x2, y2))
    examples = []
    for number, (_, photo, box) in sorted(largest.items())[:MAX_EXAMPLES]:
        try:
            examples.append(Example(name=f"class {number}", crops=(Crop(photos.image(photo), box),)))
        except BadImageError:  # the training leaves it out, too
            continue
    return examples
