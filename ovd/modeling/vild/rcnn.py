# SPDX-License-Identifier: Apache-2.0
"""ViLD on Detectron2: a class-agnostic Mask R-CNN whose regions live in CLIP's embedding space.

Paper: Gu et al., "Open-vocabulary Object Detection via Vision and Language Knowledge Distillation" (2104.13921).
Particular to it: boxes and masks know no classes; classes are cosines to frozen text embeddings; a second loss pulls
the embeddings of *offline* proposals to what CLIP's image encoder says of the same crops, so that regions nobody
labelled are learned too.

Shapes: ``N`` images, ``R`` regions of the batch, ``D`` joint embedding.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from detectron2.layers import cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.distillation import l1_distillation
from ovd.modeling.region_head import Tower
from ovd.modeling.vild.mask_head import MaskHead
from ovd.modeling.vild.sampling import SeededROIHeads
from pretrain.engine.distributed import shares

Variant = Literal["agnostic", "text", "image", "vild", "ensemble"]


class DetailMap(nn.Module):
    """One map of stride 8 from res3 and res4 of a C4 backbone, for boxes and masks.

    CLIP's last stage sees a region as 2x2 cells, which says what is there and hardly where it ends. Lateral 1x1
    convolutions, sum after up-sampling, 3x3 convolution, as in FPN (Lin et al., arXiv:1612.03144, section 3).
    """

    def __init__(self, *, fine_channels: int, coarse_channels: int, channels: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine_channels, channels, 1)
        self.coarse = nn.Conv2d(coarse_channels, channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        for convolution in (self.fine, self.coarse, self.smooth):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # FPN's reference initialisation
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(N, fine_channels, H, W) and (N, coarse_channels, about H/2, about W/2) to (N, channels, H, W)."""
        coarse = F.interpolate(self.coarse(coarse), scale_factor=2.0, mode="nearest")
        return self.smooth(self.fine(fine) + coarse[..., : fine.shape[-2], : fine.shape[-1]])


class DetailBoxHead(nn.Module):
    """Regions pooled from the detail map, (R, channels, S, S), to a hidden layer that the box regressor reads."""

    def __init__(self, *, channels: int, resolution: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels // 8, channels),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(channels * resolution**2, hidden),
            nn.ReLU(inplace=True),
        )
        self.width = hidden

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(pooled)


class RegionOutputs(NamedTuple):
    """What the heads say of each proposal, unnormalised."""

    deltas: Tensor
    text: Tensor | None
    image: Tensor | None


