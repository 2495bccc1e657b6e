# SPDX-License-Identifier: Apache-2.0
"""Costs, the assignment, and groups of queries."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torchvision.ops import generalized_box_iou

from ovd.modeling.detr.matcher import (
    box_cost,
    group_mask,
    groups_of,
    match,
    object_cost,
    overlaps,
    to_centres,
    to_corners,
)


def boxes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4) * 0.4 + 0.1


def test_overlaps__are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    a, b = to_corners(boxes(7)), to_corners(boxes(5))
    torch.testing.assert_close(overlaps(a[:, None], b[None])[1], generalized_box_iou(a, b))
    torch.testing.assert_close(to_corners(to_centres(a)), a)


def test_overlaps__of_empty_boxes_are_finite_and_have_finite_gradients() -> None:
    point = torch.full((1, 4), 0.5, requires_grad=True)
    iou, generalised = overlaps(point, torch.full((1, 4), 0.5))
    (iou.sum() + generalised.sum()).backward()
    assert torch.isfinite(iou).all() and torch.isfinite(generalised).all()
    assert point.grad is not None and torch.isfinite(point.grad).all()


def test_box_cost__is_the_weighted_sum_of_l1_and_giou() -> None:
    torch.manual_seed(0)
    out, want = boxes(2, 3, 4), boxes(3, 5)
    cost = box_cost(out, want, l1=5.0, giou=2.0)
    expected = 5 * (out[1, 2, 3] - want[2, 4]).abs().sum() - 2 * generalized_box_iou(
        to_corners(out[1, 2, 3])[None], to_corners(want[2, 4])[None]
    )
    torch.testing.assert_close(cost[1, 2, 3, 4], expected[0, 0])


def test_object_cost__prefers_certain_queries_in_both_kinds() -> None:
    logits = torch.tensor([[[-2.0, 0.0, 3.0]]])
    for kind in ("focal", "weighted"):
        cost = object_cost(logits, kind=kind)[0, 0, :, 0]
        assert cost[0] > cost[1] > cost[2]


def test_match__is_the_cheapest_of_all_assignments() -> None:
    torch.manual_seed(0)
    cost = torch.randn(2, 3, 5, 4)
    counts = [3, 0, 4]
    found = match(cost, counts)
    for layer in range(2):
        for image, count in enumerate(counts):
            own = (found.layer == layer) & (found.image == image)
            assert found.target[own].tolist() == list(range(count))
            total = cost[layer, image][found.query[own], found.target[own]].sum()
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
    match(
        torch.randn(6, 4, 10, 3),
        [3, 1, 2, 3],
        query_group_Q=groups_of(10, 3),
        target_group_NT=torch.tensor([[0, 1, 2]] * 4),
    )
    assert len(calls) == 1


def test_match__more_targets_than_queries_and_costs_that_are_not_finite() -> None:
    found = match(torch.full((1, 1, 2, 5), float("nan")), [5])
    assert len(found.query) == 2 and len(set(found.query.tolist())) == 2
    assert len(match(torch.zeros(2, 2, 3, 1), [0, 0]).query) == 0


@pytest.mark.parametrize(("queries", "groups"), [(100, 10), (100, 20), (24, 6), (32, 8), (50, 7), (5, 5), (9, 1)])
def test_groups__any_number_of_patches_and_queries(queries: int, groups: int) -> None:
    group = groups_of(queries, groups)
    sizes = group.bincount()
    assert len(sizes) == groups and int(sizes.max() - sizes.min()) <= 1
    assert group.tolist() == sorted(group.tolist())
    if queries % groups == 0:  # 1, 1, 1, 2, 2, 2, …, which torch.repeat would not give
        assert torch.equal(group, torch.arange(groups).repeat_interleave(queries // groups))
    mask = group_mask(group)
    assert not mask.all(dim=1).any()  # a query that sees nothing is NaN
    weights = torch.zeros(queries, queries).masked_fill(mask, float("-inf")).softmax(-1)
    assert torch.isfinite(weights).all()


def test_groups__fewer_queries_than_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many"):
        groups_of(3, 4)


def test_match__stays_within_the_group_whatever_it_costs() -> None:
    torch.manual_seed(0)
    group = groups_of(11, 4)
    target_group = torch.tensor([[0, 1, 1, 3], [2, 2, 0, 0]])
    cost = torch.randn(2, 2, 11, 4)
    found = match(cost, [4, 2], query_group_Q=group, target_group_NT=target_group)
    assert len(found.query) == 2 * (4 + 2)
    assert torch.equal(group[found.query], target_group[found.image, found.target])
    for layer in range(2):  # one target of a group: its cheapest query
        own = (found.layer == layer) & (found.image == 0) & (found.target == 3)
        inside = (group == 3).nonzero()[:, 0]
        assert int(found.query[own]) == int(inside[cost[layer, 0, inside, 3].argmin()])
    free = match(cost, [4, 2])
    assert not torch.equal(group[free.query], target_group[free.image, free.target])
