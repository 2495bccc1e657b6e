# SPDX-License-Identifier: Apache-2.0
"""Prompt-free detection (`everything`) against labels: which detections are right, and from which score most are.

A detection is right if it has an IoU of at least .5 with an object that no better detection has matched, and its word
is a synonym, hypernym or hyponym of the object's. It is wrong if its word is labelled in every picture, or if it lies
on another object. Any other detection cannot be judged by the labels.
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
from pretrain.engine.errors import warn

RIGHT_SHARE = 0.7
"""Share of shown detections that should be right; .71 and .74 are, at the shipped detectors' thresholds."""
MIN_JUDGED = 20
"""Fewest judged detections for a meaningful share."""
CERTAIN = 0.5
"""Certainty of a label from which a detection of another word on it is wrong."""


class Verdict(NamedTuple):
    """On one detection.

    Attributes:
        right: whether it names an object; None: it cannot be judged.
        label: of that object; -1: none.
    """

    right: bool | None
    label: int = -1


class Judge:
    """Compares names by their meaning.

    Args:
        names: of the labels' classes.
        always_labelled: those that are labelled in every picture; None: all.
    """

    def __init__(self, names: Sequence[str], *, always_labelled: frozenset[str] | None = None) -> None:
        self._words = WordList(words=tuple(names), lexicon=read_lexicon())
        self._related: dict[str, NDArray[np.bool_]] = {}
        self.always_labelled = frozenset(names) if always_labelled is None else always_labelled

    def related(self, name: str) -> NDArray[np.bool_]:
        """For each class whether the name is a synonym, hypernym or hyponym of it."""
        if name not in self._related:
            self._related[name] = self._words.relations([[name]]).related[0]
        return self._related[name]

    def verdicts(
        self,
        detections: Detections,
        boxes_M4: Floats,
        classes_M: NDArray[np.int64],
        *,
        certainty_M: Floats | None = None,
        crowd_M: NDArray[np.bool_] | None = None,
    ) -> list[Verdict]:
        """The verdict on each detection.

        Args:
            detections: best first.
            boxes_M4: of the labels, corners.
            classes_M: of the labels, indices into the names.
            certainty_M: 0…1 of the labels; None: all are certain.
            crowd_M: labels of groups, which several detections may match; None: there are none.
        """
        iou = box_ious(detections.xyxy, boxes_M4)
        free = np.ones(len(boxes_M4), dtype=bool)
        certain = free.copy() if certainty_M is None else certainty_M >= CERTAIN
        verdicts = []
        for row, name in zip(iou, detections.class_name, strict=True):
            on = row >= MATCH_IOU
            right = on & free & self.related(name)[classes_M]
            if right.any():
                label = int((row * right).argmax())
                free[label] = crowd_M is not None and bool(crowd_M[label])
                verdicts.append(Verdict(True, label))
            else:
                verdicts.append(Verdict(False if (on & certain).any() or name in self.always_labelled else None))
        return verdicts


class JudgedDetections(NamedTuple):
    """Detections that the labels can judge, pooled over pictures.

    Unlike `ovd.evaluation.typed.Outcome`, which also counts recall and absent words, this only measures precision.

    Attributes:
        score: (N,) of each.
        correct: (N,) 0…1, how right it is.
    """

    score: NDArray[np.float64]
    correct: NDArray[np.float64]


def judge_prompt_free(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> JudgedDetections:
    """Run prompt-free detection on labelled pictures, above the threshold of typed words, and judge the detections.

    Args:
        detector: that made the scenes' regions.
        calibration: to be used.
        scenes: pictures; their typed words are ignored.
        names: of the scenes' classes. Those that occur in any scene count as labelled in all.
    """
    model = copy.copy(detector.model)
    model.calibration = calibration
    score: list[float] = []
    correct: list[float] = []
    if model.prompt_free_words().names:
        recalibrated = detector.with_model(model)  # without what was remembered for another calibration
        query = recalibrated.query(EVERYTHING)
        labelled = frozenset(names[c] for scene in scenes for c in scene.classes.tolist())
        judge = Judge(names, always_labelled=labelled)
        for scene in scenes:
            regions = Regions(regions=scene.regions, key="", detector=recalibrated)
            detections = regions.classify(query, threshold=calibration.threshold)
            verdicts = judge.verdicts(detections, scene.boxes, scene.classes, certainty_M=scene.certainty)
            certainty = np.ones(len(scene.boxes)) if scene.certainty is None else scene.certainty
            for confidence, verdict in zip(detections.confidence.tolist(), verdicts, strict=True):
                if verdict.right is not None:
                    score.append(confidence)
                    correct.append(float(certainty[verdict.label]) if verdict.right else 0.0)
    return JudgedDetections(np.array(score, dtype=np.float64), np.array(correct, dtype=np.float64))


def fit_prompt_free_threshold(judged: JudgedDetections) -> float | None:
    """The lowest score from which `RIGHT_SHARE` of the detections are right, rounded up to two digits.

    None: too few detections can be judged, or too few are right from any score on.
    """
    order = np.argsort(-judged.score, kind="stable")
    share = np.cumsum(judged.correct[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(share[MIN_JUDGED - 1 :] >= RIGHT_SHARE)
    return round_up(float(judged.score[order][MIN_JUDGED - 1 + enough[-1]])) if len(enough) else None


def with_prompt_free_threshold(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> Calibration:
    """The calibration with its prompt-free threshold fitted, or None; arguments as those of `judge_prompt_free`."""
    calibration = replace(calibration, prompt_free_threshold=None)
    threshold = fit_prompt_free_threshold(judge_prompt_free(detector, calibration, scenes, names))
    return replace(calibration, prompt_free_threshold=threshold)


def with_fitted_prompt_free(
    detector: Detector, fitted: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> Calibration:
    """The fit with the threshold of prompt-free detection; prints a warning where the labels do not give one."""
    fitted = with_prompt_free_threshold(detector, fitted, scenes, names)
    if fitted.prompt_free_threshold is None and detector.model.prompt_free_words().names:
        warn(
            f"at no threshold are {RIGHT_SHARE:.0%} of at least {MIN_JUDGED} answers to 'everything' right by "
            "these labels; the default threshold is kept"
        )
    return fitted


def prompt_free_figures(
    detector: Detector, calibration: Calibration, scenes: Sequence[TypedScene], names: Sequence[str]
) -> dict[str, float]:
    """Of detections above the fitted threshold, how many can be judged and the share that is right; {} without one."""
    if calibration.prompt_free_threshold is None:
        return {}
    judged = judge_prompt_free(detector, calibration, scenes, names)
    shown = judged.correct[judged.score >= calibration.prompt_free_threshold]
    return {
        "prompt_free_answers": float(len(shown)),
        "prompt_free_right": float(shown.mean()) if len(shown) else float("nan"),
    }
