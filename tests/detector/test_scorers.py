# SPDX-License-Identifier: Apache-2.0
"""`Scorer.select`: some of the classes, scored as before."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, unit_rows
from ovd.inference.crop_classifier import CropScorer
from ovd.inference.example_scorers import CentredCosineScorer, RegionCosineScorer, WordProfileScorer
from ovd.inference.fvlm_ensemble import EnsembleScorer
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.hyponyms import TrainingWords
from ovd.inference.scorers import CalibratedScorer, PublishedScorer
from ovd.inference.scoring import Calibration, RegionSet

CLASSES, BACKGROUND_WORDS, PROPOSAL_WORDS, LABELS, FINETUNED, NEGATIVES, REGIONS, DIM = 5, 7, 4, 6, 3, 2, 9, 8
RNG = np.random.default_rng(0)
CALIBRATION = Calibration(open_unknown=0.5, open_offset=5.0, open_fallback=0.9, slope=1.3, offset=-0.2)


def units(count: int) -> Floats:
    return unit_rows(RNG.normal(size=(count, DIM)).astype(np.float32))


def mask(*shape: int) -> NDArray[np.bool_]:
    return RNG.uniform(size=shape) < 0.5


def shares(*shape: int) -> Floats:
    return RNG.uniform(0.1, 0.9, size=shape).astype(np.float32)


def of_words(kind: type[WordScorer]) -> WordScorer:
    return kind(
        rows=units(CLASSES), competitors=units(BACKGROUND_WORDS), competitor_mask=mask(CLASSES, BACKGROUND_WORDS),
        word_rows=units(PROPOSAL_WORDS),
        hyponyms=mask(CLASSES, PROPOSAL_WORDS) & np.array([[True], [True], [False], [True], [False]]),
        related=mask(CLASSES, PROPOSAL_WORDS), scale=5.0, calibration=CALIBRATION,
        share=shares(CLASSES), finetuned=mask(CLASSES, FINETUNED), finetuned_only=mask(CLASSES),
        training=TrainingWords(
            rows=units(BACKGROUND_WORDS), related=mask(BACKGROUND_WORDS, BACKGROUND_WORDS),
            known=mask(BACKGROUND_WORDS, PROPOSAL_WORDS),
        ),
        below=mask(CLASSES, BACKGROUND_WORDS),
    )  # fmt: skip


SCORERS = [
    of_words(WordScorer),
    of_words(CropScorer),
    EnsembleScorer(
        rows=units(CLASSES), competitors=units(BACKGROUND_WORDS), competitor_mask=mask(CLASSES, BACKGROUND_WORDS),
        exponent=shares(CLASSES), labelled_rows=units(LABELS), related=mask(CLASSES, LABELS),
        is_labelled=np.arange(CLASSES) < 2, scale=5.0, calibration=CALIBRATION,
    ),
    CalibratedScorer(rows=units(CLASSES), background_words=units(BACKGROUND_WORDS), background=units(1)[0],
                     calibration=CALIBRATION),
    CentredCosineScorer(rows=units(CLASSES), background_words=units(BACKGROUND_WORDS), negatives=units(NEGATIVES),
                        calibration=CALIBRATION),
    WordProfileScorer(rows=units(CLASSES), words=units(BACKGROUND_WORDS), calibration=CALIBRATION),
    RegionCosineScorer(rows=units(CLASSES), objectness=shares(CLASSES)),
]  # fmt: skip


@pytest.fixture
def regions() -> RegionSet:
    corner = RNG.uniform(0, 50, size=(REGIONS, 2))
    return RegionSet(
        boxes=np.concatenate([corner, corner + 20], axis=1).astype(np.float32), size=(100, 100), masks=None,
        objectness=shares(REGIONS), text=units(REGIONS), image=units(REGIONS),
        word_scores=shares(REGIONS, PROPOSAL_WORDS), bias=shares(REGIONS), finetuned=shares(REGIONS, FINETUNED),
    )  # fmt: skip


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
@pytest.mark.parametrize("columns", [[3], [4, 0, 2], []], ids=str)
def test_select__reduces_every_field_of_the_classes(
    scorer: WordScorer | EnsembleScorer | CalibratedScorer, columns: list[int], regions: RegionSet
) -> None:
    selected = scorer.select(columns)
    for name in (field.name for field in fields(scorer)):
        before, after = getattr(scorer, name), getattr(selected, name)
        assert before is not None, f"give the scorer above a {name}, or nothing is tested"
        if isinstance(before, np.ndarray):
            expected = before[columns] if len(before) == CLASSES else before
            assert np.array_equal(after, expected), name
    np.testing.assert_allclose(selected(regions), scorer(regions)[:, columns], rtol=1e-5)


def test_select__published_softmax_is_over_the_classes_that_are_left(regions: RegionSet) -> None:
    rows, exponent = units(CLASSES), shares(CLASSES)
    selected = PublishedScorer(rows=rows, background=None, scale=5.0, exponent=exponent).select([4, 1])
    alone = PublishedScorer(rows=rows[[4, 1]], background=None, scale=5.0, exponent=exponent[[4, 1]])
    assert np.array_equal(selected(regions), alone(regions))
