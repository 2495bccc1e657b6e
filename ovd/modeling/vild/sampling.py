# SPDX-License-Identifier: Apache-2.0
"""Seeded sampling of anchors and proposals: it depends on the sample alone.

Detectron2 draws them from torch's global generator, picture after picture, so a picture's sample depends on those
before it in its process, and two processes would not train the same network as one. Here every picture has a seed of
its own. With it, losses and gradients of W processes equal those of one on the same global batch (up to rounding) where
all pictures have one size: a batch is padded to its largest picture, and each process knows its own pictures only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside the context; their former state is restored afterwards.

    None leaves them alone: a picture without a seed draws from where they are.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class SeededRPN(RPN):
    """Detectron2's RPN; ``seeds`` are those of the pictures of the coming batch, or None."""

    seeds: Sequence[int] | None = None

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As Detectron2's, one picture at a time."""
        labels, boxes = [], []
        for n, instances in enumerate(gt_instances):
            with seeded(self.seeds[n] if self.seeds else None, anchors[0].device):
                label, box = super().label_and_sample_anchors(anchors, [instances])
            labels += label
            boxes += box
        return labels, boxes

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As Detectron2's, but boxes that are not finite are dropped in training too, where Detectron2 raises.

        The losses of such a batch are not finite either, and the training loop skips the step.
        """
        with torch.no_grad():
            boxes = self._decode_proposals(anchors, pred_anchor_deltas)
            return find_top_rpn_proposals(
                boxes,
                pred_objectness_logits,
                image_sizes,
                self.nms_thresh,
                self.pre_nms_topk[self.training],
                self.post_nms_topk[self.training],
                self.min_box_size,
                False,
            )


class SeededROIHeads(ROIHeads):
    """Detectron2's region heads; ``seeds`` as in :class:`SeededRPN`."""

    seeds: Sequence[int] | None = None

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """As Detectron2's, one picture at a time."""
        sampled = []
        for n, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
            with seeded(self.seeds[n] if self.seeds else None, proposal.proposal_boxes.device):
                sampled += super().label_and_sample_proposals([proposal], [target])
        return sampled
