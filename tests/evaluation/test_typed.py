# SPDX-License-Identifier: Apache-2.0
"""Scenes with typed words: drawing the words, matching, ranking, and the calibration they lead to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ovd.evaluation.typed import Outcome, TypedScene, average_precision, choose_ranking, draw_words, run_typed
from ovd.inference.region_model import RegionModel
from ovd.inference.scorers import CalibratedScorer
from ovd.inference.scoring import Calibration, RegionSet
from ovd.inference.strategies import CropEmbeddings

ROWS = np.eye(6, dtype=np.float32)  # six words, each its own axis
BACKGROUND_WORDS = ROWS[5:]


def scene(
    axes: list[int], *, present: tuple[int, ...], absent: tuple[int, ...], boxes: list[list[float]]
) -> TypedScene:
    """Regions that look exactly like the words ``axes``; the first len(present) boxes are the labels."""
    count = len(axes)
    regions = RegionSet(
        boxes=np.array(boxes, np.float32),
        objectness=np.full(count, 0.9, np.float32),
        text=ROWS[axes],
        image=None,
        masks=None,
        size=(100, 100),
    )
    return TypedScene(
        regions=regions,
        boxes=np.array(boxes[: len(present)], np.float32),
        classes=np.array(present),
        present=present,
        absent=absent,
    )


def scorer(calibration: Calibration) -> CalibratedScorer:
    return CalibratedScorer(rows=ROWS, background_words=BACKGROUND_WORDS, background=None, calibration=calibration)


def outcome(scenes: list[TypedScene], calibration: Calibration | None = None) -> Outcome:
    return run_typed(scenes, scorer(calibration or Calibration(logit_scale=10.0)))


A, B = [0.0, 0.0, 30.0, 30.0], [50.0, 50.0, 90.0, 90.0]


def test_words__are_in_the_picture_or_neither_there_nor_nearly() -> None:
    near = {1: frozenset({2})}
    for seed in range(20):
        present, absent = draw_words(
            [1, 1], words=range(6), others=[1, 4], near=near, absent=9, rng=np.random.default_rng(seed)
        )
        assert present == (1,)
        assert sorted(absent) == [0, 3, 5]


def test_run__a_right_region_on_its_label_is_correct_and_absent_words_stay_low() -> None:
    got = outcome([scene([0, 1], present=(0, 1), absent=(2, 3), boxes=[A, B])])
    assert got.correct.tolist() == [True, True] and got.labels == 2
    assert len(got.best_absent) == 2 and float(got.best_absent.max()) < 0.6 < float(got.score.min())


def test_run__a_label_is_matched_once_and_a_wrong_word_is_wrong() -> None:
    shifted = [2.0, 2.0, 32.0, 32.0]  # overlaps A by more than the NMS allows
    got = outcome([scene([0, 0, 1], present=(0,), absent=(1,), boxes=[A, shifted, B])])
    assert sorted(got.correct.tolist()) == [False, True]


def test_average_precision__equals_a_hand_count() -> None:
    score, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    got = average_precision(Outcome(score=score, correct=correct, best_absent=np.zeros(0), labels=3))
    assert got == pytest.approx((1 / 1 + 2 / 3) / 3)


def test_average_precision__without_labels_or_detections_is_zero() -> None:
    empty = Outcome(score=np.zeros(0), correct=np.zeros(0, dtype=bool), best_absent=np.zeros(0), labels=2)
    assert average_precision(empty) == 0.0


def test_ranking__uses_objectness_where_only_objectness_tells_right_from_wrong() -> None:
    """The wrong region looks more like the word than the right one; objectness knows better."""
    made = scene([0, 0], present=(0,), absent=(1,), boxes=[A, B])
    made.regions.text = np.stack([np.array([0.8, 0, 0, 0, 0, 0.6], np.float32), ROWS[0]])
    made.regions.objectness = np.array([0.99, 0.01], np.float32)
    chosen = choose_ranking([made], scorer(Calibration()), logit_scales=(5.0,))
    assert chosen.objectness_weight > 0.0


def test_crops__regions_are_named_by_the_encoder_and_slivers_are_left_out() -> None:
    class Colour:
        """Embeds a crop by its mean colour."""

        image_size, embed_dim, image_mean = 8, 3, (0.5, 0.5, 0.5)

        def prepare(self, images: torch.Tensor) -> torch.Tensor:
            return images.float() / 255

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean(dim=(2, 3))

        def parameters(self) -> list[torch.Tensor]:
            return []

    class Boxes(RegionModel):
        background_words, calibration = np.zeros((0, 3), np.float32), Calibration()

        def regions(self, image: np.ndarray) -> RegionSet:
            boxes = np.array([[10, 10, 30, 30], [60, 60, 61, 90], [60, 10, 90, 40]], np.float32)
            return RegionSet(
                boxes=boxes,
                objectness=np.array([0.9, 0.8, 0.7]),
                text=np.zeros((3, 3), np.float32),
                image=None,
                masks=None,
                size=(100, 100),
            )

    image = np.zeros((100, 100, 3), dtype=np.uint8)
    image[:, :50, 0] = 255
    image[:, 50:, 2] = 255
    got = CropEmbeddings(model=Boxes(), encoder=Colour()).regions(image)
    assert got.objectness.tolist() == pytest.approx([0.9, 0.7])
    np.testing.assert_allclose(got.text, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], atol=1e-5)


def test_distractors__remove_regions_of_other_words() -> None:
    from ovd.evaluation.typed import distractor_scores

    made = scene([0, 1], present=(0, 1), absent=(), boxes=[A, B])
    made.regions.text = np.array([[1, 0, 0, 0, 0, 0], [0, 0.7, 0.72, 0, 0, 0]], np.float32)
    calibration = Calibration(logit_scale=10.0, threshold=0.2)
    before, after = distractor_scores([made], [(3, 4)], scorer(calibration))
    np.testing.assert_allclose(before, after)
    before, after = distractor_scores([made], [(2, 3)], scorer(calibration))
    assert np.isnan(after).tolist() == [False, True]
