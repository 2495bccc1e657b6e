# SPDX-License-Identifier: Apache-2.0
"""BYOL: what the paper says of the target, the predictor and the loss, observed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain.methods.byol import BYOL
from pretrain.nets.ema import cosine_momentum, ema_update
from tests.engine.toy import train
from tests.ssl.small import DIM, WIDTH, Views, as_float, backbone, head


def byol(**changes: Any) -> BYOL:
    parts: dict[str, Any] = {"backbone": backbone(), "projector": head(WIDTH), "predictor": head(DIM, seed=2)}
    return BYOL(**{**parts, "augment": (as_float, as_float), "momentum": 0.9, **changes})


VIEWS = Views((6, 6))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.97), (500, 0.985), (1000, 1.0)])
def test_byol_momentum__rises_from_its_base_to_one(step: int, expected: float) -> None:
    assert cosine_momentum(step, 1000, base=0.97) == pytest.approx(expected, abs=1e-12)


def test_byol_momentum__is_the_papers_formula() -> None:
    for step in (1, 77, 640):
        formula = 1 - (1 - 0.99) * (math.cos(math.pi * step / 1000) + 1) / 2
        assert cosine_momentum(step, 1000, base=0.99) == formula


def test_byol_loss__is_the_sum_of_both_directions_against_the_target_of_the_other_view() -> None:
    task = byol()
    for p in task.target_projector.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # away from the online network, or a mistaken branch would not show
    a, b = (as_float(view) for view in VIEWS.batch()["views"])
    p_a, p_b = (task.predictor(task.projector(task.backbone(v))) for v in (a, b))
    t_a, t_b = (task.target_projector(task.target_backbone(v)) for v in (a, b))
    expected = sum(  # of the squared distance, not of the cosine
        (F.normalize(p.double(), dim=1) - F.normalize(t.double(), dim=1)).square().sum(1).mean()
        for p, t in ((p_a, t_b), (p_b, t_a))
    )
    assert byol_loss(task).item() == pytest.approx(expected.item(), abs=1e-5)


def byol_loss(task: BYOL) -> torch.Tensor:
    return task(VIEWS.batch())[0]


def test_byol__no_gradient_reaches_the_target_and_all_of_the_online_network_gets_some() -> None:
    task = byol()
    byol_loss(task).backward()
    for name, p in task.named_parameters():
        assert (p.grad is None) == name.startswith("target_"), name
        assert name.startswith("target_") or float(p.grad.abs().sum()) > 0, name  # type: ignore[union-attr]


def test_byol__the_target_moves_after_the_step_by_the_schedule_and_keeps_its_buffers() -> None:
    task = byol()
    byol_loss(task)
    before = copy.deepcopy(task.state_dict())
    for p in task.backbone.parameters():
        p.data.add_(1.0)
    for buffer in task.backbone.buffers():
        buffer.fill_(7)
    task.after_step(25, 100)
    keep = cosine_momentum(25, 100, base=0.9)
    for name, p in task.target_backbone.named_parameters():
        old = before[f"target_backbone.{name}"]
        torch.testing.assert_close(p, keep * old + (1 - keep) * task.backbone.get_parameter(name))
    for name, buffer in task.target_backbone.named_buffers():
        assert torch.equal(buffer, before[f"target_backbone.{name}"]), name


def test_target__momentum_is_one_at_the_last_step() -> None:
    task = byol()
    before = copy.deepcopy(task.target_projector.state_dict())
    for p in task.projector.parameters():
        p.data.add_(1.0)
    ema_update(task.target_projector, task.projector, momentum=cosine_momentum(100, 100, base=0.9))
    for name, value in task.target_projector.state_dict().items():
        assert torch.equal(value, before[name])


def test_byol__accumulation_moves_the_target_once_per_optimiser_step(tmp_path: Path) -> None:
    calls = []

    class Counting(BYOL):
        def after_step(self, step: int, total: int) -> None:
            calls.append((step, total))
            super().after_step(step, total)

    task = Counting(
        backbone=backbone(), projector=head(WIDTH), predictor=head(DIM), augment=(as_float, as_float), momentum=0.9
    )
    train(task, tmp_path, VIEWS, steps=3, batch_size=8, accumulate=2)
    assert calls == [(0, 3), (1, 3), (2, 3)]


def test_byol__three_views_are_refused() -> None:
    with pytest.raises(ValueError, match="two views"):
        byol(augment=(as_float,) * 3)
