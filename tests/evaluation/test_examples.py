# SPDX-License-Identifier: Apache-2.0
"""One-shot evaluation: where the crops come from, and whose scores are evaluated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ovd.evaluate import main
from ovd.evaluation.examples import CROP_SIDE, ExamplePredictor, sticker_crops
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError
from tests.detector.fakes import COLOURS, make_detector, picture


def test_crops_are_fixed_and_the_first_one_stays_when_more_are_given() -> None:
    stickers = Stickers.load()
    wanted = frozenset({0, 7, 100})
    one, three = (sticker_crops(stickers, count=n, classes=wanted) for n in (1, 3))
    assert set(one) == set(three) == wanted
    for label in wanted:
        assert len(one[label]) == 1 and len(three[label]) == 3
        assert one[label][0].shape == (CROP_SIDE, CROP_SIDE, 3) and one[label][0].dtype == np.uint8
        assert np.array_equal(one[label][0], three[label][0])
        assert not np.array_equal(three[label][0], three[label][1])


def test_a_predictor_of_examples_gives_the_scores_that_a_person_sees() -> None:
    detector = make_detector()
    crop = np.full((30, 30, 3), COLOURS["blue"], dtype=np.uint8)
    assert detector.examples is not None
    question = detector.question(None, {"b": crop})
    rows = detector.examples.embed(question.examples)
    predictor = ExamplePredictor(detector=detector, category_ids=(5,), rows=rows, scores="calibrated", masks=False)
    best = predictor(picture(), 1)[0]
    regions = detector.embed(picture())
    seen, _ = regions.scores(question)
    assert best["category_id"] == 5 and best["bbox"] == [80, 30, 70, 80]
    assert best["score"] == pytest.approx(float(seen.max()), rel=1e-5)
    torch.testing.assert_close(predictor.score(regions.regions), seen)


def test_examples_need_the_stickers() -> None:
    with pytest.raises(UserError, match="stickers-val"):
        main(["--weights", "default", "--data", "coco:nowhere:nothing.json", "--examples", "1"])