class OpenVocabularyHeads(SeededROIHeads):
    """Box, mask and embedding heads of all variants.

    With a detail map boxes and masks read that and the towers embed only.

    ======== ================================ ==================
    variant  towers                           losses
    ======== ================================ ==================
    agnostic one, or none with a detail map   box, mask
    text     one                              + text
    image    one                              + distillation
    vild     one, shared                      + both
    ensemble two; boxes from the text tower   + text | distillation
    ======== ================================ ==================
    """

    def __init__(
        self,
        *,
        variant: Variant,
        classifier: EmbeddingClassifier | None,
        tower: Tower | None,
        image_tower: Tower | None,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        mask_in_features: list[str],
        mask_pooler: ROIPooler | None,
        mask_head: MaskHead | None,
        distill_weight: float,
        detail: DetailMap | None = None,
        detail_pooler: ROIPooler | None = None,
        detail_head: DetailBoxHead | None = None,
        box_beta: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (variant == "ensemble") != (image_tower is not None):
            raise ValueError("exactly the ensemble has a second tower")
        if (classifier is None) == (variant in ("text", "vild", "ensemble")):
            raise ValueError(f"variant {variant!r} {'needs a' if classifier is None else 'has no'} text classifier")
        if (tower is None) != (variant == "agnostic" and detail_head is not None):
            raise ValueError("exactly the agnostic variant with a detail map has no tower: nothing would read it")
        self.variant = variant
        self.classifier = classifier
        self.tower = tower
        self.image_tower = image_tower
        self.box_in_features, self.box_pooler = box_in_features, box_pooler
        self.mask_in_features, self.mask_pooler, self.mask_head = mask_in_features, mask_pooler, mask_head
        self.detail, self.detail_pooler, self.detail_head = detail, detail_pooler, detail_head
        width = detail_head.width if detail_head is not None else tower.box_features if tower is not None else 0
        self.box_regressor = nn.Linear(width, 4)
        nn.init.normal_(self.box_regressor.weight, std=0.001)  # Fast R-CNN section 3.3
        nn.init.zeros_(self.box_regressor.bias)
        self.box_transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        self.box_beta = box_beta
        self.distill_weight = distill_weight

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
        """(box features of the tower, text embedding, image embedding) of all boxes of the batch, in order."""
        if self.tower is None:
            return None, None, None
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        flat, embedding = self.tower(pooled)
        if self.variant == "agnostic":
            return flat, None, None
        if self.image_tower is not None:
            return flat, embedding, self.image_tower(pooled)[1]
        return flat, embedding, embedding if self.variant in ("image", "vild") else None

    def regress(self, features: dict[str, Tensor], boxes: list[Boxes], flat: Tensor | None) -> Tensor:
        """(R, 4) box deltas, from the detail map where there is one, else from the tower's features ``flat``."""
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
        counts = [len(b) for b in boxes]
        use_regions = self.distils and regions is not None
        if self.distils and regions is None:
            raise ValueError(f"variant {self.variant!r} distils, but the batch has no offline regions")
        if use_regions and self.variant != "ensemble":
            # One pass over sampled and offline regions, so that batch statistics are shared (released code: "vanilla").
            offline = [r.proposal_boxes for r in regions or []]
            flat, text, image = self.embed(features, [Boxes.cat([a, b]) for a, b in zip(boxes, offline, strict=True)])
            assert flat is not None  # who distils has a tower
            own = cat([torch.arange(c + len(o)) < c for c, o in zip(counts, offline, strict=True)]).to(flat.device)
            out = RegionOutputs(
                self.regress(features, boxes, flat[own]),
                text[own] if text is not None else None,
                image[~own] if image is not None else None,
            )
        else:
            out = self.outputs(features, boxes)
            if use_regions:
                pooled = self.box_pooler(
                    [features[name] for name in self.box_in_features], [r.proposal_boxes for r in regions or []]
                )
                assert self.image_tower is not None
                out = out._replace(image=self.image_tower(pooled)[1])
        losses = {"loss_box": self._box_loss(sampled, out.deltas)}
        if self.classifier is not None:
            assert out.text is not None
            labels = cat([p.gt_classes for p in sampled])
            losses["loss_text"] = self.classifier.loss(self.classifier(out.text), labels)
        if use_regions:
            assert out.image is not None
            target = cat([r.embedding for r in regions or []])
            losses["loss_distill"] = self.distill_weight * l1_distillation(out.image, target)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, sampled)
        # These are means over what this process sampled; weighted like this, their mean is that over all processes.
        foreground = sum(int(((p.gt_classes >= 0) & (p.gt_classes < self.num_classes)).sum()) for p in sampled)
        of_sampled, of_regions, of_masks = shares([sum(counts), sum(map(len, regions or [])), foreground])
        weights = {"loss_distill": of_regions, "loss_mask": of_masks}
        return {name: weights.get(name, of_sampled) * loss for name, loss in losses.items()}

    def _box_loss(self, sampled: list[Instances], deltas: Tensor) -> Tensor:
        labels = cat([p.gt_classes for p in sampled])
        foreground = (labels >= 0) & (labels < self.num_classes)
        if not bool(foreground.any()):
            return deltas.sum() * 0.0
        # Detectron2 gives pictures without labels no gt_boxes; none of their regions is foreground.
        target = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in sampled])[foreground]
        source = cat([p.proposal_boxes.tensor for p in sampled])[foreground]
        wanted = self.box_transform.get_deltas(source, target)
        loss = F.smooth_l1_loss(deltas[foreground].float(), wanted, beta=self.box_beta, reduction="sum")
        return loss / max(len(labels), 1)  # normalised by all sampled regions, as Fast R-CNN does

    def _mask_loss(self, features: dict[str, Tensor], sampled: list[Instances]) -> Tensor:
        assert self.mask_head is not None and self.mask_pooler is not None
        foreground, _ = select_foreground_proposals(sampled, self.num_classes)
        boxes = [p.proposal_boxes for p in foreground]
        if sum(len(b) for b in boxes) == 0:
            return sum(p.sum() for p in self.mask_head.parameters()) * 0.0
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        return mask_rcnn_loss(self.mask_head.layers(pooled), foreground)

    @torch.no_grad()
    def masks(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor | None:
        """(R, M, M) mask probabilities inside each box, or None without a mask head."""
        if self.mask_head is None or self.mask_pooler is None:
            return None
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        return self.mask_head.layers(pooled)[:, 0].float().sigmoid()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("OpenVocabularyRCNN calls losses(), outputs() and masks()")


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

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
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
        self, batched_inputs: list[dict[str, Any]], *, top: int = 300, masks: bool = True, refine: bool = True
    ) -> list[RawRegions]:
        """Proposals with refined boxes, embeddings and masks, best objectness first.

        Args:
            batched_inputs: dicts with ``image`` (3, H, W) RGB 0…255.
            top: at most so many per image.
            masks: whether to run the mask head.
            refine: False returns the RPN's own boxes (offline proposals), without embeddings or masks.
        """
        images: ImageList = self.preprocess_image(batched_inputs)
        features = self.roi_heads.prepare(self.backbone(images.tensor))
        proposals, _ = self.proposal_generator(images, features, None)
        proposals = [p[:top] for p in proposals]
        # Detectron2 gives logits; only their sigmoid is a probability.
        objectness = [p.objectness_logits.sigmoid() for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        if not refine:
            return [RawRegions(b.tensor, o, None, None, None) for b, o in zip(boxes, objectness, strict=True)]
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
