# SPDX-License-Identifier: Apache-2.0
"""Calibrating an image-text encoder on the boxes of another detector (`ovd.calibrate --encoder`).

First the ranking: temperature and the exponents of objectness and area, one after the other, by average precision of
words that only the encoder scores. Then its weight beside the proposal network's own scores, then the sigmoid and
the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ovd.data.photo_words import PhotoLabels
from ovd.detector import Detector
from ovd.evaluation.photo_calibration import MIN_PHOTOS, TypedPhotos, require_absent_words, require_both, with_threshold
from ovd.evaluation.typed import average_precision, run_typed
from ovd.evaluation.typed_photos import typed_photos
from ovd.inference.crop_classifier import CropClassifier, CropScorer
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.scoring import Calibration
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError

RAW_FLOOR = 1e-5
TEMPERATURES = (1.0, 0.5, 0.25)  # times the encoder's own
OBJECTNESS = (0.0, 0.25, 0.5, 1.0)
AREA = (0.0, 0.25)
SHARES = (0.1, 0.2, 0.35, 0.5)


def prepare_encoder(detector: Detector, photos: PhotoLabels, *, limit: int) -> TypedPhotos:
    """Run the detector over at most ``limit`` of the photos.

    Raises:
        UserError: too few photos with boxes.
    """
    model = detector.model
    assert isinstance(model, CropClassifier)
    vocabulary = Vocabulary.of(photos.table.words, templates=detector.templates)
    rows = detector.text.embed(vocabulary)
    scenes, named = typed_photos(detector, photos, rows, limit=limit)
    if len(scenes) < 2 * MIN_PHOTOS:  # of those drawn
        raise UserError(
            f"--data: {len(scenes)} photos with boxes; at least {2 * MIN_PHOTOS} are needed, half of them to measure on"
        )
    scorer = model.scorer(rows, [c.phrases for c in vocabulary.classes], model.background_words)
    assert isinstance(scorer, CropScorer)
    return TypedPhotos(scenes=scenes, named=named, scorer=scorer)


def fit_encoder(data: TypedPhotos) -> Calibration:
    """The calibration of an encoder's crops.

    Raises:
        UserError: labels that nothing can be fitted to, or scores without any relation to them.
    """
    require_absent_words(data)
    words = data.scorer
    assert isinstance(words, WordScorer)
    alone = replace(words, hyponyms=np.zeros_like(words.hyponyms))
    ranking = words.calibration.uncalibrated()
    scale = ranking.open_scale
    ranking = _best(data, alone, [replace(ranking, open_scale=scale * factor) for factor in TEMPERATURES])
    ranking = _best(data, alone, [replace(ranking, open_objectness=value) for value in OBJECTNESS])
    ranking = _best(data, alone, [replace(ranking, open_area=value) for value in AREA])
    slope, offset = _platt(data, replace(alone, calibration=ranking))
    fitted = replace(ranking, open_slope=slope, open_offset=offset)
    if bool(words.hyponyms.any()):
        fitted = _best(data, words, [replace(fitted, head_weight=share) for share in SHARES])
        slope, offset = _platt(data, replace(words, calibration=fitted))
        fitted = replace(fitted, slope=slope, offset=offset)
    if min(fitted.slope, fitted.open_slope) <= 0:
        raise UserError(
            "--data: this encoder's scores say nothing about these labels (the better a score, the less often it is "
            "right). Nothing was changed"
        )
    return with_threshold(data, replace(words, calibration=fitted))


def _best(data: TypedPhotos, scorer: WordScorer, candidates: Sequence[Calibration]) -> Calibration:
    """The candidate with the best average precision."""
    scored = [run_typed(data.scenes, replace(scorer, calibration=c), floor=RAW_FLOOR) for c in candidates]
    return max(zip(map(average_precision, scored), candidates, strict=True), key=lambda pair: pair[0])[1]


def _platt(data: TypedPhotos, scorer: WordScorer) -> tuple[float, float]:
    outcome = run_typed(data.scenes, scorer, floor=RAW_FLOOR)
    require_both(outcome)
    return outcome.sigmoid()
