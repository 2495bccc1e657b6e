# SPDX-License-Identifier: Apache-2.0
"""Each loss against its definition, written out once more with loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses import (
    barlow_twins,
    byol_regression,
    clip_contrastive,
    embedding_distillation,
    moco_infonce,
    negative_cosine,
    nt_xent,
    sinkhorn,
    swav_loss,
)

Loss = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    return float(u @ v) / math.sqrt(float(u @ u) * float(v @ v))


def surprise(right: float, logits: list[float]) -> float:
    """-log of the softmax share of ``right`` among ``logits``, which include it."""
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - right


def expected_nt_xent(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
    views, n = [*a, *b], len(a)
    total = 0.0
    for i in range(2 * n):
        logits = {j: cosine(views[i], views[j]) / temperature for j in range(2 * n) if j != i}
        total += surprise(logits[(i + n) % (2 * n)], list(logits.values()))
    return total / (2 * n)


def expected_moco(q: np.ndarray, k: np.ndarray, queue: np.ndarray, temperature: float) -> float:
    total = 0.0
    for i in range(len(q)):
        right = cosine(q[i], k[i]) / temperature
        total += surprise(right, [right, *(cosine(q[i], row) / temperature for row in queue)])
    return total / len(q)


def expected_codes(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The paper's matrix scaling in plain exponentials."""
    q = np.exp((scores - scores.max()) / epsilon)
    n, k = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for j in range(k):
            q[:, j] /= q[:, j].sum() * k
        for i in range(n):
            q[i] /= q[i].sum() * n
    return q * n


def expected_barlow(a: np.ndarray, b: np.ndarray, lambd: float) -> float:
    n, d = a.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            u, v = a[:, i], b[:, j]
            u = (u - u.mean()) / math.sqrt(u.var() + 1e-5)
            v = (v - v.mean()) / math.sqrt(v.var() + 1e-5)
            c = float(u @ v) / n
            total += (1 - c) ** 2 if i == j else lambd * c**2
    return total


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
def test_nt_xent__is_the_mean_over_all_views_of_a_softmax_over_all_others(temperature: float) -> None:
    a, b = draw(5, 4), draw(5, 4, seed=1)
    got = nt_xent(a, b, temperature=temperature)
    assert got.item() == pytest.approx(expected_nt_xent(a.numpy(), b.numpy(), temperature), rel=1e-12)
    assert nt_xent(7 * a, b / 9, temperature=temperature).item() == pytest.approx(got.item(), rel=1e-12)


def test_nt_xent__of_equal_embeddings_is_the_log_of_the_candidates() -> None:
    assert nt_xent(torch.ones(6, 3), torch.ones(6, 3), temperature=0.1).item() == pytest.approx(math.log(11))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.2])
def test_moco_loss__is_a_softmax_over_the_positive_key_and_the_queue(temperature: float) -> None:
    q, k, queue = draw(4, 6), draw(4, 6, seed=1), F.normalize(draw(9, 6, seed=2), dim=1)
    got = moco_infonce(q, k, queue, temperature=temperature)
    assert got.item() == pytest.approx(expected_moco(q.numpy(), k.numpy(), queue.numpy(), temperature), rel=1e-12)


def test_moco_infonce__no_key_gradient_and_queue_is_copied() -> None:
    q, k, queue = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_(), F.normalize(draw(9, 6, seed=2))
    (wanted,) = torch.autograd.grad(moco_infonce(q, k, queue, temperature=0.2), q)
    loss = moco_infonce(q, k, queue, temperature=0.2)
    queue.zero_()
    loss.backward()
    assert k.grad is None
    assert q.grad is not None and torch.equal(q.grad, wanted)


