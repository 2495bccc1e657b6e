# SPDX-License-Identifier: Apache-2.0
"""SwAV: prototypes, codes, queue and crops, observed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.engine.checkpoint import load_state, newest
from pretrain.losses import sinkhorn
from pretrain.methods import swav as module
from pretrain.methods.swav import SwAV
from tests.engine.toy import train
from tests.ssl.small import DIM, WIDTH, Views, as_float, backbone, head

CROPS = (8, 8, 4, 4, 4)
VIEWS = Views(CROPS)
K = 5


def swav(**changes: Any) -> SwAV:
    torch.manual_seed(3)
    parts: dict[str, Any] = {"backbone": backbone(), "projector": head(WIDTH), "augment": (as_float,) * len(CROPS)}
    return SwAV(**{**parts, "dim": DIM, "prototypes": K, **changes})


def steps(task: SwAV, count: int, *, first: int = 0, total: int = 100) -> list[float]:
    """Plain SGD with momentum, as the loop does it."""
    optimizer = torch.optim.SGD(task.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    losses = []
    for step in range(first, first + count):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = task(VIEWS.batch(first=8 * step))
        loss.backward()
        task.after_backward(step)
        optimizer.step()
        task.after_step(step, total)
        losses.append(loss.item())
    assert math.isfinite(sum(losses))
    return losses


def test_prototypes__are_unit_vectors_in_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    task = swav()
    task.projector.register_forward_hook(lambda *_: seen.append(task.prototypes.detach().norm(dim=1)))
    steps(task, 4)
    assert len(seen) == 4
    torch.testing.assert_close(torch.stack(seen), torch.ones(4, K))


def test_prototypes__frozen_ones_stay_the_same_bits_and_leave_no_optimiser_state(tmp_path: Path) -> None:
    task = swav(freeze_steps=3)
    before = task.prototypes.detach().clone()
    options: dict[str, Any] = {"batch_size": 8, "name": "sgd", "lr": 0.5, "weight_decay": 0.01, "save_every": 100}
    train(task, tmp_path / "frozen", VIEWS, steps=3, **options)
    assert torch.equal(task.prototypes, before)
    trained = sum(1 for _ in task.parameters())
    assert momenta(tmp_path / "frozen") == trained - 1
    assert task.backbone[0].weight.grad is not None  # type: ignore[union-attr,index]

    task = swav(freeze_steps=3)
    train(task, tmp_path / "thawed", VIEWS, steps=4, **options)
    assert not torch.equal(task.prototypes, before)
    assert momenta(tmp_path / "thawed") == trained


def momenta(run: Path) -> int:
    found = newest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    return sum(one.get("momentum_buffer") is not None for one in load_state(found)[1]["optimizer"]["state"].values())


def test_frozen_prototypes__backbone_gets_gradient() -> None:
    task = swav(freeze_steps=10)
    before = copy.deepcopy(task.backbone.state_dict())
    steps(task, 1)
    assert not torch.equal(task.backbone.state_dict()["0.weight"], before["0.weight"])


def test_codes__come_from_the_big_crops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Tensor] = []

    def spy(scores: Tensor, **options: Any) -> Tensor:
        scored.append(scores.detach().clone())
        return sinkhorn(scores, **options)

    monkeypatch.setattr("pretrain.losses.sinkhorn", spy)
    task = swav()
    task(VIEWS.batch())
    assert len(scored) == 2
    big = torch.cat([as_float(view) for view in VIEWS.batch()["views"][:2]])
    task.load_state_dict(swav().state_dict())
    crops = [as_float(view) for view in VIEWS.batch()["views"]]
    z = task.projector(torch.cat([task.backbone(big), task.backbone(torch.cat(crops[2:]))]))
    expected = nn.functional.normalize(z, dim=1) @ task.prototypes.T
    torch.testing.assert_close(torch.cat(scored), expected[: len(big)].detach())


def test_multi_crop__one_forward_of_the_backbone_per_resolution_and_one_of_the_head() -> None:
    task, passes, heads = swav(), [], []
    task.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    task.projector.register_forward_pre_hook(lambda _, inputs: heads.append(tuple(inputs[0].shape)))
    task(VIEWS.batch())
    assert passes == [(16, 3, 8, 8), (24, 3, 4, 4)]
    assert heads == [(40, WIDTH)]


def test_codes__get_no_gradient() -> None:
    """With codes that are constants, the gradient is the same bit for bit."""
    codes: list[Tensor] = []

    def recorded(scores: Tensor, **options: Any) -> Tensor:
        codes.append(sinkhorn(scores, **options))
        return codes[-1]

    def constant(scores: Tensor, **options: Any) -> Tensor:
        return codes.pop(0).clone()

    found = []
    for function in (recorded, constant):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pretrain.losses.sinkhorn", function)
            task = swav()
            task(VIEWS.batch())[0].backward()
        assert not any(code.requires_grad for code in codes)
        found.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]))
    assert torch.equal(*found)


def test_swav_loss__is_stuck_at_ln_k_when_all_prototypes_are_alike() -> None:
    task = swav()
    with torch.no_grad():
        task.prototypes.copy_(task.prototypes[:1].expand(K, DIM))
    assert task(VIEWS.batch())[0].item() == pytest.approx(math.log(K), abs=1e-5)


def test_swav_queue__fills_from_its_start_and_is_used_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    real = module.swav_loss

    def spy(scores: Any, *, queue_scores: Any, **options: Any) -> Tensor:
        used.append(queue_scores is not None)
        return real(scores, queue_scores=queue_scores, **options)

    monkeypatch.setattr(module, "swav_loss", spy)
    task = swav(queue_length=20, queue_start=2)
    filled = []
    for step in range(7):
        steps(task, 1, first=step)
        filled.append(int(task.queue_filled))
    assert filled == [0, 0, 8, 16, 20, 20, 20]
    assert used == [False] * 5 + [True] * 2


def test_swav_queue__holds_the_newest_unit_embeddings_per_big_crop_and_wraps() -> None:
    task, seen = swav(queue_length=20), []
    task.projector.register_forward_hook(lambda *args: seen.append(nn.functional.normalize(args[2].detach(), dim=1)))
    steps(task, 4)
    for crop in range(2):
        rows = torch.cat([z[8 * crop : 8 * crop + 8] for z in seen])[-20:]
        expected = {tuple(row.tolist()) for row in rows}
        assert {tuple(row.tolist()) for row in task.queue[crop]} == expected and len(expected) == 20
    assert int(task.queue_pointer) == 32 % 20


def test_swav_queue__a_batch_longer_than_it_leaves_its_end() -> None:
    task, seen = swav(queue_length=3), []
    task.projector.register_forward_hook(lambda *args: seen.append(nn.functional.normalize(args[2].detach(), dim=1)))
    steps(task, 1)
    torch.testing.assert_close(task.queue[0], seen[0][5:8])


def test_swav_queue__is_scored_with_the_current_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = module.swav_loss
    monkeypatch.setattr(
        module, "swav_loss", lambda scores, **o: given.append(o["queue_scores"]) or real(scores, **o)
    )  # fmt: skip
    task = swav(queue_length=8)
    steps(task, 1)
    queue, prototypes = task.queue.clone(), task.prototypes.detach().clone()
    steps(task, 1, first=1)
    torch.testing.assert_close(torch.stack(given[1]), queue @ prototypes.T)


def test_multi_crop__one_big_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="two big crops"):
        swav(big_crops=1)


def test_param_groups__all_of_swav_is_one_group_with_decay_as_in_the_reference() -> None:
    from pretrain.engine.config import OptimConfig

    task = swav()
    (group,) = task.param_groups(OptimConfig(weight_decay=1e-6))
    assert len(group["params"]) == sum(1 for _ in task.parameters()) and group["weight_decay"] == 1e-6
    assert not group.get("lars_exclude", False)
