# SPDX-License-Identifier: Apache-2.0
"""Fitting and measuring the scores of a detector of photographs (`ovd.calibrate --data`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ovd.data.photo_words import PhotoLabels
from ovd.detector import Detector
from ovd.evaluation.fitting import fit_sigmoid, quiet_threshold, round_up
from ovd.evaluation.labelled_scenes import labels_of
from ovd.evaluation.options import DataSpec
from ovd.evaluation.photo_examples import with_crops, word_crops
from ovd.evaluation.reliability import Reliability, reliability
from ovd.evaluation.typed import FLOOR, Outcome, TypedScene, at_threshold, choose_ranking, run_typed
from ovd.evaluation.typed_photos import NamedPhoto, labelled_words, named_outcome, typed_photos
from ovd.formats.labels import choose_parts
from ovd.inference.calibration import absent_class_threshold
from ovd.inference.example_scorers import WordProfileScorer
from ovd.inference.fvlm_ensemble import EnsembleScorer
from ovd.inference.fvlm_regions import FvlmRegionModel, WordScorer
from ovd.inference.open_words import OPEN_EPS
from ovd.inference.scoring import Calibration
from ovd.vocabulary import Vocabulary
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError

MIN_PHOTOS = 20  # photos of either kind that a fit needs
MIN_RIGHT = 3  # boxes, and as many wrong ones
FITTED = 5  # detections for each photo of one thing that a sigmoid is fitted to, the best of all


@dataclass(frozen=True, kw_only=True)
class TypedPhotos:
    """A data set of photos, ready to be scored.

    Attributes:
        scenes: with boxes.
        named: of one thing.
        scorer: of all words.
        examples: the scenes with crops in place of words.
        example_scorer: of the crops.
    """

    scenes: list[TypedScene]
    named: list[NamedPhoto]
    scorer: WordScorer | EnsembleScorer
    examples: list[TypedScene] = field(default_factory=list)
    example_scorer: WordProfileScorer | None = None

    def half(self, start: int) -> TypedPhotos:
        """Every second photo, from the first (0) or the second one (1)."""
        return replace(self, scenes=self.scenes[start::2], named=self.named[start::2], examples=self.examples[start::2])


def photos_of(data: str, *, labels: Path | None, part: str | None) -> PhotoLabels:
    """The photos that ``--data`` names, with those of one thing.

    Args:
        data: as on the command line, see `labels_of`.
        labels: JSON table, file name -> nouns.
        part: of the data set, or ``all``; None: as ``data`` says, else ``val`` where there is one.

    Raises:
        UserError: labels that cannot be read, or no such part.
    """
    spec = DataSpec.parse(data).labels
    named = part or (None if spec is None else spec.part)
    labels_read = labels_of(data, part="all")  # words of the other parts belong to the vocabulary, too
    truth = labels_read.truth()
    parts = list(truth.parts.values())
    if named is None:
        named = "val" if "val" in parts else "all"
    return PhotoLabels(
        folder=labels_read.root,
        annotations=[truth],
        labels=labels,
        lexicon=read_lexicon(),
        part=None if named == "all" else next(iter(choose_parts(parts, named, (), labels_read.where))),
        min_score=0.08,
    )


def require_boxes(photos: PhotoLabels, where: str) -> None:
    """Refuse too few labels before any network runs.

    Raises:
        UserError: too few photos with boxes.
    """
    count = sum(bool(labelled_words(photo, photos.table)) for photo in photos.photos)
    if count < 2 * MIN_PHOTOS:
        raise UserError(
            f"--data {where}: {count} photo{'s' if count != 1 else ''} with boxes; at least {2 * MIN_PHOTOS} are "
            "needed, half to fit on and half to measure on"
        )


def prepare(detector: Detector, photos: PhotoLabels, *, seed: int = 0) -> TypedPhotos:
    """Run the detector over the photos.

    Raises:
        UserError: the detector is not one of photographs.
    """
    if not isinstance(detector.model, FvlmRegionModel):
        raise UserError("--data: these weights are not a detector of photographs")
    vocabulary = Vocabulary.of(photos.table.words, templates=detector.templates)
    rows = detector.text.embed(vocabulary)
    scenes, named = typed_photos(detector, photos, rows, seed=seed)
    scorer = detector.model.scorer(rows, [c.phrases for c in vocabulary.classes], detector.model.background_words)
    assert isinstance(scorer, WordScorer | EnsembleScorer)
    if isinstance(scorer, EnsembleScorer):
        named = []  # one sigmoid for all words, fitted on boxes
    crops = word_crops(detector, photos, seed=seed)
    example_scorer = WordProfileScorer(
        rows=crops.rows[0], words=detector.model.background_words, calibration=Calibration().of_examples()
    )
    return TypedPhotos(
        scenes=scenes, named=named, scorer=scorer, examples=with_crops(scenes, crops), example_scorer=example_scorer
    )


def fit(data: TypedPhotos) -> tuple[Calibration, bool]:
    """Slope and offset of the proposal network's words, of other words, then the default threshold.

    Those of other words stay as they are where `named_of_other_words` finds too few photos.
    The threshold is that of the best F1, or a higher one from which an absent word is quiet in 95 % of the photos.

    Returns:
        (the calibration, whether the scores of crops could be fitted, too).

    Raises:
        UserError: labels that nothing can be fitted to.
    """
    if len(data.scenes) < MIN_PHOTOS:
        raise UserError(
            f"--data: only {len(data.scenes)} photos with boxes can be read; {MIN_PHOTOS} are needed to fit on"
        )
    require_absent_words(data)
    ranking = data.scorer.calibration.uncalibrated()
    fitted, outcome = fit_sigmoid(data.scenes, replace(data.scorer, calibration=ranking))
    require_both(outcome)
    before = data.scorer.calibration
    fitted = replace(
        fitted,
        open_slope=before.open_slope,
        open_offset=before.open_offset,
        open_fallback=before.open_fallback,
    )
    if named_photos := named_of_other_words(data):
        named = named_outcome(named_photos, replace(data.scorer, calibration=ranking), floor=OPEN_EPS)
        slope, offset = named.best(FITTED * len(named_photos)).sigmoid(eps=OPEN_EPS)
        fitted = replace(fitted, open_slope=slope, open_offset=offset)
    if min(fitted.slope, fitted.open_slope) <= 0:
        raise UserError(
            "--data: this detector's scores say nothing about these labels (the better a score, the less often it is "
            "right). Nothing was changed"
        )
    fitted = with_threshold(data, replace(data.scorer, calibration=fitted))
    crops = fit_examples(data)
    return (fitted, False) if crops is None else (fitted.with_examples(crops), True)


def named_of_other_words(data: TypedPhotos) -> list[NamedPhoto]:
    """The photos that scores of words beyond the proposal network's are fitted to; none where there are too few."""
    photos = unknown_to(data.scorer, data.named) if isinstance(data.scorer, WordScorer) else []
    return photos if len(photos) >= MIN_PHOTOS else []


