# SPDX-License-Identifier: Apache-2.0
"""ViLD's heads: text classifier, image head with its distillation, and class-agnostic boxes and masks.

Shapes: ``R`` regions of the batch, ``D`` joint embedding.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from detectron2.layers import cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.distillation import l1_distillation
from ovd.modeling.region_head import RegionHead
from ovd.modeling.vild.detail_map import DetailBoxHead, DetailMap
from ovd.modeling.vild.mask_head import MaskHead
from ovd.modeling.vild.sampling import SeededROIHeads
from pretrain.engine.distributed import shares

STORED_NAMES = {"region_head": "tower", "image_head": "image_tower"}  # in checkpoints and exported detectors

Variant = Literal["agnostic", "text", "image", "vild", "ensemble"]


class RegionOutputs(NamedTuple):
    """Outputs of the heads, one row per region; embeddings are unnormalised.

    Attributes:
        deltas: (R, 4) of the boxes.
        text: (R, D) embeddings of the text head, or None.
        image: embeddings of the image head, or None: (R, D), in training those of the offline regions.
    """

    deltas: Tensor
    text: Tensor | None
    image: Tensor | None


class DetailBranch(NamedTuple):
    """A finer map for boxes and masks, and what reads boxes from it (`ovd.modeling.vild.detail_map`)."""

    map: DetailMap
    pooler: ROIPooler
    head: DetailBoxHead


class MaskBranch(NamedTuple):
    """Which maps masks are pooled from, and the head that draws them."""

    in_features: list[str]
    pooler: ROIPooler
    head: MaskHead


def _to_stored_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *hook_args: object) -> None:
    """Give the region heads their stored names in a state dict."""
    _rename(state, {f"{prefix}{name}.": f"{prefix}{stored}." for name, stored in STORED_NAMES.items()})


def _from_stored_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *hook_args: object) -> None:
    """Give the region heads the names of their attributes in a state dict that is about to be loaded."""
    _rename(state, {f"{prefix}{stored}.": f"{prefix}{name}." for name, stored in STORED_NAMES.items()})


def _rename(state: dict[str, Tensor], prefixes: dict[str, str]) -> None:
    for key in list(state):
        for old, new in prefixes.items():
            if key.startswith(old):
                state[new + key.removeprefix(old)] = state.pop(key)


class OpenVocabularyHeads(SeededROIHeads):
    """Box, mask and embedding heads of all variants.

    With a detail map boxes and masks read that and the region heads embed only.

    ======== ================================ ==================
    variant  region heads                     losses
    ======== ================================ ==================
    agnostic one, or none with a detail map   box, mask
    text     one                              + text
    image    one                              + distillation
    vild     one, shared                      + both
    ensemble two; boxes from the text head    + text | distillation
    ======== ================================ ==================
    """

    def __init__(
        self,
        *,
        variant: Variant,
        classifier: EmbeddingClassifier | None,
        region_head: RegionHead | None,
        image_head: RegionHead | None,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        mask: MaskBranch | None,
        distill_weight: float,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        detail: DetailBranch | None = None,
    ) -> None:
        super().__init__(
            num_classes=1 if classifier is None else classifier.num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=proposal_matcher,
        )
        if (variant == "ensemble") != (image_head is not None):
            raise ValueError("only the ensemble has a second region head")
        if (classifier is None) == (variant in ("text", "vild", "ensemble")):
            raise ValueError(f"variant {variant!r} {'needs a' if classifier is None else 'has no'} text classifier")
        if (region_head is None) != (variant == "agnostic" and detail is not None):
            raise ValueError("exactly the agnostic variant with a detail map has no region head: nothing would read it")
        self.variant = variant
        self.classifier = classifier
        self.region_head = region_head
        self.image_head = image_head
        self.box_in_features, self.box_pooler = box_in_features, box_pooler
        self.mask_in_features = [] if mask is None else mask.in_features
        self.mask_pooler = None if mask is None else mask.pooler
        self.mask_head = None if mask is None else mask.head
        self.detail = None if detail is None else detail.map
        self.detail_pooler = None if detail is None else detail.pooler
        self.detail_head = None if detail is None else detail.head
        width = detail.head.width if detail is not None else region_head.box_features if region_head is not None else 0
        self.box_regressor = nn.Linear(width, 4)
        nn.init.normal_(self.box_regressor.weight, std=0.001)  # Fast R-CNN section 3.3
        nn.init.zeros_(self.box_regressor.bias)
        self.box_transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        self.distill_weight = distill_weight
        self.register_state_dict_post_hook(_to_stored_names)
        self.register_load_state_dict_pre_hook(_from_stored_names)

    @property
    def region_heads(self) -> dict[str, RegionHead]:
        """The heads that embed regions, by their names here."""
        heads = {"region_head": self.region_head, "image_head": self.image_head}
        return {name: head for name, head in heads.items() if head is not None}

    @property
    def distils(self) -> bool:
        """Whether training needs offline regions with their image embeddings."""
        return self.variant in ("image", "vild", "ensemble")

    def prepare(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's features and, where there is one, the detail map; once per batch.

        In float32 also under autocast: Detectron2's RoIAlign rounds boxes to the type of the map it reads, and half a
        pixel of bfloat16 is more than its bilinear reading is exact to.
        """
        maps = features
        if self.detail is not None:
            maps = {**features, "detail": self.detail(features["res3"], features["res4"])}
        return {name: values.float() for name, values in maps.items()}

    def embed(
        self, features: dict[str, Tensor], boxes: list[Boxes]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(box features of the region head, text embedding, image embedding) of all boxes of the batch, in order."""
        if self.region_head is None:
            return None, None, None
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        flat, embedding = self.region_head(pooled)
        if self.variant == "agnostic":
            return flat, None, None
        if self.image_head is not None:
            return flat, embedding, self.image_head(pooled)[1]
        return flat, embedding, embedding if self.variant in ("image", "vild") else None

    def regress(self, features: dict[str, Tensor], boxes: list[Boxes], flat: Tensor | None) -> Tensor:
        """(R, 4) box deltas, from the detail map where there is one, else from the region head's features ``flat``."""
        if self.detail_head is None or self.detail_pooler is None:
            assert flat is not None
            return self.box_regressor(flat)
        return self.box_regressor(self.detail_head(self.detail_pooler([features["detail"]], boxes)))

    def outputs(self, features: dict[str, Tensor], boxes: list[Boxes]) -> RegionOutputs:
        """Run all heads but the masks' on all boxes of the batch, in order."""
        flat, text, image = self.embed(features, boxes)
        return RegionOutputs(self.regress(features, boxes, flat), text, image)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances],
        regions: list[Instances] | None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            features: what :meth:`prepare` gives.
            proposals: of the RPN.
            targets: labels, ``gt_boxes``, ``gt_classes``, ``gt_masks``.
            regions: offline proposals with ``proposal_boxes`` and ``embedding``, moved with the image; for distilling
                variants.
        """
        sampled = self.label_and_sample_proposals(proposals, targets)
        boxes = [p.proposal_boxes for p in sampled]
        if self.distils:
            if regions is None:
                raise ValueError(f"variant {self.variant!r} distils, but the batch has no offline regions")
            out = self._distilling_outputs(features, boxes, [r.proposal_boxes for r in regions])
        else:
            regions, out = [], self.outputs(features, boxes)
        losses = {"loss_box": self._box_loss(sampled, out.deltas)}
        if self.classifier is not None:
            assert out.text is not None
            labels = cat([p.gt_classes for p in sampled])
            losses["loss_text"] = self.classifier.loss(self.classifier(out.text), labels)
        if self.distils:
            assert out.image is not None
            target = cat([r.embedding for r in regions])
            losses["loss_distill"] = self.distill_weight * l1_distillation(out.image, target)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, sampled)
        # These are means over what this process sampled; weighted like this, their mean is that over all processes.
        foreground = sum(int(((p.gt_classes >= 0) & (p.gt_classes < self.num_classes)).sum()) for p in sampled)
        of_sampled, of_regions, of_masks = shares([sum(map(len, boxes)), sum(map(len, regions)), foreground])
        weights = {"loss_distill": of_regions, "loss_mask": of_masks}
        return {name: weights.get(name, of_sampled) * loss for name, loss in losses.items()}

    def _distilling_outputs(
        self, features: dict[str, Tensor], boxes: list[Boxes], offline: list[Boxes]
    ) -> RegionOutputs:
        """Boxes and text of the sampled regions, image embeddings of the offline ones."""
        if self.image_head is not None:
            out = self.outputs(features, boxes)
            pooled = self.box_pooler([features[name] for name in self.box_in_features], offline)
            return out._replace(image=self.image_head(pooled)[1])
        # One pass over sampled and offline regions, so that batch statistics are shared (released code: "vanilla").
        flat, text, image = self.embed(features, [Boxes.cat([a, b]) for a, b in zip(boxes, offline, strict=True)])
        assert flat is not None and image is not None  # who distils has a region head
        is_sampled = cat([torch.arange(len(a) + len(b)) < len(a) for a, b in zip(boxes, offline, strict=True)])
        is_sampled = is_sampled.to(flat.device)
        return RegionOutputs(
            self.regress(features, boxes, flat[is_sampled]),
            text[is_sampled] if text is not None else None,
            image[~is_sampled],
        )

    def _box_loss(self, sampled: list[Instances], deltas: Tensor) -> Tensor:
        labels = cat([p.gt_classes for p in sampled])
        foreground = (labels >= 0) & (labels < self.num_classes)
        if not bool(foreground.any()):
            return deltas.sum() * 0.0
        # Detectron2 gives pictures without labels no gt_boxes; none of their regions is foreground.
        target = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in sampled])[foreground]
        source = cat([p.proposal_boxes.tensor for p in sampled])[foreground]
        target_deltas = self.box_transform.get_deltas(source, target)
        loss = F.smooth_l1_loss(deltas[foreground].float(), target_deltas, reduction="sum")
        return loss / max(len(labels), 1)  # normalised by all sampled regions, as Fast R-CNN does

    def _mask_loss(self, features: dict[str, Tensor], sampled: list[Instances]) -> Tensor:
        foreground, _ = select_foreground_proposals(sampled, self.num_classes)
        # Also without any: the other processes' synchronised norms wait for this one's.
        return mask_rcnn_loss(self._mask_logits(features, [p.proposal_boxes for p in foreground]), foreground)

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        assert self.mask_head is not None and self.mask_pooler is not None
        return self.mask_head.layers(self.mask_pooler([features[name] for name in self.mask_in_features], boxes))

    @torch.no_grad()
    def masks(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor | None:
        """(R, M, M) mask probabilities inside each box, or None without a mask head."""
        return None if self.mask_head is None else self._mask_logits(features, boxes)[:, 0].float().sigmoid()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("OpenVocabularyRCNN calls losses(), outputs() and masks()")