def test_regression_and_cosine__one_direction() -> None:
    p, z = draw(5, 3), draw(5, 3, seed=1)
    mean = sum(cosine(x, y) for x, y in zip(p.numpy(), z.numpy(), strict=True)) / 5
    distance = sum(
        float(((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2).sum())
        for x, y in zip(p.numpy(), z.numpy(), strict=True)
    )
    assert negative_cosine(p, z).item() == pytest.approx(-mean, rel=1e-12)
    assert byol_regression(p, z).item() == pytest.approx(distance / 5, rel=1e-12)
    for same, value in ((p, 0.0), (-p, 4.0)):
        assert byol_regression(p, same).item() == pytest.approx(value, abs=1e-12)
        assert negative_cosine(p, same).item() == pytest.approx(value / 2 - 1, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 3), (1.0, 1), (0.5, 10)])
def test_sinkhorn__is_the_papers_scaling(epsilon: float, iterations: int) -> None:
    scores = F.normalize(draw(6, 8), dim=1) @ F.normalize(draw(4, 8, seed=1), dim=1).T
    got = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    np.testing.assert_allclose(got.numpy(), expected_codes(scores.numpy(), epsilon, iterations), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(got.sum(1), torch.ones(6, dtype=torch.float64))


def test_sinkhorn__equal_prototype_use_without_gradient() -> None:
    scores = draw(12, 4).requires_grad_()
    codes = sinkhorn(scores, epsilon=1.0, iterations=500)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    assert not codes.requires_grad


def expected_swav(scores: list[np.ndarray], codes: list[np.ndarray], temperature: float) -> float:
    total = 0.0
    for big, code in enumerate(codes):
        others = [crop for i, crop in enumerate(scores) if i != big]
        for crop in others:
            for i in range(len(crop)):
                logits = [float(x) / temperature for x in crop[i]]
                total += sum(c * surprise(x, logits) for c, x in zip(code[i], logits, strict=True)) / (
                    len(crop) * len(others) * len(codes)
                )
    return total


@pytest.mark.parametrize("queued", [False, True])
def test_swav_loss__predicts_each_big_crops_code_from_every_other_crop(queued: bool) -> None:
    scores = [F.normalize(draw(5, 6, seed=i), dim=1) for i in range(4)]
    earlier = [F.normalize(draw(7, 6, seed=10 + i), dim=1) for i in range(2)] if queued else None
    stacked = [torch.cat([earlier[i], scores[i]]) if earlier else scores[i] for i in range(2)]
    codes = [expected_codes(one.numpy(), 0.05, 3)[-5:] for one in stacked]
    got = swav_loss(scores, temperature=0.1, epsilon=0.05, iterations=3, queue_scores=earlier)
    assert got.item() == pytest.approx(expected_swav([s.numpy() for s in scores], codes, 0.1), rel=1e-9)


def test_swav_loss__is_the_log_of_the_prototypes_when_they_are_alike() -> None:
    same = [torch.full((6, 50), 0.3)] * 3
    assert swav_loss(same, temperature=0.1, epsilon=0.05, iterations=3).item() == pytest.approx(math.log(50))


def test_swav_loss__codes_are_targets_only() -> None:
    """The first big crop alone codes: its own scores get no gradient, because nothing predicts from them."""
    first, second = draw(5, 6).requires_grad_(), draw(5, 6, seed=1).requires_grad_()
    swav_loss([first, second], temperature=0.1, epsilon=0.5, iterations=3, big_crops=1).backward()
    assert first.grad is None
    assert second.grad is not None and second.grad.abs().sum() > 0


def test_barlow_twins_loss__is_the_sum_over_the_correlation_matrix() -> None:
    a, b = draw(7, 5), draw(7, 5, seed=1)
    got = barlow_twins(a, b, lambd=0.0051)
    assert got.item() == pytest.approx(expected_barlow(a.numpy(), b.numpy(), 0.0051), rel=1e-9)
    assert barlow_twins(3 * a + 2, b, lambd=0.0051).item() == pytest.approx(got.item(), rel=1e-4)  # scale and shift
    assert barlow_twins(a, a, lambd=0.0).item() == pytest.approx(0, abs=1e-9)


def test_barlow_twins_loss__the_historical_scale_changes_the_gradient_and_not_the_value() -> None:
    a, b = draw(7, 5).requires_grad_(), draw(7, 5, seed=1)
    whole, part = barlow_twins(a, b, lambd=0.01), barlow_twins(a, b, lambd=0.01, gradient_scale=1 / 16)
    torch.testing.assert_close(part, whole)
    torch.testing.assert_close(torch.autograd.grad(part, a)[0], torch.autograd.grad(whole, a)[0] / 16)


def clip(image: Tensor, text: Tensor) -> Tensor:
    return clip_contrastive(image, text, torch.tensor(math.log(100.0)))


def moco(q: Tensor, k: Tensor) -> Tensor:
    return moco_infonce(q, k, F.normalize(draw(6, q.shape[1], seed=9), dim=1), temperature=0.01)


LOSSES: dict[str, tuple[Loss, int]] = {
    "nt_xent": (lambda a, b: nt_xent(a, b, temperature=0.01), 2),
    "moco": (moco, 1),
    "byol": (byol_regression, 2),
    "cosine": (negative_cosine, 2),
    "swav": (lambda a, b: swav_loss([a, b], temperature=0.01, epsilon=0.03, iterations=3), 0),
    "barlow": (lambda a, b: barlow_twins(a, b, lambd=0.0051), 2),
    "clip": (clip, 2),
    "distillation": (lambda a, b: embedding_distillation(a, b, similarity_weight=1.0, temperature=0.05)[0], 1),
}


@pytest.mark.parametrize("name", [name for name, (_, inputs) in LOSSES.items() if inputs])
def test_losses__gradients_equal_finite_differences(name: str) -> None:
    """float64 in, float64 out, and differentiable in what is learnt."""
    loss, inputs = LOSSES[name]
    a, b = (draw(5, 4, seed=i).requires_grad_(i < inputs) for i in range(2))
    assert loss(a, b).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (a, b), atol=1e-5)