def unknown_to(scorer: WordScorer, named: Sequence[NamedPhoto]) -> list[NamedPhoto]:
    """Photos of single objects that the proposal network has no word for, with absent words that it has none for."""
    known = np.asarray(scorer.hyponyms.any(axis=1))
    return [
        replace(photo, absent=tuple(word for word in photo.absent if not known[word]))
        for photo in named
        if not known[photo.present]
    ]


def require_both(outcome: Outcome) -> None:
    """Refuse detections that nothing can be fitted to.

    Raises:
        UserError: hardly any is right, or hardly any wrong.
    """
    right = float(outcome.correct.sum())
    if min(right, len(outcome.correct) - right) < MIN_RIGHT:
        which = "wrong, so nothing can be fitted"
        if right < MIN_RIGHT:
            which = (
                "right: if the detector does not find these classes, train it on them: --config photos/finetune.yaml"
            )
        text = f"--data: of the boxes found for the words of the labels fewer than {MIN_RIGHT} are"
        raise UserError(f"{text} {which}. Nothing was changed")


def require_absent_words(data: TypedPhotos) -> None:
    """Refuse labels that leave no photo with an absent word.

    Raises:
        UserError: every photo shows all words of the labels.
    """
    if not any([*(scene.absent for scene in data.scenes), *(photo.absent for photo in data.named)]):
        raise UserError(
            "--data: no photo lacks a word of the labels, so the scores of absent words cannot be measured; take "
            "photos of two unrelated classes at least. Nothing was changed"
        )


