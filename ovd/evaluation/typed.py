# SPDX-License-Identifier: Apache-2.0
"""Calibration of typed words: scenes with a few words each, some of them in the picture and some not.

Measures how often a detection of score s is right, how high an absent word scores, and how far a score moves when more
words are typed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.calibration import fit_platt
from ovd.inference.example_scorers import WordProfileScorer
from ovd.inference.fvlm_ensemble import EnsembleScorer
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.postprocess import NMS_IOU, batched_nms, box_ious
from ovd.inference.scorers import CalibratedScorer
from ovd.inference.scoring import Calibration, RegionSet

MATCH_IOU = 0.5
FLOOR = 0.02
"""Lowest score that counts as a detection when a calibration is measured."""
TypedScorer = CalibratedScorer | WordProfileScorer | WordScorer | EnsembleScorer


@dataclass(frozen=True, kw_only=True)
class TypedScene:
    """One picture's regions, its labels and the words that are typed for it.

    Attributes:
        regions: of the detector.
        boxes: (n, 4) labelled boxes, pixels.
        classes: (n,) index into the vocabulary.
        present: indices of the typed words that are in the picture.
        absent: indices of the typed words that are not, near-synonyms of what is there excluded.
        rows: (C, D) unit rows of the vocabulary in this picture, where they differ from picture to picture.
        certainty: (n,) 0…1 the teacher's probability that each label is right; None: all are.
        index: of the picture in its data set.
    """

    regions: RegionSet
    boxes: Floats
    classes: NDArray[np.int64]
    present: tuple[int, ...]
    absent: tuple[int, ...]
    rows: Floats | None = None
    certainty: Floats | None = None
    index: int = -1


def draw_words(
    classes: Sequence[int],
    *,
    words: Sequence[int],
    others: Sequence[int],
    near: Mapping[int, frozenset[int]],
    absent: int,
    rng: np.random.Generator,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(present, absent) words for one picture.

    Args:
        classes: labelled classes that are typed.
        words: what absent words are drawn from.
        others: all classes in the picture; neither they nor near-synonyms of them are ever "absent".
        near: near-synonyms of a class.
        absent: how many absent words.
        rng: of this picture.
    """
    present = tuple(sorted(set(classes)))
    unusable = set(others).union(present, *(near.get(c, frozenset()) for c in [*others, *present]))
    free = [c for c in words if c not in unusable]
    return present, tuple(int(c) for c in rng.permutation(free)[:absent])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Pooled over scenes.

    Attributes:
        score: (N,) of every detection after NMS.
        correct: (N,) 0 or 1, right class and IoU ≥ .5 with a label not yet taken by a better detection; of a label that
            is one with a probability, that.
        best_absent: (M,) best score of each absent word in its picture.
        labels: (expected) number of labelled objects.
    """

    score: NDArray[np.float64]
    correct: NDArray[np.float64]
    best_absent: NDArray[np.float64]
    labels: float

    def sigmoid(self, *, eps: float = 1e-6) -> tuple[float, float]:
        """Slope and offset of the scores, see `fit_platt`."""
        return fit_platt(torch.from_numpy(self.score), torch.from_numpy(self.correct), eps=eps)

    def best(self, count: int) -> Outcome:
        """The same of the best ``count`` detections: far below them a sigmoid need not fit."""
        chosen = np.argsort(-self.score, kind="stable")[:count]
        return replace(self, score=self.score[chosen], correct=self.correct[chosen])


def _classified(
    scene: TypedScene, words: Sequence[int], scorer: TypedScorer
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(score_RC, best score of each region, its word) of one scene."""
    if scene.rows is not None:
        scorer = replace(scorer, rows=scene.rows)
    score_RC = scorer.select(words)(scene.regions)
    return score_RC, score_RC.max(axis=1), score_RC.argmax(axis=1)


def _matched(
    scene: TypedScene, words: Sequence[int], best_R: Floats, word_R: NDArray[np.int64], floor: float
) -> list[tuple[int, float]]:
    """(region, how right it is, 0…1) of the detections after NMS, best first; every label is matched once."""
    keep = np.flatnonzero(best_R >= np.float32(floor))
    boxes = scene.regions.boxes
    chosen = keep[batched_nms(boxes[keep], best_R[keep], word_R[keep], NMS_IOU)]
    overlap = box_ious(boxes[chosen], scene.boxes)
    free = np.ones(len(scene.boxes), dtype=bool)
    matched = []
    for i, region in enumerate(chosen.tolist()):
        matches = (scene.classes == words[int(word_R[region])]) & free & (overlap[i] >= MATCH_IOU)
        right = 0.0
        if matches.any():
            label = int((overlap[i] * matches).argmax())
            free[label] = False
            right = 1.0 if scene.certainty is None else float(scene.certainty[label])
        matched.append((region, right))
    return matched


