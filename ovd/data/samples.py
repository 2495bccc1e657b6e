# SPDX-License-Identifier: Apache-2.0
"""The dicts that Detectron2's models take, one per picture, with the keys that this package adds."""

from __future__ import annotations

from typing import TypedDict

from detectron2.structures import Instances
from torch import Tensor

from pretrain.data.coco import ImageId


class PictureSample(TypedDict, total=False):
    """A picture, or its cached features.

    Attributes:
        image: (3, H, W) RGB in 0…255.
        features: name → (C, h, w) map of the frozen backbone, in place of ``image``.
        size: (H, W) of the network input.
        height, width: of the original picture, for which boxes are predicted.
    """

    image: Tensor
    features: dict[str, Tensor]
    size: tuple[int, int]
    height: int
    width: int


class LabelledSample(PictureSample, total=False):
    """A picture with its labels.

    Attributes:
        instances: ``gt_boxes`` in pixels of the network input, ``gt_classes`` and ``gt_masks``.
        image_id: of the data set.
        regions: offline regions, ``proposal_boxes`` and ``embedding``, where something is distilled.
        seed: of the anchors and proposals that are sampled.
    """

    instances: Instances
    image_id: ImageId
    regions: Instances
    seed: int


class PatchSample(PictureSample, total=False):
    """A picture with UP-DETR's query patches.

    Attributes:
        boxes: (M, 4) xyxy of the patches, in pixels of the network input.
        patches: (M, K, 3, S, S) uint8.
        embeddings: (M, D) of the patches, in place of ``patches``.
    """

    boxes: Tensor
    patches: Tensor
    embeddings: Tensor
