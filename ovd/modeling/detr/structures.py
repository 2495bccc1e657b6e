# SPDX-License-Identifier: Apache-2.0
"""Types that pass between the parts of a detection transformer.

Shapes: ``N`` images, ``S`` tokens, ``Q`` queries, ``d`` width, ``L`` decoder layers, ``T`` targets (padded), ``C``
classes, ``D`` embedding. Boxes are cxcywh in [0, 1] of each picture's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

if TYPE_CHECKING:
    from detectron2.structures import Instances


class FeatureMap(NamedTuple):
    """A feature map of the backbone.

    Attributes:
        name: ``res3``, ``res4`` or ``res5``.
        channels: of the map.
        stride: pixels per cell.
    """

    name: str
    channels: int
    stride: int


class Memory(NamedTuple):
    """Encoded tokens of a batch.

    Attributes:
        tokens: (N, S, d).
        pos_embed: (N, S, d) sine position embedding.
        padding: (N, S) bool, True for padding; None where there is none.
        sizes: (height, width) of each network input.
        maps: the backbone's feature maps they were made of.
    """

    tokens: Tensor
    pos_embed: Tensor
    padding: Tensor | None
    sizes: list[tuple[int, int]]
    maps: dict[str, Tensor]

    def repeated(self, times: int) -> Memory:
        """One picture's memory as a batch of ``times``, without copies: for so many sets of queries at once."""

        def expanded(x: Tensor) -> Tensor:
            return x.expand(times, *x.shape[1:])

        padding = None if self.padding is None else expanded(self.padding)
        maps = {name: expanded(x) for name, x in self.maps.items()}
        return Memory(expanded(self.tokens), expanded(self.pos_embed), padding, self.sizes * times, maps)


class DecoderOutput(NamedTuple):
    """States (L, N, Q, d) and boxes (L, N, Q, 4) after each decoder layer."""

    states: Tensor
    boxes: Tensor

    def split(self, count: int) -> tuple[DecoderOutput, DecoderOutput]:
        """The first ``count`` queries, and the others."""
        return (
            DecoderOutput(self.states[:, :, :count], self.boxes[:, :, :count]),
            DecoderOutput(self.states[:, :, count:], self.boxes[:, :, count:]),
        )


class QueryOutputs(NamedTuple):
    """Predictions of the last layer for each query.

    Attributes:
        boxes: (N, Q, 4).
        logits: (N, Q) objectness.
        embeddings: (N, Q, D) unit rows.
        classes: (N, Q, C+1) logits of a closed list, "no object" last; None where classes are embeddings.
        sizes: (height, width) of each network input.
    """

    boxes: Tensor
    logits: Tensor
    embeddings: Tensor
    classes: Tensor | None
    sizes: list[tuple[int, int]]


class Targets(NamedTuple):
    """Targets of the queries; rows from ``counts[n]`` on are padding.

    Attributes:
        boxes: (N, T, 4).
        labels: (N, T) int64.
        counts: objects of each image.
        groups: (N, T) int64 group of queries that a target may be matched with, or None.
        embeddings: (N, T, D) what the matched query's embedding should be, or None.
    """

    boxes: Tensor
    labels: Tensor
    counts: list[int]
    groups: Tensor | None = None
    embeddings: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(N, T) bool, False for padding."""
        number = torch.arange(self.boxes.shape[1], device=self.boxes.device)
        return number < torch.tensor(self.counts, device=number.device)[:, None]

    @classmethod
    def of_instances(cls, instances: Sequence[Instances], *, device: torch.device) -> Targets:
        """The labels of a batch, padded to the image with the most."""
        counts = [len(i) for i in instances]
        most_objects = max(1, *counts)
        boxes = torch.full((len(counts), most_objects, 4), 0.5, device=device)
        labels = torch.zeros(len(counts), most_objects, dtype=torch.int64, device=device)
        for n, labelled in enumerate(instances):
            height, width = labelled.image_size
            corners = labelled.gt_boxes.tensor.to(device).float()
            corners = corners / corners.new_tensor([width, height, width, height])
            boxes[n, : counts[n]] = box_convert(corners, "xyxy", "cxcywh")
            labels[n, : counts[n]] = labelled.gt_classes.to(device)
        return cls(boxes, labels, counts)

    def subset(self, keep: Sequence[Tensor], groups: Tensor) -> Targets:
        """The targets of each image for which ``keep`` is True, moved to the front, in the groups given.

        Args:
            keep: for each image (``counts[n]``,) bool.
            groups: (N, T) int64.
        """
        counts = [int(k.sum()) for k in keep]
        boxes, labels, group_ids = self.boxes.clone(), self.labels.clone(), groups.clone()
        for n, (k, count) in enumerate(zip(keep, counts, strict=True)):
            size = len(k)
            boxes[n, :count], labels[n, :count] = self.boxes[n, :size][k], self.labels[n, :size][k]
            group_ids[n, :count] = groups[n, :size][k]
        return Targets(boxes, labels, counts, group_ids)
