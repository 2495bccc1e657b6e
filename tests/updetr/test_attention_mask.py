# SPDX-License-Identifier: Apache-2.0
"""Groups of queries, and which queries may attend to which."""

from __future__ import annotations

import pytest
import torch

from ovd.modeling.detr.attention_mask import denoising_attention_mask, group_attention_mask, query_groups


@pytest.mark.parametrize(("queries", "groups"), [(100, 10), (100, 20), (24, 6), (32, 8), (50, 7), (5, 5), (9, 1)])
def test_groups__any_number_of_patches_and_queries(queries: int, groups: int) -> None:
    group = query_groups(queries, groups)
    sizes = group.bincount()
    assert len(sizes) == groups and int(sizes.max() - sizes.min()) <= 1
    assert group.tolist() == sorted(group.tolist())
    if queries % groups == 0:  # 1, 1, 1, 2, 2, 2, …, which torch.repeat would not give
        assert torch.equal(group, torch.arange(groups).repeat_interleave(queries // groups))
    mask = group_attention_mask(group)
    assert not mask.all(dim=1).any()  # a query that sees nothing is NaN
    weights = torch.zeros(queries, queries).masked_fill(mask, float("-inf")).softmax(-1)
    assert torch.isfinite(weights).all()


def test_groups__fewer_queries_than_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many"):
        query_groups(3, 4)


def test_denoising_mask__each_pair_of_queries() -> None:
    dn_group, counts, heads = (
        torch.tensor([0, 0, 1, 1]),
        [2, 1],
        3,
    )  # two groups; the second image pads its second query
    among = group_attention_mask(torch.tensor([0, 1]))
    mask = denoising_attention_mask(dn_group, queries=2, query_mask_QQ=among, counts=counts, heads=heads)
    assert mask.shape == (2 * heads, 6, 6)
    for row in range(2 * heads):
        count = counts[row // heads]
        for query in range(6):
            for key in range(6):
                if key < 4:
                    hidden = query >= 4 or query // 2 != key // 2 or key % 2 >= count
                else:
                    hidden = query >= 4 and query != key
                assert bool(mask[row, query, key]) == hidden, (row, query, key)


def test_denoising_mask__is_one_for_all_where_no_image_is_padded() -> None:
    mask = denoising_attention_mask(torch.tensor([0, 1]), queries=3, query_mask_QQ=None, counts=[1, 1], heads=2)
    assert mask.shape == (5, 5) and not mask[2:, 2:].any() and bool(mask[2:, :2].all())