def run_typed(scenes: Sequence[TypedScene], scorer: TypedScorer, *, floor: float = 0.01) -> Outcome:
    """Score, NMS and match every scene with its own words.

    Args:
        scenes: see :class:`TypedScene`.
        scorer: of the whole vocabulary; each scene takes its own rows of it.
        floor: detections below it are not counted (before the sigmoid of the calibration).
    """
    scores: list[float] = []
    correct: list[float] = []
    best_absent: list[float] = []
    labels = 0.0
    for scene in scenes:
        words = scene.present + scene.absent
        score_RC, best_R, word_R = _classified(scene, words, scorer)
        best_absent.extend(score_RC[:, len(scene.present) :].max(axis=0).tolist())
        labels += len(scene.boxes) if scene.certainty is None else float(scene.certainty.sum())
        for region, hit in _matched(scene, words, best_R, word_R, floor):
            scores.append(float(best_R[region]))
            correct.append(hit)
    return Outcome(
        score=np.array(scores),
        correct=np.array(correct, dtype=np.float64),
        best_absent=np.array(best_absent),
        labels=labels,
    )


def distractor_scores(
    scenes: Sequence[TypedScene], distractors: Sequence[Sequence[int]], scorer: TypedScorer
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of the correct detections above the threshold before and after unrelated words are typed as well.

    Args:
        scenes: only their present words are typed at first.
        distractors: for each scene the words that are added.
        scorer: see :func:`run_typed`.

    Returns:
        (before, after), (N,) each; ``after`` is NaN where the region now goes by another word.
    """
    before: list[float] = []
    after: list[float] = []
    for scene, extra in zip(scenes, distractors, strict=True):
        few, many = scene.present, (*scene.present, *extra)
        _, best_R, word_R = _classified(scene, few, scorer)
        _, later_R, later_word_R = _classified(scene, many, scorer)
        for region, hit in _matched(scene, few, best_R, word_R, scorer.calibration.threshold):
            if hit:
                before.append(float(best_R[region]))
                same = many[int(later_word_R[region])] == few[int(word_R[region])]
                after.append(float(later_R[region]) if same else float("nan"))
    return np.array(before), np.array(after)


def average_precision(outcome: Outcome) -> float:
    """Area under the precision-recall curve of the pooled detections, all classes together; a ranking measure."""
    if outcome.labels == 0 or len(outcome.score) == 0:
        return 0.0
    order = np.argsort(-outcome.score, kind="stable")
    hits = outcome.correct[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / outcome.labels)


def at_threshold(outcome: Outcome, threshold: float) -> dict[str, float]:
    """Precision and recall of shown boxes at a threshold, and how often an absent word is shown."""
    listed = outcome.score >= threshold
    hits = outcome.correct[listed]
    return {
        "average_precision": average_precision(outcome),
        "precision_at_threshold": float(hits.mean()) if listed.any() else float("nan"),
        "recall_at_threshold": float(hits.sum() / max(outcome.labels, 1)),
        "absent_words_quiet": float(np.mean(outcome.best_absent < threshold)) if len(outcome.best_absent) else 1.0,
    }


def choose_ranking(
    scenes: Sequence[TypedScene],
    scorer: CalibratedScorer | WordProfileScorer,
    *,
    logit_scales: Sequence[float] = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0),
    objectness_weights: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
) -> Calibration:
    """The temperature and objectness exponent with the best pooled average precision, before the sigmoid is fitted.

    The other values are those of the scorer's calibration.
    """
    start = scorer.calibration.uncalibrated()
    best, best_ap = scorer.calibration, -1.0
    for scale in logit_scales:
        for weight in objectness_weights:
            candidate = replace(start, logit_scale=scale, objectness_weight=weight)
            ap = average_precision(run_typed(scenes, replace(scorer, calibration=candidate), floor=1e-4))
            if ap > best_ap:
                best, best_ap = candidate, ap
    return best
