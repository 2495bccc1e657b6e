# SPDX-License-Identifier: Apache-2.0
"""Optimisers against their published update rules, and the schedule against its closed form."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import UserError
from pretrain.engine.optim import (
    LARS,
    ParamGroup,
    build_optimizer,
    clip_gradients,
    default_groups,
    gradient_norm,
    lr_at,
    set_lr,
)
from pretrain.engine.task import Task


def lars_reference(
    p: np.ndarray, grads: list[np.ndarray], lrs: list[float], *, wd: float, excluded: bool
) -> np.ndarray:
    """The update of the BYOL and Barlow Twins references, in numpy."""
    mu = np.zeros_like(p)
    for grad, lr in zip(grads, lrs, strict=True):
        g = grad if excluded else grad + wd * p
        if not excluded and np.linalg.norm(p) > 0 and np.linalg.norm(g) > 0:
            g = g * 0.001 * np.linalg.norm(p) / np.linalg.norm(g)
        mu = 0.9 * mu + g
        p = p - lr * mu
    return p


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("start", ["random", "zero"])
@pytest.mark.parametrize("wd", [0.0, 0.5])
def test_lars__equals_the_reference_with_a_changing_rate(excluded: bool, start: str, wd: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=(3, 4)) * (start == "random")
    grads, lrs = [rng.normal(size=(3, 4)) for _ in range(4)], [0.1, 0.5, 0.4, 0.05]
    param = nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = LARS([{"params": [param], "lars_exclude": excluded}], lr=1.0, weight_decay=wd)
    for grad, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        assert torch.equal(param.grad, torch.from_numpy(grad)), "the gradient itself must not change"
    expected = lars_reference(p, grads, lrs, wd=wd, excluded=excluded)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12)


def test_lars__without_decay_still_rescales() -> None:
    param = nn.Parameter(torch.full((4,), 2.0))
    param.grad = torch.full((4,), 1000.0)
    LARS([param], lr=1.0, weight_decay=0.0).step()
    np.testing.assert_allclose(param.detach().numpy(), 2.0 - 0.001 * 2.0, rtol=1e-6)


def test_lars__zero_gradient_gives_finite_weights() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    LARS([param], lr=1.0).step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_adamw__equals_its_formula() -> None:
    config = OptimConfig(name="adamw", lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    layer = nn.Linear(3, 2).double()
    params = {"weight": layer.weight, "bias": layer.bias}
    optimizer = build_optimizer(default_groups(layer.named_parameters(), weight_decay=config.weight_decay), config)
    values = {name: p.detach().numpy().copy() for name, p in params.items()}
    m: dict[str, Any] = dict.fromkeys(params, 0.0)
    v: dict[str, Any] = dict.fromkeys(params, 0.0)
    rng = np.random.default_rng(1)
    for t in range(1, 5):
        for name, p in params.items():
            grad = rng.normal(size=tuple(p.shape))
            p.grad = torch.from_numpy(grad)
            m[name] = 0.8 * m[name] + 0.2 * grad
            v[name] = 0.95 * v[name] + 0.05 * grad**2
            values[name] *= 1 - 0.01 * (0.1 if name == "weight" else 0.0)
            values[name] -= 0.01 * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-6)
        optimizer.step()
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().numpy(), values[name], rtol=1e-10)


def test_sgd__equals_its_formula() -> None:
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=0.01, momentum=0.9, schedule="constant", warmup_steps=3)
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = build_optimizer(default_groups(layer.named_parameters(), weight_decay=config.weight_decay), config)
    value, velocity, rng = layer.weight.detach().numpy().copy(), 0.0, np.random.default_rng(2)
    for step in range(5):
        grad = rng.normal(size=(2, 3))
        layer.weight.grad = torch.from_numpy(grad)
        set_lr(optimizer, step, config, total=5)
        optimizer.step()
        velocity = 0.9 * velocity + grad + 0.01 * value
        value = value - 0.1 * min(1, (step + 1) / 3) * velocity
    np.testing.assert_allclose(layer.weight.detach().numpy(), value, rtol=1e-12)


def test_default_groups__no_frozen_parameters_no_decay_on_vectors() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    decayed, plain = default_groups(net.named_parameters(), weight_decay=0.3)
    assert [p is net[0].weight for p in decayed["params"]] == [True]
    assert {id(p) for p in plain["params"]} == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert (decayed["lars_exclude"], plain["lars_exclude"]) == (False, True)


def test_optimizer__nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        build_optimizer(
            default_groups(nn.Linear(2, 2).requires_grad_(False).named_parameters(), weight_decay=0.0), OptimConfig()
        )


class Grouped(Task):
    """A task with groups of its own, as SimSiam (constant predictor) and Barlow Twins (scaled biases) need."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.predictor, self.bias = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        return [
            {"params": list(self.body.parameters()), "weight_decay": optim.weight_decay},
            {"params": list(self.predictor.parameters()), "constant_lr": True},
            {"params": list(self.bias.parameters()), "lr_scale": 0.25, "lars_exclude": True},
        ]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_groups__lr_scale_and_constant_lr(name: str) -> None:
    config = OptimConfig(name=name, lr=2.0, schedule="cosine", warmup_steps=4)
    optimizer = build_optimizer(Grouped().param_groups(config), config)
    for step in range(12):
        lr = set_lr(optimizer, step, config, total=12)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, 2.0, lr / 4]


def test_lr_at__cosine_with_warm_up() -> None:
    config = OptimConfig(lr=0.4, schedule="cosine", warmup_steps=4, final_lr_ratio=0.1)
    values = [lr_at(step, config, total=24) for step in range(25)]
    assert values[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert values[14] == pytest.approx((0.4 + 0.04) / 2)  # half way
    assert values[9] == pytest.approx(0.04 + 0.36 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[24] == pytest.approx(0.04)
    assert all(a >= b for a, b in itertools.pairwise(values[4:]))


def test_lr_at__step_drops_at_milestones() -> None:
    config = OptimConfig(lr=1.0, schedule="step", milestones=(3, 6), gamma=0.1, warmup_steps=1)
    assert [lr_at(step, config, total=8) for step in range(8)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_lr_at__constant_and_all_warm_up() -> None:
    config = OptimConfig(lr=1.0, schedule="constant")
    assert [lr_at(step, config, total=5) for step in range(5)] == [1.0] * 5
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=5)
    assert [lr_at(step, config, total=5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_clip_gradients__scales_to_the_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    grads = [torch.randn(p.shape) for p in net.parameters() if p.requires_grad]
    flat = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    for p, g in zip((p for p in net.parameters() if p.requires_grad), grads, strict=True):
        p.grad = g.clone()
    norm = gradient_norm(optimizer)
    assert float(norm) == pytest.approx(flat, rel=1e-6)
    clip_gradients(optimizer, norm=norm, max_norm=2 * flat)
    assert all(
        torch.equal(p.grad, g) for p, g in zip((p for p in net.parameters() if p.requires_grad), grads, strict=True)
    )
    clip_gradients(optimizer, norm=norm, max_norm=0.5)
    assert float(gradient_norm(optimizer)) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(net[0].weight.grad, grads[0] * 0.5 / flat)


def test_gradient_norm__without_gradients_is_0() -> None:
    assert float(gradient_norm(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))) == 0.0