def test_swav_loss__its_gradient_equals_finite_differences_at_fixed_codes() -> None:
    scores = [draw(4, 5, seed=i).requires_grad_() for i in range(3)]
    codes = [sinkhorn(one, epsilon=0.5, iterations=3) for one in scores[:2]]

    def loss(*crops: Tensor) -> Tensor:
        return swav_loss(crops, temperature=0.1, epsilon=0.5, iterations=3, codes=codes)

    assert torch.autograd.gradcheck(loss, scores)
    ours = swav_loss(scores, temperature=0.1, epsilon=0.5, iterations=3)
    for one, other in zip(torch.autograd.grad(ours, scores), torch.autograd.grad(loss(*scores), scores), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses__are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """At T = .01 and epsilon = .03, with equal and opposite pairs: finite, and float32's value to the bit."""
    a = torch.cat([draw(6, 8, dtype=dtype), torch.eye(8, dtype=dtype)[:2]])
    b = torch.cat([a[:2], -a[2:4], draw(4, 8, seed=1, dtype=dtype)])
    if name == "swav":  # takes cosines
        a, b = (F.normalize(x.float(), dim=1).to(dtype) for x in (a, b))
    loss = LOSSES[name][0]
    plain = loss(a.float(), b.float())
    inputs = [x.clone().requires_grad_() for x in (a, b)]
    with torch.autocast("cpu", dtype):
        got = loss(*inputs)
    got.backward()
    assert got.dtype == torch.float32
    assert torch.equal(got.detach(), plain)
    grads = [x.grad for x in inputs if x.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_losses__large_scores_do_not_overflow() -> None:
    """exp(1 / .011) is more than float32 holds."""
    scores = torch.tensor([[1.0, -1.0], [1.0, 0.9], [-1.0, 1.0]])
    codes = sinkhorn(1e3 * scores, epsilon=0.03, iterations=3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(3))
    z = torch.eye(4)
    assert nt_xent(z, z, temperature=0.001).item() == pytest.approx(0, abs=1e-6)
    assert nt_xent(z, -z, temperature=0.001).item() == pytest.approx(1000 + math.log(6), rel=1e-6)
    assert swav_loss([1e3 * scores] * 2, temperature=0.01, epsilon=0.03, iterations=3).isfinite()
