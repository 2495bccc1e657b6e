# SPDX-License-Identifier: Apache-2.0
"""Every formula of ViLD against an independent derivation in float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovd.inference.calibration import absent_class_threshold, fit_platt
from ovd.inference.ensemble import geometric_ensemble, text_exponents
from ovd.inference.scoring import Calibration, score_regions, vocabulary_probabilities
from ovd.modeling.classifier import EmbeddingClassifier, NovelLabelError, cosine_logits
from ovd.modeling.distillation import l1_distillation
from pretrain.nets.grid import conv3x3_on_2x2


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def classifier(*, classes: int = 5, dim: int = 8, novel: tuple[int, ...] = ()) -> EmbeddingClassifier:
    trainable = torch.ones(classes, dtype=torch.bool)
    trainable[list(novel)] = False
    torch.manual_seed(3)
    return EmbeddingClassifier(rows=3.0 * unit(classes, dim, seed=1), trainable=trainable)


def test_classifier__logits_are_a_hundred_times_cosines_with_background_last() -> None:
    head = classifier().eval()
    regions = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    r = regions.double().numpy()
    rows = np.vstack([head.rows.double().numpy(), head.background.detach().double().numpy()])
    wanted = (
        100 * (r / np.linalg.norm(r, axis=1, keepdims=True)) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    )
    np.testing.assert_allclose(head(regions).detach().numpy(), wanted, rtol=1e-4, atol=1e-3)


def test_classifier__class_rows_are_no_parameters_and_the_background_is() -> None:
    assert [name for name, _ in classifier().named_parameters()] == ["background"]


def test_classifier__novel_columns_are_excluded_in_training_only() -> None:
    head = classifier(novel=(1, 4))
    regions = torch.randn(3, 8)
    assert torch.isneginf(head.train()(regions)[:, [1, 4]]).all()
    assert torch.isfinite(head.eval()(regions)).all()


def test_classifier__loss_ignores_novel_columns_exactly() -> None:
    head = classifier(novel=(1, 4)).train()
    regions, labels = torch.randn(6, 8), torch.tensor([0, 2, 3, 5, 5, 0])
    kept = [0, 2, 3, 5]
    logits = head.eval()(regions)[:, kept]
    wanted = F.cross_entropy(logits, torch.tensor([kept.index(int(i)) for i in labels]))
    head.train()
    torch.testing.assert_close(head.loss(head(regions), labels), wanted)


def test_classifier__a_leaked_novel_label_is_an_error_that_names_the_class() -> None:
    head = classifier(novel=(4,)).train()
    with pytest.raises(NovelLabelError, match=r"\[4\]"):
        head.loss(head(torch.randn(2, 8)), torch.tensor([0, 4]))


def test_classifier__no_regions_give_a_zero_loss_with_a_gradient() -> None:
    head = classifier()
    loss = head.loss(head(torch.zeros(0, 8, requires_grad=True)), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0.0


def test_distillation__l1_norm_equals_256_times_the_mean() -> None:
    a, b = unit(7, 512, seed=1), unit(7, 512, seed=2)
    torch.testing.assert_close(0.5 * l1_distillation(a, b), 256.0 * F.l1_loss(a, b), rtol=1e-6, atol=1e-6)


def test_distillation__of_random_directions_is_the_expected_l1_distance() -> None:
    # Each coordinate of a − b is N(0, 2/D): E|·| = √(2/π)·√(2/D); times D.
    expected = math.sqrt(2 / math.pi) * math.sqrt(2 / 512) * 512
    assert float(l1_distillation(unit(4000, 512, seed=1), unit(4000, 512, seed=2))) == pytest.approx(expected, rel=0.01)


def test_distillation__invalid_regions_count_in_neither_sum_nor_denominator() -> None:
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    valid = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(l1_distillation(a, b, valid), l1_distillation(a[valid], b[valid]))
    assert float(l1_distillation(a, b, torch.zeros(5, dtype=torch.bool))) == 0.0


def test_distillation__sends_no_gradient_to_the_teacher() -> None:
    a, b = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    l1_distillation(a, b).backward()
    assert a.grad is not None and float(a.grad.abs().sum()) > 0
    assert b.grad is None


def rows(*shape: int, seed: int) -> np.ndarray:
    """Unit rows in double precision."""
    return unit(*shape, seed=seed).double().numpy()


def test_ensemble__base_leans_on_text_and_novel_on_image_by_two_thirds() -> None:
    text, image = np.array([[0.8, 0.3]]), np.array([[0.2, 0.6]])
    got = geometric_ensemble(text, image, text_exponents(np.array([True, False])))
    wanted = [0.8 ** (2 / 3) * 0.2 ** (1 / 3), 0.3 ** (1 / 3) * 0.6 ** (2 / 3)]
    np.testing.assert_allclose(got[0], wanted, rtol=1e-6)


def brute_force_score(region: np.ndarray, word: np.ndarray, rivals: list[np.ndarray], scale: float) -> float:
    terms = [math.exp(scale * float(region @ v)) for v in [word, *rivals]]
    return terms[0] / sum(terms)


@pytest.mark.parametrize("with_image", [False, True])
def test_scores__equal_a_softmax_with_background_words(with_image: bool) -> None:
    text, image, words, bank = rows(4, 6, seed=1), rows(4, 6, seed=2), rows(3, 6, seed=3), rows(5, 6, seed=4)
    background = rows(1, 6, seed=5)[0]
    calibration = Calibration(logit_scale=20.0, bank_limit=0.4, text_weight=0.6)
    got = score_regions(text, image if with_image else None, np.ones(4), words, bank, background, calibration)
    for r in range(4):
        for c in range(3):
            rivals = [b for b in bank if float(words[c] @ b) <= 0.4]
            bg = [*rivals, background]
            wanted = brute_force_score(text[r], words[c], bg, 20.0)
            if with_image:
                other = brute_force_score(image[r], words[c], rivals, 20.0)
                wanted = wanted**0.6 * other**0.4
            assert float(got[r, c]) == pytest.approx(wanted, rel=1e-4)


def test_scores__do_not_depend_on_what_else_is_typed() -> None:
    text, words, bank = rows(9, 16, seed=1), rows(90, 16, seed=2), rows(40, 16, seed=3)
    calibration = Calibration(slope=0.7, offset=-1.0, objectness_weight=0.5)
    objectness = np.random.default_rng(0).random(9)
    alone = score_regions(text, None, objectness, words[:1], bank, None, calibration)
    among = score_regions(text, None, objectness, words, bank, None, calibration)
    np.testing.assert_allclose(alone[:, 0], among[:, 0], rtol=1e-5, atol=1e-6)


def test_scores__one_typed_word_is_below_one_and_varies_between_regions() -> None:
    scores = score_regions(
        rows(50, 16, seed=1), None, np.ones(50), rows(1, 16, seed=2), rows(40, 16, seed=3), None, Calibration()
    )
    assert float(scores.max()) < 1.0 and float(scores.std()) > 0.0


def test_scores__stay_finite_at_extreme_scales() -> None:
    scores = score_regions(
        rows(9, 16, seed=1),
        None,
        np.zeros(9),
        rows(3, 16, seed=2),
        rows(4, 16, seed=3),
        None,
        Calibration(logit_scale=1e4),
    )
    assert np.isfinite(scores).all()


def test_vocabulary_softmax__background_takes_part_and_is_dropped() -> None:
    text, words, background = rows(3, 8, seed=1), rows(4, 8, seed=2), rows(1, 8, seed=3)[0]
    got = vocabulary_probabilities(text, None, words, background, scale=10.0)
    e = np.exp(10.0 * text @ np.vstack([words, background[None]]).T)
    np.testing.assert_allclose(got, (e / e.sum(axis=1, keepdims=True))[:, :4], rtol=1e-5)


def test_platt__recovers_slope_and_offset_of_simulated_detections() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(40_000, generator=generator, dtype=torch.float64).clamp(0.001, 0.999)
    right = torch.rand(40_000, generator=generator, dtype=torch.float64) < (0.6 * torch.logit(raw) - 1.2).sigmoid()
    slope, offset = fit_platt(raw, right)
    assert slope == pytest.approx(0.6, abs=0.03) and offset == pytest.approx(-1.2, abs=0.05)


def test_platt__converges_from_far_away_where_scores_are_tiny_and_hits_are_rare() -> None:
    """Objectness times a flat softmax gives scores of a few per cent; plain Newton swings between two points there."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.rand(1800, generator=generator, dtype=torch.float64) * 0.07 + 1e-4
    chance = (1.3 * torch.logit(raw) + 3.7).sigmoid() * 0.2
    right = torch.rand(1800, generator=generator, dtype=torch.float64) < chance
    slope, offset = fit_platt(raw, right)
    fitted = (slope * torch.logit(raw) + offset).sigmoid()
    assert slope > 0
    # At the maximum of the likelihood the mean score equals the share of hits, over all and weighted by the feature.
    assert float(fitted.mean()) == pytest.approx(float(right.double().mean()), rel=1e-3)
    feature = torch.logit(raw)
    assert float((fitted * feature).mean()) == pytest.approx(float((right.double() * feature).mean()), rel=1e-3)


@pytest.mark.parametrize("right", [torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)])
def test_platt__leaves_scores_alone_when_nothing_can_be_learned(right: torch.Tensor) -> None:
    assert fit_platt(torch.rand(5), right) == (1.0, 0.0)


def test_absent_threshold__is_the_quantile_of_the_best_scores() -> None:
    assert absent_class_threshold(torch.arange(101) / 100.0) == pytest.approx(0.95)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [0, 3])
def test_grid_convolution__equals_the_library_in_value_gradients_and_layout(
    layout: torch.memory_format, count: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(count, 5, 2, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = conv3x3_on_2x2(x, weight), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=layout)
    seed = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), seed), torch.autograd.grad(theirs, (x, weight), seed), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("each", [False, True], ids=["shared rows", "rows of each"])
def test_cosine_logits__are_float32_under_autocast(each: bool) -> None:
    regions, rows = torch.randn(5, 8), F.normalize(torch.randn(3, 8), dim=1)
    given = rows.expand(5, 3, 8) if each else rows
    exact = cosine_logits(regions, given, scale=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        said = cosine_logits(regions, given, scale=100.0)
    assert said.dtype == torch.float32 and torch.equal(said, exact)
