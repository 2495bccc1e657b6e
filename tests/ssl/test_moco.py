# SPDX-License-Identifier: Apache-2.0
"""MoCo: queue, momentum encoder, and what batch norm may see, observed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import UserError
from pretrain.methods.moco import MoCo, SplitBatchNorm2d, split_batch_norm
from tests.engine.toy import train
from tests.ssl.small import DIM, WIDTH, Views, as_float, backbone

VIEWS = Views((6, 6))
BATCH = 8


def moco(*, splits: int = 1, **changes: Any) -> MoCo:
    encoder = split_batch_norm(backbone(), splits)
    torch.manual_seed(1)
    parts: dict[str, Any] = {"backbone": encoder, "projector": nn.Linear(WIDTH, DIM), "dim": DIM, "queue": 20}
    return MoCo(**{**parts, "augment": (as_float, as_float), "momentum": 0.9, **changes})


def seen_keys(task: MoCo) -> list[Tensor]:
    """Unit keys of every forward from now on, in the order of the batch."""
    found: list[Tensor] = []
    real = task._keys

    def spy(view: Tensor) -> Tensor:
        found.append(real(view))
        return found[-1]

    task._keys = spy  # type: ignore[method-assign]
    return found


def test_moco_queue__begins_with_unit_rows_and_is_in_every_checkpoint() -> None:
    task = moco()
    torch.testing.assert_close(task.queue.norm(dim=1), torch.ones(20))
    assert {"queue", "queue_pointer"} <= task.state_dict().keys()


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_queue__is_the_newest_keys_in_order_and_wraps(symmetric: bool) -> None:
    """20 is not a multiple of 8: the third batch is written over the end and the beginning."""
    task = moco(symmetric=symmetric)
    keys = seen_keys(task)
    expected = task.queue.clone()
    written = 0
    for step in range(6):
        task(VIEWS.batch(first=BATCH * step))
        new = torch.cat(keys[-2:] if symmetric else keys[-1:])
        for row in new:  # one by one, as a ring buffer is defined
            expected[written % 20] = row
            written += 1
        torch.testing.assert_close(task.queue, expected, rtol=0, atol=0)
        assert int(task.queue_pointer) == written % 20


def test_moco_queue__keys_enter_after_the_loss_so_no_key_is_its_own_negative() -> None:
    task = moco(momentum=1.0, temperature=0.5)
    queue = task.queue.clone()
    keys = seen_keys(task)
    loss, _ = task(VIEWS.batch())
    a = as_float(VIEWS.batch()["views"][0])
    q = F.normalize(task.projector(task.backbone(a)), dim=1)
    logits = torch.cat([(q * keys[0]).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.5
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long)).item(), abs=1e-5)
    loss.backward()  # the queue has changed in place meanwhile


def test_moco_queue__evaluation_changes_neither_it_nor_its_pointer() -> None:
    task = moco().eval()
    before = copy.deepcopy(task.state_dict())
    task(VIEWS.batch())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_momentum_encoder__updates_before_keys_and_keeps_buffers() -> None:
    task = moco()
    task(VIEWS.batch())
    before = copy.deepcopy(task.state_dict())
    for p in task.backbone.parameters():
        p.data.add_(1.0)  # the optimiser's step
    for buffer in task.backbone.buffers():
        buffer.fill_(7)
    task.after_step(0, 10)
    used: list[Tensor] = []
    task.key_backbone[0].register_forward_pre_hook(lambda module, _: used.append(module.weight.clone()))  # type: ignore[index, operator]
    for name, buffer in task.key_backbone.named_buffers():
        assert torch.equal(buffer, before[f"key_backbone.{name}"]), name
    for name, p in task.key_backbone.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[f"key_backbone.{name}"] + 0.1 * task.backbone.get_parameter(name))
    task(VIEWS.batch())
    expected = 0.9 * before["key_backbone.0.weight"] + 0.1 * task.backbone.get_parameter("0.weight")
    torch.testing.assert_close(used[0], expected)


def test_moco__the_momentum_encoder_moves_once_per_optimiser_step(tmp_path: Path) -> None:
    moved = []

    class Counting(MoCo):
        def after_step(self, step: int, total: int) -> None:
            old = self.key_projector.weight.clone()  # type: ignore[operator, union-attr]
            super().after_step(step, total)
            moved.append((step, not torch.equal(old, self.key_projector.weight)))  # type: ignore[arg-type]

    task = Counting(
        backbone=backbone(), projector=nn.Linear(WIDTH, DIM), augment=(as_float, as_float), dim=DIM, queue=20,
        momentum=0.5,
    )  # fmt: skip
    weights = []
    task.key_backbone.register_forward_pre_hook(lambda *_: weights.append(task.key_projector.weight.clone()))  # type: ignore[union-attr, operator]
    train(task, tmp_path, VIEWS, steps=3, batch_size=8, accumulate=2, name="sgd")
    assert moved == [(0, True), (1, True), (2, True)]
    assert len(weights) == 6
    for first, second in zip(weights[::2], weights[1::2], strict=True):  # the passes of one step
        assert torch.equal(first, second)
    assert not torch.equal(weights[1], weights[2])


def test_moco__no_gradient_reaches_keys_and_all_of_the_query_encoder_gets_some() -> None:
    task = moco()
    task(VIEWS.batch())[0].backward()
    for name, p in task.named_parameters():
        assert (p.grad is None) == name.startswith("key_"), name
        assert name.startswith("key_") or float(p.grad.abs().sum()) > 0, name  # type: ignore[union-attr]


def test_split_batch_norm__is_batch_norm_of_each_group_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4) * torch.arange(1, 9).view(8, 1, 1, 1)
    split = split_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 4)
    layers = [nn.BatchNorm2d(3) for _ in range(4)]
    expected = torch.cat([layer(part) for layer, part in zip(layers, x.chunk(4), strict=True)])
    torch.testing.assert_close(split(x), expected)
    torch.testing.assert_close(split[0].running_var, torch.stack([layer.running_var for layer in layers]).mean(0))
    torch.testing.assert_close(split[0].running_mean, torch.stack([layer.running_mean for layer in layers]).mean(0))
    assert not torch.allclose(expected, nn.BatchNorm2d(3)(x))
    whole = nn.BatchNorm2d(3)
    whole.load_state_dict(split[0].state_dict())
    torch.testing.assert_close(split.eval()(x), whole.eval()(x))


def test_split_batch_norm__a_batch_that_does_not_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 equal groups"):
        split_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 3)(torch.zeros(8, 3, 4, 4))


def test_split_batch_norm__queries_and_their_keys_are_in_different_groups() -> None:
    """The permutation changes the keys' statistics, and is undone: each key is still that of its picture."""
    task = moco(splits=4)
    assert isinstance(task.key_backbone[1], SplitBatchNorm2d)  # type: ignore[index]
    inputs: list[Tensor] = []
    task.key_backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))  # type: ignore[union-attr, operator]
    view = as_float(VIEWS.batch()["views"][1])
    torch.manual_seed(3)
    keys = task._keys(view)
    torch.manual_seed(3)
    order = torch.randperm(BATCH)
    assert not torch.equal(order, torch.arange(BATCH))
    assert torch.equal(inputs[0], view[order])
    straight = F.normalize(task.key_projector(task.key_backbone(view)), dim=1)  # type: ignore[operator]
    assert not torch.allclose(keys, straight, atol=1e-3)  # other groups, other statistics
    shuffled = F.normalize(task.key_projector(task.key_backbone(view[order])), dim=1)  # type: ignore[operator]
    torch.testing.assert_close(keys[order], shuffled)


def test_shuffle__keys_return_to_their_pictures() -> None:
    task = moco(splits=4).eval()  # no batch statistics: a key depends on its own picture alone
    view = as_float(VIEWS.batch()["views"][1])
    expected = F.normalize(task.key_projector(task.key_backbone(view)), dim=1)  # type: ignore[operator]
    torch.testing.assert_close(task._keys(view), expected)


def test_moco__decay_is_on_all_trained_parameters_as_in_the_authors_code() -> None:
    task = moco()
    (group,) = task.param_groups(OptimConfig(weight_decay=1e-4))
    names = {name for name, p in task.named_parameters() if any(p is q for q in group["params"])}
    assert names == {name for name, _ in task.named_parameters() if not name.startswith("key_")}
    assert group["weight_decay"] == 1e-4


def test_split_batch_norm__one_that_cannot_be_split_is_refused() -> None:
    from timm.layers import BatchNormAct2d

    with pytest.raises(UserError, match="BatchNormAct2d cannot be split"):
        split_batch_norm(nn.Sequential(BatchNormAct2d(4)), 2)
    split_batch_norm(split_batch_norm(nn.Sequential(nn.BatchNorm2d(4)), 2), 2)
