# SPDX-License-Identifier: Apache-2.0
"""Hungarian matching of queries and targets (DETR, arXiv 2005.12872, eq. 1), and its costs. Pure torch and scipy.

All layers and images of a step are matched together, so the costs travel to the CPU once. Queries may be grouped: a
target of group g is then matched with a query of group g only (OV-DETR's way; UP-DETR's released code matches any query
with any patch).

Shapes: ``L`` decoder layers, ``N`` images, ``Q`` queries, ``T`` targets (padded), ``C`` classes; boxes are (…, 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from ovd.modeling.boxes import box_iou_and_giou

NOT_FINITE = 1e6  # replaces such a cost: the assignment succeeds, and the loss shows the fault


class QueryAssignment(NamedTuple):
    """K matched pairs as four (K,) int64 columns, sorted by layer, image and target within each group."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def box_cost(boxes_LNQ4: Tensor, targets_NT4: Tensor, *, l1: float, giou: float) -> Tensor:
    """(L, N, Q, T): ``l1 · ‖a − b‖₁ − giou · GIoU(a, b)`` of cxcywh boxes."""
    a, b = boxes_LNQ4[..., :, None, :].float(), targets_NT4[:, None].float()
    _, generalised_iou = box_iou_and_giou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    return l1 * (a - b).abs().sum(-1) - giou * generalised_iou


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
def class_cost(logits_LNQC: Tensor, labels_NT: Tensor) -> Tensor:
    """(L, N, Q, T) ``−softmax`` probability of each target's class (DETR)."""
    probability = logits_LNQC.softmax(-1)
    labels = labels_NT[None, :, None].expand(len(logits_LNQC), -1, logits_LNQC.shape[2], -1)
    return -probability.gather(-1, labels)


@torch.no_grad()
def hungarian_match(
    cost_LNQT: Tensor,
    counts: Sequence[int],
    *,
    query_group_Q: Tensor | None = None,
    target_group_NT: Tensor | None = None,
) -> QueryAssignment:
    """Assign each target a query at minimum total cost, in each layer and image; one transfer to the CPU in all.

    Args:
        cost_LNQT: cost of each pair; columns from ``counts[n]`` on are padding.
        counts: targets of each image.
        query_group_Q, target_group_NT: int64 group numbers; both or neither.

    Returns:
        the pairs, on the device of the costs; ``min(Q, counts[n])`` per layer and image, or the same within each group.
    """
    layers, images = cost_LNQT.shape[:2]
    if len(counts) != images:
        raise ValueError(f"{len(counts)} counts for {images} images")
    if (query_group_Q is None) != (target_group_NT is None):
        raise ValueError("groups are needed of queries and of targets, or of neither")
    used = max(counts, default=0)
    device = cost_LNQT.device
    parts = [cost_LNQT[..., :used].float().nan_to_num(nan=NOT_FINITE, posinf=NOT_FINITE, neginf=-NOT_FINITE).flatten()]
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
            groups_T = groups_NT[image, :count]
            blocks = [
                ((groups_Q == g).nonzero()[0], (groups_T == g).nonzero()[0].tolist())
                for g in sorted(set(groups_T.tolist()))
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
    return QueryAssignment(*table.unbind(0))