def with_threshold(data: TypedPhotos, scorer: WordScorer | EnsembleScorer) -> Calibration:
    """The scorer's calibration with the default threshold."""
    quiet = absent_class_threshold(torch.from_numpy(absent_scores(data, scorer)))
    threshold = default_threshold(quiet, run_typed(data.scenes, scorer, floor=FLOOR))
    return replace(scorer.calibration, threshold=threshold)


def fit_examples(data: TypedPhotos) -> Calibration | None:
    """The calibration of crops: temperature and objectness exponent, then as of words.

    Returns:
        the values in the plain fields, for `Calibration.with_examples`; None: too few photos with crops, none that
        lacks what a crop shows, or scores without any relation to the labels.
    """
    if (
        data.example_scorer is None
        or len(data.examples) < MIN_PHOTOS
        or not any(scene.absent for scene in data.examples)
    ):
        return None
    ranking = choose_ranking(
        data.examples, data.example_scorer, logit_scales=(10.0, 15.0, 20.0, 30.0), objectness_weights=(0.25, 0.5, 1.0)
    )
    fitted, outcome = fit_sigmoid(data.examples, replace(data.example_scorer, calibration=ranking))
    if fitted.slope <= 0 or not outcome.correct.any():
        return None
    listed = run_typed(data.examples, replace(data.example_scorer, calibration=fitted), floor=FLOOR)
    return replace(fitted, threshold=default_threshold(quiet_threshold(listed), listed))


def default_threshold(quiet: float, outcome: Outcome) -> float:
    """That of the best F1 or, if it is higher, ``quiet``; rounded up to two digits."""
    return round_up(max(quiet, best_f1_threshold(outcome)))


def best_f1_threshold(outcome: Outcome) -> float:
    """The score from which the detections have the best F1, the harmonic mean of precision and recall."""
    if not len(outcome.score):
        return 1.0
    order = np.argsort(-outcome.score, kind="stable")
    hits = np.cumsum(outcome.correct[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + max(outcome.labels, 1.0))
    return float(outcome.score[order][f1.argmax()])


def absent_scores(data: TypedPhotos, scorer: WordScorer | EnsembleScorer) -> np.ndarray:
    """Best scores of absent words, of both kinds of photos."""
    outcomes = run_typed(data.scenes, scorer, floor=FLOOR), named_outcome(data.named, scorer, floor=FLOOR)
    return np.concatenate([outcome.best_absent for outcome in outcomes])


def measure(data: TypedPhotos, calibration: Calibration) -> tuple[dict[str, float], Reliability]:
    """Figures of a calibration, and its reliability on photos with boxes."""
    scorer, threshold = replace(data.scorer, calibration=calibration), calibration.threshold
    outcome = run_typed(data.scenes, scorer, floor=FLOOR)
    curve = reliability(outcome.score, outcome.correct)
    figures = {"photos": float(len(data.scenes)), **at_threshold(outcome, threshold), "ece": curve.ece}
    if data.named:
        named = at_threshold(named_outcome(data.named, scorer, floor=FLOOR), threshold)
        figures |= {"named_photos": float(len(data.named)), **{f"named_{name}": v for name, v in named.items()}}
    if data.example_scorer is not None and len(data.examples) >= MIN_PHOTOS:
        by_crop = replace(data.example_scorer, calibration=calibration.of_examples())
        crops = run_typed(data.examples, by_crop, floor=FLOOR)
        measured = at_threshold(crops, calibration.example_threshold)
        measured["ece"] = reliability(crops.score, crops.correct).ece
        figures |= {"example_photos": float(len(data.examples)), **{f"example_{k}": v for k, v in measured.items()}}
    return figures, curve
