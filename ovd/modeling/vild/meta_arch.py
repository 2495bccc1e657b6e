# SPDX-License-Identifier: Apache-2.0
"""ViLD on Detectron2: a class-agnostic Mask R-CNN whose regions live in CLIP's embedding space.

Paper: Gu et al., "Open-vocabulary Object Detection via Vision and Language Knowledge Distillation" (2104.13921).
Particular to it: boxes and masks are class-agnostic; class logits are cosines to frozen text embeddings; a second loss
distils CLIP's image embeddings of *offline* proposals' crops, so that unlabelled regions are learned too.

Shapes: ``N`` images, ``R`` regions of the batch, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import cat
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn import functional as F

from ovd.data.samples import LabelledSample
from ovd.modeling.vild.roi_heads import OpenVocabularyHeads


class RawRegions(NamedTuple):
    """Regions of one network input, in its pixels."""

    boxes: Tensor
    objectness: Tensor
    text: Tensor | None
    image: Tensor | None
    masks: Tensor | None


class OpenVocabularyRCNN(GeneralizedRCNN):
    """Detectron2's generalised R-CNN with offline regions in training and word-free regions in inference."""

    roi_heads: OpenVocabularyHeads

    def forward(self, batched_inputs: Sequence[LabelledSample]) -> Any:
        """In training the dict of losses; in eval mode one :class:`RawRegions` per image."""
        if not self.training:
            return self.regions(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        regions = [x["regions"].to(self.device) for x in batched_inputs] if "regions" in batched_inputs[0] else None
        features = self.roi_heads.prepare(self.backbone(images.tensor))
        seeds = [x["seed"] for x in batched_inputs] if "seed" in batched_inputs[0] else None
        self.proposal_generator.seeds = seeds
        self.roi_heads.seeds = [seed + 1 for seed in seeds] if seeds else None  # not the draws of the anchors again
        # Detectron2's RPN and samplers insist on a place for their scalars; the loop logs the losses itself.
        with EventStorage():
            proposals, losses = self.proposal_generator(images, features, targets)
            return {**losses, **self.roi_heads.losses(features, proposals, targets, regions)}

    @torch.no_grad()
    def regions(
        self, batched_inputs: Sequence[LabelledSample], *, top: int = 300, masks: bool = True
    ) -> list[RawRegions]:
        """Proposals with refined boxes, embeddings and masks, best objectness first.

        Args:
            batched_inputs: dicts with ``image`` (3, H, W) RGB 0…255.
            top: at most so many per image.
            masks: whether to run the mask head.
        """
        images: ImageList = self.preprocess_image(batched_inputs)
        features = self.roi_heads.prepare(self.backbone(images.tensor))
        proposals, _ = self.proposal_generator(images, features, None)
        proposals = [p[:top] for p in proposals]
        # Detectron2 gives logits; only their sigmoid is a probability.
        objectness = [p.objectness_logits.sigmoid() for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        out = self.roi_heads.outputs(features, boxes)
        refined = self.roi_heads.box_transform.apply_deltas(out.deltas, cat([b.tensor for b in boxes]))
        counts = [len(b) for b in boxes]
        split = [Boxes(b) for b in refined.split(counts)]
        for b, size in zip(split, images.image_sizes, strict=True):
            b.clip(size)
        mask = self.roi_heads.masks(features, split) if masks else None

        def per_image(x: Tensor | None) -> list[Tensor | None]:
            return [None] * len(counts) if x is None else list(x.split(counts))

        text = None if out.text is None else F.normalize(out.text.float(), dim=1)
        image = None if out.image is None or out.image is out.text else F.normalize(out.image.float(), dim=1)
        return [
            RawRegions(b.tensor, o, t, i, m)
            for b, o, t, i, m in zip(split, objectness, per_image(text), per_image(image), per_image(mask), strict=True)
        ]
