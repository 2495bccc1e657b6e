# SPDX-License-Identifier: Apache-2.0
"""Boxes, costs, and the assignment."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from ovd.modeling.boxes import box_iou_and_giou
from ovd.modeling.detr.attention_mask import query_groups
from ovd.modeling.detr.matcher import box_cost, class_cost, hungarian_match, object_cost


def boxes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4) * 0.4 + 0.1


def test_box_iou_and_giou__are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    a, b = box_convert(boxes(7), "cxcywh", "xyxy"), box_convert(boxes(5), "cxcywh", "xyxy")
    torch.testing.assert_close(box_iou_and_giou(a[:, None], b[None])[1], generalized_box_iou(a, b))
    torch.testing.assert_close(box_convert(box_convert(a, "xyxy", "cxcywh"), "cxcywh", "xyxy"), a)


def test_box_iou_and_giou__of_empty_boxes_are_finite_and_have_finite_gradients() -> None:
    point = torch.full((1, 4), 0.5, requires_grad=True)
    iou, generalised = box_iou_and_giou(point, torch.full((1, 4), 0.5))
    (iou.sum() + generalised.sum()).backward()
    assert torch.isfinite(iou).all() and torch.isfinite(generalised).all()
    assert point.grad is not None and torch.isfinite(point.grad).all()


def test_box_cost__is_the_weighted_sum_of_l1_and_giou() -> None:
    torch.manual_seed(0)
    out, want = boxes(2, 3, 4), boxes(3, 5)
    cost = box_cost(out, want, l1=5.0, giou=2.0)
    expected = 5 * (out[1, 2, 3] - want[2, 4]).abs().sum() - 2 * generalized_box_iou(
        box_convert(out[1, 2, 3], "cxcywh", "xyxy")[None], box_convert(want[2, 4], "cxcywh", "xyxy")[None]
    )
    torch.testing.assert_close(cost[1, 2, 3, 4], expected[0, 0])


def test_object_cost__prefers_certain_queries_in_both_kinds() -> None:
    logits = torch.tensor([[[-2.0, 0.0, 3.0]]])
    for kind in ("focal", "weighted"):
        cost = object_cost(logits, kind=kind)[0, 0, :, 0]
        assert cost[0] > cost[1] > cost[2]


def test_class_cost__is_minus_the_probability_of_the_targets_class() -> None:
    logits, labels = torch.randn(2, 1, 3, 4), torch.tensor([[2, 0]])
    cost = class_cost(logits, labels)
    for query in range(3):
        for target, label in enumerate((2, 0)):
            share = logits[1, 0, query, label].exp() / logits[1, 0, query].exp().sum()
            torch.testing.assert_close(cost[1, 0, query, target], -share)


def test_match__is_the_cheapest_of_all_assignments() -> None:
    torch.manual_seed(0)
    cost = torch.randn(2, 3, 5, 4)
    counts = [3, 0, 4]
    pairs = hungarian_match(cost, counts)
    for layer in range(2):
        for image, count in enumerate(counts):
            here = (pairs.layer == layer) & (pairs.image == image)
            assert pairs.target[here].tolist() == list(range(count))
            total = cost[layer, image][pairs.query[here], pairs.target[here]].sum()
            best = min(
                sum(float(cost[layer, image, q, t]) for t, q in enumerate(chosen))
                for chosen in permutations(range(5), count)
            )
            assert float(total) == pytest.approx(best, abs=1e-5)


def test_match__moves_costs_to_the_cpu_once_for_all_layers_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.Tensor.cpu

    def counting(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(self.shape)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    hungarian_match(
        torch.randn(6, 4, 10, 3),
        [3, 1, 2, 3],
        query_group_Q=query_groups(10, 3),
        target_group_NT=torch.tensor([[0, 1, 2]] * 4),
    )
    assert len(calls) == 1


def test_match__more_targets_than_queries_and_costs_that_are_not_finite() -> None:
    pairs = hungarian_match(torch.full((1, 1, 2, 5), float("nan")), [5])
    assert len(pairs.query) == 2 and len(set(pairs.query.tolist())) == 2
    assert len(hungarian_match(torch.zeros(2, 2, 3, 1), [0, 0]).query) == 0


def test_match__stays_within_the_group_whatever_it_costs() -> None:
    torch.manual_seed(0)
    group = query_groups(11, 4)
    target_group = torch.tensor([[0, 1, 1, 3], [2, 2, 0, 0]])
    cost = torch.randn(2, 2, 11, 4)
    pairs = hungarian_match(cost, [4, 2], query_group_Q=group, target_group_NT=target_group)
    assert len(pairs.query) == 2 * (4 + 2)
    assert torch.equal(group[pairs.query], target_group[pairs.image, pairs.target])
    for layer in range(2):  # one target of a group: its cheapest query
        here = (pairs.layer == layer) & (pairs.image == 0) & (pairs.target == 3)
        inside = (group == 3).nonzero()[:, 0]
        assert int(pairs.query[here]) == int(inside[cost[layer, 0, inside, 3].argmin()])
    free = hungarian_match(cost, [4, 2])
    assert not torch.equal(group[free.query], target_group[free.image, free.target])
