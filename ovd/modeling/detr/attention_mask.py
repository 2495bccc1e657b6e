# SPDX-License-Identifier: Apache-2.0
"""Self-attention masks between queries: groups (UP-DETR, OV-DETR), and denoising queries beside the free ones.

Masks are bool, True where attention is forbidden. Shapes: ``N`` images, ``P`` denoising queries, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def query_groups(queries: int, groups: int) -> Tensor:
    """(Q,) group of each query: contiguous, in order, sizes differing by at most one.

    Where ``groups`` divides ``queries`` this is ``repeat_interleave``, as in UP-DETR (arXiv 2011.09094 §3.2).

    Raises:
        ValueError: fewer queries than groups.
    """
    if not 1 <= groups <= queries:
        raise ValueError(f"{groups} groups need at least as many queries, not {queries}")
    return torch.arange(queries) * groups // queries


def group_attention_mask(group_Q: Tensor) -> Tensor:
    """(Q, Q): queries of different groups do not attend to each other (UP-DETR's attention mask)."""
    return group_Q[:, None] != group_Q[None, :]


def denoising_attention_mask(
    dn_group_P: Tensor,
    *,
    queries: int,
    query_mask_QQ: Tensor | None,
    counts: Sequence[int],
    heads: int,
) -> Tensor:
    """The mask of denoising queries placed before the free ones (DN-DETR, arXiv 2203.01305 §4.3).

    Denoising queries attend to their own group and to the free queries; free queries must not see denoising ones, which
    carry the answers. Padded denoising queries are masked, so outputs do not depend on batch-mates.

    Args:
        dn_group_P: group of each denoising query; each group has ``max(counts)`` of them, one per target.
        queries: Q.
        query_mask_QQ: mask among the free queries, or None.
        counts: targets of each image.
        heads: attention heads.

    Returns:
        (P + Q, P + Q), or (N · heads, P + Q, P + Q) where images have different numbers of targets.
    """
    size, most_targets = len(dn_group_P), max(counts)
    group = torch.cat([dn_group_P, dn_group_P.new_full((queries,), -1)])
    mask = (group[:, None] != group[None]) & (group[None] >= 0)
    if query_mask_QQ is not None:
        mask[size:, size:] = query_mask_QQ
    if min(counts) < most_targets:
        target = torch.arange(size, device=mask.device) % most_targets
        padded = target >= torch.tensor(counts, device=mask.device)[:, None]
        mask = (mask | F.pad(padded, (0, queries))[:, None]).repeat_interleave(heads, 0)
    return mask
