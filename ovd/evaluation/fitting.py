# SPDX-License-Identifier: Apache-2.0
"""Fitting a calibration to typed words or to crops: the sigmoid, then the default threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ovd.evaluation.typed import Outcome, TypedScene, TypedScorer, choose_ranking, run_typed
from ovd.inference.calibration import absent_class_threshold
from ovd.inference.example_scorers import WordProfileScorer
from ovd.inference.scorers import CalibratedScorer
from ovd.inference.scoring import Calibration

FIT_FLOOR = 1e-4
"""Lowest raw score that a sigmoid is fitted to."""


def fit_sigmoid(scenes: Sequence[TypedScene], scorer: TypedScorer) -> tuple[Calibration, Outcome]:
    """The scorer's calibration with slope and offset fitted to its scores, and the detections they were fitted to.

    Args:
        scenes: to fit on.
        scorer: not calibrated, see `Calibration.uncalibrated`.
    """
    outcome = run_typed(scenes, scorer, floor=FIT_FLOOR)
    slope, offset = outcome.sigmoid()
    return replace(scorer.calibration, slope=slope, offset=offset), outcome


def fit_calibration(scenes: Sequence[TypedScene], scorer: CalibratedScorer | WordProfileScorer) -> Calibration:
    """Temperature and objectness exponent, then slope and offset, then the default threshold."""
    ranking = choose_ranking(scenes, scorer)
    calibration, _ = fit_sigmoid(scenes, replace(scorer, calibration=ranking))
    listed = run_typed(scenes, replace(scorer, calibration=calibration), floor=0.0)
    return replace(calibration, threshold=round_up(quiet_threshold(listed)))


def quiet_threshold(outcome: Outcome) -> float:
    """The score that absent classes stay below in 95 % of cases."""
    return absent_class_threshold(torch.from_numpy(outcome.best_absent))


def round_up(threshold: float) -> float:
    """To two digits, at most .99; upwards, so that what the threshold promises still holds."""
    return min(0.99, float(np.ceil(threshold * 100) / 100))
