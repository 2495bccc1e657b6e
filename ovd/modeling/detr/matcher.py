# SPDX-License-Identifier: Apache-2.0
"""Which query explains which object: the minimum-cost matching of DETR (arXiv 2005.12872, §3.1), pure torch and scipy.

All layers and pictures of a step are matched together, so the costs travel to the CPU once. Queries may be grouped: a
target of group g is then matched among the queries of group g only (OV-DETR's way; UP-DETR's released code lets any
query explain any patch).

Shapes: ``L`` decoder layers, ``N`` images, ``Q`` queries, ``T`` targets (padded), boxes are (…, 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

FAR = 1e6  # stands for a cost that is not finite: the assignment goes on, the loss shows the fault


class Matches(NamedTuple):
    """K matches as four (K,) int64 columns, sorted by layer, image and target within each group."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(…, 4) centre x, centre y, width, height → x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(…, 4) x1, y1, x2, y2 → centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, generalised IoU) of corner boxes, broadcast over all but the last dimension; finite for empty boxes too."""
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    size_a, size_b = (a[..., 2:] - a[..., :2]).clamp(min=0), (b[..., 2:] - b[..., :2]).clamp(min=0)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - inner
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = inner / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def box_cost(boxes_LNQ4: Tensor, targets_NT4: Tensor, *, l1: float, giou: float) -> Tensor:
    """(L, N, Q, T): ``l1 · ‖a − b‖₁ − giou · GIoU(a, b)`` of centre boxes."""
    a, b = boxes_LNQ4[..., :, None, :].float(), targets_NT4[:, None].float()
    _, generalised = overlaps(to_corners(a), to_corners(b))
    return l1 * (a - b).abs().sum(-1) - giou * generalised


@torch.no_grad()
def object_cost(logits_LNQ: Tensor, *, kind: str) -> Tensor:
    """(L, N, Q, 1) cost of calling a query an object: ``−p`` (weighted, as DETR), or Deformable DETR's focal form."""
    p = logits_LNQ.float().sigmoid()
    if kind == "weighted":
        return -p[..., None]
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    return (positive - negative)[..., None]


@torch.no_grad()
def match(
    cost_LNQT: Tensor,
    counts: Sequence[int],
    *,
    query_group_Q: Tensor | None = None,
    target_group_NT: Tensor | None = None,
) -> Matches:
    """Match every layer and image on its own; there is one transfer to the CPU in all.

    Args:
        cost_LNQT: cost of each pair; columns from ``counts[n]`` on are padding.
        counts: targets of each image.
        query_group_Q, target_group_NT: int64 group numbers; both or neither.

    Returns:
        Matches on the device of the costs; ``min(Q, counts[n])`` per layer and image, or the same within each group.
    """
    layers, images = cost_LNQT.shape[:2]
    if len(counts) != images:
        raise ValueError(f"{len(counts)} counts for {images} images")
    if (query_group_Q is None) != (target_group_NT is None):
        raise ValueError("groups are needed of queries and of targets, or of neither")
    used = max(counts, default=0)
    device = cost_LNQT.device
    parts = [cost_LNQT[..., :used].float().nan_to_num(nan=FAR, posinf=FAR, neginf=-FAR).flatten()]
    if query_group_Q is not None and target_group_NT is not None:
        parts += [query_group_Q.flatten().float(), target_group_NT[:, :used].flatten().float()]
    everything = torch.cat(parts).cpu().numpy()  # the one transfer
    queries = cost_LNQT.shape[2]
    size = layers * images * queries * used
    cost = everything[:size].reshape(layers, images, queries, used)
    groups_Q = groups_NT = None
    if query_group_Q is not None:
        groups_Q = everything[size : size + queries].astype(int)
        groups_NT = everything[size + queries :].reshape(images, used).astype(int)
    columns: list[tuple[int, int, int, int]] = []
    for image, count in enumerate(counts):
        blocks = [(slice(None), range(count))]
        if groups_Q is not None and groups_NT is not None:
            own = groups_NT[image, :count]
            blocks = [
                ((groups_Q == g).nonzero()[0], (own == g).nonzero()[0].tolist()) for g in sorted(set(own.tolist()))
            ]
        for layer in range(layers):
            for rows, targets in blocks:
                block = cost[layer, image, rows][:, list(targets)]
                if block.shape[1] == 1 and len(block):
                    pairs = [(int(block[:, 0].argmin()), 0)]
                else:
                    pairs = list(zip(*(i.tolist() for i in linear_sum_assignment(block)), strict=True))
                for q, t in pairs:
                    query = q if isinstance(rows, slice) else int(rows[q])
                    columns.append((layer, image, query, int(targets[t])))
    columns.sort(key=lambda c: (c[0], c[1], c[3]))
    table = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).T.to(device)
    return Matches(*table.unbind(0))


def groups_of(queries: int, groups: int) -> Tensor:
    """(Q,) group of each query: contiguous, in order, sizes differing by at most one (``repeat_interleave``, any Q, M).

    Raises:
        ValueError: fewer queries than groups.
    """
    if not 1 <= groups <= queries:
        raise ValueError(f"{groups} groups need at least as many queries, not {queries}")
    return torch.arange(queries) * groups // queries


def group_mask(group_Q: Tensor) -> Tensor:
    """(Q, Q) bool, True where attention is forbidden: between queries of different groups."""
    return group_Q[:, None] != group_Q[None, :]
