# SPDX-License-Identifier: Apache-2.0
"""Calibrating a detector on typed words: on Sticker Scenes, or on labelled pictures; words first, then crops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ovd.detector import Detector
from ovd.evaluation.examples import class_examples, sticker_crops
from ovd.evaluation.fitting import fit_calibration
from ovd.evaluation.labelled_scenes import labelled_scenes, vocabulary_of
from ovd.evaluation.prompt_free import prompt_free_figures, with_fitted_prompt_free
from ovd.evaluation.reliability import Reliability, reliability, score_drift
from ovd.evaluation.typed import FLOOR, TypedScene, at_threshold, distractor_scores, draw_words, run_typed
from ovd.formats.labels import Labels
from ovd.inference.example_scorers import centred_on_picture, centred_texts
from ovd.inference.scorers import CalibratedScorer
from ovd.inference.scoring import Calibration
from ovd.vocabulary import Vocabulary
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError

ABSENT_WORDS = 10
"""Words typed for each scene that name nothing in it."""


def near_synonyms(stickers: Stickers) -> dict[int, frozenset[int]]:
    """For each noun, the nouns that a user could mean by it."""
    near: dict[int, frozenset[int]] = {}
    for group in stickers.near_synonyms:
        for member in group:
            near[member] = near.get(member, frozenset()) | frozenset(group) - {member}
    return near


def typed_scenes(
    detector: Detector, stickers: Stickers, *, seed: int, count: int, size: int, base_only: bool
) -> list[TypedScene]:
    """Regions and words of ``count`` validation-style scenes; with ``base_only`` neither words nor labels are novel."""
    source = SceneSource(stickers, split="val", seed=seed, size=size, length=count)
    near = near_synonyms(stickers)
    scenes = []
    for index in range(count):
        scene = source.scene(index)
        typed = np.isin(scene.classes, sorted(stickers.base)) if base_only else np.ones(len(scene.classes), dtype=bool)
        if not typed.any():
            continue
        rng = np.random.default_rng([seed, index])
        present, absent = draw_words(
            scene.classes[typed].tolist(),
            words=sorted(stickers.base) if base_only else range(len(stickers.nouns)),
            others=scene.classes.tolist(),
            near=near,
            absent=ABSENT_WORDS,
            rng=rng,
        )
        scenes.append(
            TypedScene(
                regions=detector.embed(scene.image).regions,
                boxes=scene.boxes[typed],
                classes=scene.classes[typed],
                present=present,
                absent=absent,
            )
        )
    return scenes


def measure(
    scenes: list[TypedScene], scorer: CalibratedScorer, near: dict[int, frozenset[int]]
) -> tuple[dict[str, float], Reliability]:
    """Figures of a calibration on some scenes (ECE, absent words, precision and recall), and its reliability."""
    outcome, threshold = run_typed(scenes, scorer, floor=FLOOR), scorer.calibration.threshold
    words = range(len(scorer.rows))
    distractors = [
        draw_words(scene.present, words=words, others=[], near=near, absent=80, rng=np.random.default_rng([7, i]))[1]
        for i, scene in enumerate(scenes)
    ]
    drift, within = score_drift(*distractor_scores(scenes, distractors, scorer))
    curve = reliability(outcome.score, outcome.correct)
    return {
        "scenes": float(len(scenes)),
        **at_threshold(outcome, threshold),
        "ece": curve.ece,
        "drift_80_words_within_0.05": within,
        "drift_80_words_mean": drift,
    }, curve


def fit_examples(detector: Detector, stickers: Stickers, scenes: list[TypedScene]) -> Calibration:
    """Calibration of crops: the words' fit, with one crop of another style for each word.

    Returns:
        the values in the plain fields, for `Calibration.with_examples`.
    """
    typed = frozenset(c for scene in scenes for c in (*scene.present, *scene.absent))
    crops = sticker_crops(stickers, count=1, classes=typed)
    background_words = detector.model.background_words
    rows = np.zeros((len(stickers.nouns), background_words.shape[1]), np.float32)
    rows[list(crops)] = detector.embed_examples(class_examples(crops))
    centred_scenes = []
    for scene in scenes:
        regions, (centred,) = centred_on_picture(scene.regions, rows)
        centred_scenes.append(
            replace(
                scene,
                regions=regions,
                rows=centred,
                present=tuple(c for c in scene.present if c in crops),
                absent=tuple(c for c in scene.absent if c in crops),
            )
        )
    scorer = CalibratedScorer(
        rows=rows, background_words=centred_texts(background_words), background=None, calibration=Calibration()
    )
    return fit_calibration(centred_scenes, scorer)


def uncalibrated_scorer(detector: Detector, vocabulary: Vocabulary) -> CalibratedScorer:
    """The uncalibrated scorer of words."""
    return CalibratedScorer(
        rows=detector.text.embed(vocabulary),
        background_words=detector.model.background_words,
        background=detector.model.background,
        calibration=Calibration(),
    )


def fit_labels(detector: Detector, labels: Labels, *, count: int) -> tuple[Calibration, dict[str, float], Reliability]:
    """The fit on half of a data set's pictures, at most ``count``, and the figures of `measure` on as many others.

    Raises:
        UserError: see `labelled_scenes`; or scores without any relation to the labels.
    """
    scenes = labelled_scenes(detector, labels, count=count, absent=ABSENT_WORDS)
    scorer = uncalibrated_scorer(detector, vocabulary_of(scenes, detector))
    fitted = fit_calibration(scenes.fit, scorer).with_examples(detector.model.calibration.of_examples())
    if fitted.slope <= 0:  # of a raw score: the better it is, the less likely it is right
        raise UserError(
            f"--data {labels.where}: this detector's scores say nothing about these labels (the better a score, the "
            "less often it is right); train it on such pictures first. Nothing was changed"
        )
    fitted = with_fitted_prompt_free(detector, fitted, scenes.fit, scenes.names)
    figures, curve = measure(scenes.report, replace(scorer, calibration=fitted), {})
    return fitted, figures | prompt_free_figures(detector, fitted, scenes.report, scenes.names), curve
