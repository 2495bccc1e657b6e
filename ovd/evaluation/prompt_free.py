# SPDX-License-Identifier: Apache-2.0
"""Prompt-free detection (`everything`) against labels: which detections are right, and from which score most are.

An answer is right when it has an IoU of at least .5 with an object that no better answer has taken, and its word means
the same as the object's, or lies above or below it. It is wrong when its word is one that the labels name everywhere,
or when it lies on an object of something else. Any other answer names what the labels do not know.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from ovd.detector import Detector
from ovd.evaluation.fitting import round_up
from ovd.evaluation.typed import MATCH_IOU, TypedScene
from ovd.inference.arrays import Floats
from ovd.inference.everything import EVERYTHING
from ovd.inference.known_words import WordList
from ovd.inference.postprocess import box_ious
from ovd.inference.regions import Regions
from ovd.inference.scoring import Calibration
from pretrain.data.lexicon import read_lexicon

RIGHT_SHARE = 0.7
"""Of the answers shown, how many are to be right; .71 and .74 are at the levels of the shipped detectors."""
LEAST = 20
"""Answers that labels can judge; of fewer, a share says nothing."""
CERTAIN = 0.5
"""Certainty of a label from which an answer of another word on it is wrong."""


class Verdict(NamedTuple):
    """On one answer.

    Attributes:
        right: whether it names an object; None: the labels do not say.
        label: of that object; -1: none.
    """

    right: bool | None
    label: int = -1


class Judge:
    """Compares names by their meaning.

    Args:
        names: of the labels' classes.
        everywhere: those that are labelled wherever they are; None: all.
    """

    def __init__(self, names: Sequence[str], *, everywhere: frozenset[str] | None = None) -> None:
        self._words = WordList(words=tuple(names), lexicon=read_lexicon())
        self._related: dict[str, NDArray[np.bool_]] = {}
        self.everywhere = frozenset(names) if everywhere is None else everywhere

    def related(self, name: str) -> NDArray[np.bool_]:
        """For each class whether the name is a synonym, hypernym or hyponym of it."""
        if name not in self._related:
            self._related[name] = self._words.relations([[name]]).related[0]
        return self._related[name]

    def verdicts(
        self,
        found: Detections,
        boxes_M4: Floats,
        classes_M: NDArray[np.int64],
        *,
        certainty_M: Floats | None = None,
        crowd_M: NDArray[np.bool_] | None = None,
    ) -> list[Verdict]:
        """On each answer.

        Args:
            found: best first.
            boxes_M4: of the labels, corners.
            classes_M: of the labels, indices into the names.
            certainty_M: 0…1 of the labels; None: all are certain.
            crowd_M: labels of many objects, which more than one answer may name; None: there are none.
        """
        iou = box_ious(found.xyxy, boxes_M4)
        free = np.ones(len(boxes_M4), dtype=bool)
        certain = free.copy() if certainty_M is None else certainty_M >= CERTAIN
        verdicts = []
        for row, name in zip(iou, found.class_name, strict=True):
            on = row >= MATCH_IOU
            right = on & free & self.related(name)[classes_M]
            if right.any():
                label = int((row * right).argmax())
                free[label] = crowd_M is not None and bool(crowd_M[label])
                verdicts.append(Verdict(True, label))
            else:
                verdicts.append(Verdict(False if (on & certain).any() or name in self.everywhere else None))
        return verdicts


class JudgedAnswers(NamedTuple):
    """Answers on which the labels have a verdict, pooled over pictures.

    `ovd.evaluation.typed.Outcome` has every detection of typed words and counts recall and absent words as well. Here
    nothing is typed, and answers that name what the labels do not know are left out: only precision can be measured.

    Attributes:
        score: (N,) of each.
        correct: (N,) 0…1, how right it is.
    """

    score: NDArray[np.float64]
    correct: NDArray[np.float64]


def judge_prompt_free(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> JudgedAnswers:
    """Detect prompt-free in labelled pictures, from the threshold of typed words on, and judge the answers.

    Args:
        detector: that made the scenes' regions.
        calibration: that it is to have.
        scenes: pictures; the words typed play no part.
        names: that the scenes' classes are indices into. Those of some scene count as labelled in all.
    """
    model = copy.copy(detector.model)
    model.calibration = calibration
    score: list[float] = []
    correct: list[float] = []
    if model.prompt_free_words().names:
        recalibrated = detector.with_model(model)  # without what was remembered for another calibration
        query = recalibrated.query(EVERYTHING)
        labelled = frozenset(names[c] for scene in scenes for c in scene.classes.tolist())
        judge = Judge(names, everywhere=labelled)
        for scene in scenes:
            regions = Regions(regions=scene.regions, key="", detector=recalibrated)
            found = regions.classify(query, threshold=calibration.threshold)
            verdicts = judge.verdicts(found, scene.boxes, scene.classes, certainty_M=scene.certainty)
            certainty = np.ones(len(scene.boxes)) if scene.certainty is None else scene.certainty
            for confidence, verdict in zip(found.confidence.tolist(), verdicts, strict=True):
                if verdict.right is not None:
                    score.append(confidence)
                    correct.append(float(certainty[verdict.label]) if verdict.right else 0.0)
    return JudgedAnswers(np.array(score, dtype=np.float64), np.array(correct, dtype=np.float64))


def fit_prompt_free_threshold(answers: JudgedAnswers) -> float | None:
    """The lowest score from which `RIGHT_SHARE` of the answers are right, rounded up to two digits; None: too few
    answers can be judged, or too few of them are right from any score on."""
    order = np.argsort(-answers.score, kind="stable")
    share = np.cumsum(answers.correct[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(share[LEAST - 1 :] >= RIGHT_SHARE)
    return round_up(float(answers.score[order][LEAST - 1 + enough[-1]])) if len(enough) else None


def with_prompt_free_threshold(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> Calibration:
    """The calibration with the level fitted, or without one; arguments as those of `judge_prompt_free`."""
    calibration = replace(calibration, prompt_free_threshold=None)
    level = fit_prompt_free_threshold(judge_prompt_free(detector, calibration, scenes, names))
    return replace(calibration, prompt_free_threshold=level)


def prompt_free_figures(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> dict[str, float]:
    """Of answers from the fitted level on, how many the labels can judge and the share that is right; {} without."""
    if calibration.prompt_free_threshold is None:
        return {}
    answers = judge_prompt_free(detector, calibration, scenes, names)
    shown = answers.correct[answers.score >= calibration.prompt_free_threshold]
    return {
        "prompt_free_answers": float(len(shown)),
        "prompt_free_right": float(shown.mean()) if len(shown) else float("nan"),
    }
