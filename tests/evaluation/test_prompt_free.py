# SPDX-License-Identifier: Apache-2.0
"""The level of `everything` that labels give: which answers are right, where most of them are, and what shows it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ovd.detections import Detections
from ovd.detector import Detector
from ovd.evaluation.prompt_free import (
    MIN_JUDGED,
    RIGHT_SHARE,
    Judge,
    JudgedDetections,
    Verdict,
    fit_prompt_free_threshold,
    judge_prompt_free,
    prompt_free_figures,
    with_prompt_free_threshold,
)
from ovd.evaluation.typed import TypedScene
from tests.detector.fakes import ColourModel, WordEncoder, picture

RED, BLUE = (10, 20, 50, 70), (80, 30, 120, 80)


def found(*answers: tuple[str, tuple[int, int, int, int]]) -> Detections:
    names = tuple(name for name, _ in answers)
    count = len(answers)
    return Detections(
        xyxy=np.array([box for _, box in answers], dtype=np.float32).reshape(-1, 4),
        confidence=np.linspace(0.9, 0.5, count, dtype=np.float32),
        class_id=np.arange(count),
        class_name=list(names),
        size=(96, 128),
        names=names,
        best=np.ones(count, np.float32),
        threshold=0.1,
        region=np.arange(count),
    )


A, B, FAR = (0, 0, 10, 10), (50, 50, 60, 60), (90, 90, 99, 99)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("dog", A)], [Verdict(True, 0)]),
        ([("animal", A), ("beagle", B)], [Verdict(True, 0), Verdict(False)]),  # above the label; on a cup
        ([("dog", A), ("dog", (0, 0, 10, 9))], [Verdict(True, 0), Verdict(False)]),  # one dog is there
        ([("cat", FAR)], [Verdict(False)]),  # labels name cats everywhere, and there is none
        ([("harp", FAR)], [Verdict(None)]),  # who knows
        ([("harp", B)], [Verdict(False)]),
        ([("dog", (0, 0, 10, 4))], [Verdict(False)]),  # IoU .4
        ([], []),
    ],
)
def test_judge__right_by_meaning_wrong_or_not_judged(
    answers: list[tuple[str, tuple[int, int, int, int]]], expected: list[Verdict]
) -> None:
    judge = Judge(["dog", "cup", "cat"])
    boxes, classes = np.array([A, B], dtype=np.float32), np.array([0, 1])
    assert judge.verdicts(found(*answers), boxes, classes) == expected


def test_judge__doubtful_labels_make_nothing_wrong() -> None:
    judge = Judge(["dog", "cup"], always_labelled=frozenset(["dog"]))
    boxes, classes = np.array([A, B], dtype=np.float32), np.array([0, 1])
    doubtful = judge.verdicts(
        found(("harp", A), ("harp", B)), boxes, classes, certainty_M=np.array([0.9, 0.1], np.float32)
    )
    assert [v.right for v in doubtful] == [False, None]
    twice = judge.verdicts(found(("dog", A), ("dog", A)), boxes, classes, crowd_M=np.array([True, False]))
    assert twice == [Verdict(True, 0)] * 2
    assert judge.verdicts(found(("cup", FAR)), boxes, classes) == [Verdict(None)]  # not labelled everywhere
    nothing = judge.verdicts(found(("dog", A)), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert nothing == [Verdict(False)]


@pytest.mark.parametrize("seed", range(5))
def test_threshold__is_the_lowest_with_the_share_right(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.1, 0.98, 400)
    correct = (rng.uniform(size=400) < score).astype(float)
    level = fit_prompt_free_threshold(JudgedDetections(score, correct))
    assert level is not None
    shares = {s: correct[score >= s].mean() for s in score if (score >= s).sum() >= MIN_JUDGED}
    lowest = min(s for s, share in shares.items() if share >= RIGHT_SHARE)
    assert level == pytest.approx(np.ceil(lowest * 100) / 100)


@pytest.mark.parametrize(
    ("count", "correct"), [(0, 1.0), (MIN_JUDGED - 1, 1.0), (200, RIGHT_SHARE - 0.01)], ids=["none", "few", "wrong"]
)
def test_threshold__is_none_with_too_few_judged_detections(count: int, correct: float) -> None:
    outcome = JudgedDetections(np.linspace(0.9, 0.2, count), np.full(count, correct))
    assert fit_prompt_free_threshold(outcome) is None


def colour_scenes(detector: Detector, count: int) -> list[TypedScene]:
    """Pictures of a red and a blue thing, of which labels have the red one and call every third another colour."""
    found = detector.embed(picture([("red", *RED), ("blue", *BLUE)])).regions
    boxes = np.array([RED], dtype=np.float32)
    return [
        TypedScene(regions=found, boxes=boxes, classes=np.array([int(n % 3 == 0)]), present=(), absent=())
        for n in range(count)
    ]


def test_threshold__fitted_to_detections_is_applied() -> None:
    encoder = WordEncoder()
    detector = Detector(model=ColourModel(encoder, threshold=0.05), encoder=encoder)
    given = detector.model.calibration
    names = ("red", "green", "unicorn")
    scenes = [s for s in colour_scenes(detector, 90) if s.classes[0] == 0]
    outcome = judge_prompt_free(detector, given, scenes, names)
    assert len(outcome.score) == len(scenes) and outcome.correct.all()  # the blue ones are not judged
    fitted = with_prompt_free_threshold(detector, given, scenes, names)
    assert set(outcome.score > 0.99) == {True} and fitted.prompt_free_threshold == 0.99
    assert detector.model.calibration is given and given.prompt_free_threshold is None
    figures = prompt_free_figures(detector, fitted, scenes, names)
    assert figures == {"prompt_free_answers": len(scenes), "prompt_free_right": 1}
    # a third of all labels is another word: two in three are right, which is too few
    assert (
        with_prompt_free_threshold(detector, fitted, colour_scenes(detector, 90), names).prompt_free_threshold is None
    )
    assert prompt_free_figures(detector, given, scenes, names) == {}


def test_threshold__of_the_card_affects_everything_only() -> None:
    encoder = WordEncoder()
    model = ColourModel(encoder, threshold=0.1)
    default = Detector(model=model, encoder=encoder)
    assert default.threshold_for(default.query("everything")) == 0.3
    model.calibration = replace(model.calibration, prompt_free_threshold=0.64)
    detector = Detector(model=model, encoder=encoder)
    query = detector.query("everything")
    assert query.prompt_free is not None and query.prompt_free.threshold == 0.64
    assert detector.threshold_for(query) == 0.64
    assert detector.threshold_for(detector.query("red")) == 0.1
