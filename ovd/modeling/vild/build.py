# SPDX-License-Identifier: Apache-2.0
"""Build Mask R-CNN and ViLD from their configuration, as Detectron2 models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor

from ovd.config import DetectorBackboneConfig, HeadConfig, ModelConfig, ProposalConfig
from ovd.modeling.backbone import build_bottom_up, build_fpn
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.export import DetectorCard, exported_tensors, load_exported
from ovd.modeling.region_head import RegionHead, conv_fc_head, last_stage_head
from ovd.modeling.vild.detail_map import DetailBoxHead, DetailMap
from ovd.modeling.vild.mask_head import MaskHead
from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
from ovd.modeling.vild.roi_heads import DetailBranch, MaskBranch, OpenVocabularyHeads
from ovd.modeling.vild.sampling import SeededRPN
from pretrain.engine.errors import UserError


def build_model(
    config: ModelConfig,
    *,
    embed_dim: int,
    rows: Tensor | None,
    trainable: Tensor | None,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> OpenVocabularyRCNN:
    """A detector with random weights.

    Args:
        config: architecture.
        embed_dim: D of the encoder whose space the regions live in.
        rows: (C, D) text embeddings of the training vocabulary; None for ``agnostic`` and ``image``.
        trainable: (C,) bool, False for novel classes.
        pixel_mean, pixel_std: of the backbone's training, RGB in 0…255.
    """
    has_text = config.variant in ("text", "vild", "ensemble")
    if has_text and rows is None:
        raise ValueError(f"variant {config.variant!r} needs the text embeddings of its vocabulary")
    backbone = build_backbone(config.backbone)
    maps, detail = backbone.output_shape(), None
    if config.head.detail is not None:
        width = config.head.detail
        detail = DetailMap(fine_channels=maps["res3"].channels, coarse_channels=maps["res4"].channels, channels=width)
        maps = {**maps, "detail": ShapeSpec(channels=width, stride=maps["res3"].stride)}
    rpn_features = ["res4"] if config.backbone.kind == "c4" else list(maps)
    rpn = build_rpn(config.proposals, features=rpn_features, maps=maps)
    classifier = None
    if has_text and rows is not None:
        classifier = EmbeddingClassifier(rows=rows, trainable=trainable, scale=config.head.scale)
    return OpenVocabularyRCNN(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=build_heads(config, maps=maps, embed_dim=embed_dim, classifier=classifier, detail=detail),
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
        input_format="RGB",
    )


def build_backbone(config: DetectorBackboneConfig) -> Backbone:
    """The network alone, giving res3 and res4 (kind ``c4``), or below a feature pyramid (kind ``fpn``)."""
    if config.kind == "c4":
        return build_bottom_up(config, out_features=("res3", "res4"))
    bottom_up = build_bottom_up(config, out_features=config.fpn_levels)
    return build_fpn(bottom_up, in_features=config.fpn_levels, channels=config.fpn_channels, norm="")


def build_rpn(config: ProposalConfig, *, features: list[str], maps: Mapping[str, ShapeSpec]) -> SeededRPN:
    """The region proposal network over some of the backbone's maps."""
    anchors = DefaultAnchorGenerator(
        sizes=[list(s) for s in config.anchor_sizes],
        aspect_ratios=[list(config.aspect_ratios)],
        strides=[maps[name].stride for name in features],
    )
    return SeededRPN(
        in_features=features,
        head=StandardRPNHead(
            in_channels=maps[features[0]].channels,
            num_anchors=anchors.num_anchors[0],
            conv_dims=[-1] * config.conv_layers,
        ),
        anchor_generator=anchors,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=config.batch_per_image,
        positive_fraction=0.5,
        pre_nms_topk=config.pre_nms,
        post_nms_topk=config.post_nms,
        nms_thresh=config.nms,
        smooth_l1_beta=1.0 / 9.0,
    )


def build_heads(
    config: ModelConfig,
    *,
    maps: Mapping[str, ShapeSpec],
    embed_dim: int,
    classifier: EmbeddingClassifier | None,
    detail: DetailMap | None,
) -> OpenVocabularyHeads:
    """Box, mask and embedding heads over the backbone's maps (and the detail map, if there is one)."""
    head, variant = config.head, config.variant
    if config.backbone.kind == "c4":
        box_features, mask_features = ["res4"], ["res3" if detail is None else "detail"]
    else:
        box_features = mask_features = list(maps)[:-1]  # the RPN alone reads the extra level
    needs_head = variant != "agnostic" or detail is None
    region_head = image_head = None
    if needs_head:
        dim = None if variant == "agnostic" else embed_dim
        region_head = build_region_head(config, in_channels=maps[box_features[0]].channels, embed_dim=dim)
    if variant == "ensemble":
        image_head = build_region_head(config, in_channels=maps[box_features[0]].channels, embed_dim=embed_dim)
    mask = None
    if head.mask:
        mask = MaskBranch(
            in_features=mask_features,
            pooler=build_pooler(mask_features, maps=maps, resolution=head.mask_resolution),
            head=build_mask_head(head, in_channels=maps[mask_features[0]].channels),
        )
    detail_branch = None
    if detail is not None:
        resolution = head.detail_resolution
        detail_branch = DetailBranch(
            map=detail,
            pooler=build_pooler(["detail"], maps=maps, resolution=resolution),
            head=DetailBoxHead(channels=maps["detail"].channels, resolution=resolution, hidden=head.detail_fc),
        )
    return OpenVocabularyHeads(
        variant=variant,
        classifier=classifier,
        region_head=region_head,
        image_head=image_head,
        box_in_features=box_features,
        box_pooler=build_pooler(box_features, maps=maps, resolution=head.resolution),
        mask=mask,
        distill_weight=head.distill_weight,
        detail=detail_branch,
        batch_size_per_image=head.batch_per_image,
        positive_fraction=head.positive_fraction,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
    )


def build_region_head(config: ModelConfig, *, in_channels: int, embed_dim: int | None) -> RegionHead:
    """The network's last stage (kind ``c4``), or convolutions and fully connected layers (kind ``fpn``)."""
    head = config.head
    if config.backbone.kind == "c4":
        return last_stage_head(config.backbone, resolution=head.resolution, norm=head.norm, embed_dim=embed_dim)
    return conv_fc_head(
        in_channels=in_channels,
        resolution=head.resolution,
        norm=head.norm,
        conv_dims=head.conv_dims,
        fc_dims=head.fc_dims,
        embed_dim=embed_dim,
    )


def build_mask_head(config: HeadConfig, *, in_channels: int) -> MaskHead:
    """The class-agnostic mask head."""
    side = config.mask_resolution
    shape = ShapeSpec(channels=in_channels, height=side, width=side)
    return MaskHead(shape, num_classes=1, conv_dims=list(config.mask_dims), conv_norm=config.mask_norm)


def build_pooler(features: list[str], *, maps: Mapping[str, ShapeSpec], resolution: int) -> ROIPooler:
    """RoIAlign; with one map every box is read from it, with a pyramid Detectron2's canonical rule picks the level."""
    return ROIPooler(
        output_size=resolution,
        scales=[1.0 / maps[name].stride for name in features],
        sampling_ratio=2,
        pooler_type="ROIAlignV2",
    )


def load_model(folder: Path, card: DetectorCard) -> tuple[OpenVocabularyRCNN, Tensor]:
    """(model in eval mode, (B, D) embeddings of the background words) of an exported detector.

    Args:
        folder: of the export.
        card: of the folder.

    Raises:
        UserError: missing file or tensors that do not fit the card.
    """
    if card.is_transformer:
        raise UserError(f"{folder}: a detection transformer, where a Mask R-CNN is needed (mask_rcnn.yaml, vild.yaml)")
    state, background_words = exported_tensors(folder, card)
    config = card.architecture
    assert isinstance(config, ModelConfig)
    model = build_model(
        config,
        embed_dim=card.embed_dim,
        rows=torch.ones(len(card.classes), card.embed_dim) if card.classes else None,
        trainable=card.trainable,
        pixel_mean=card.pixel_mean,
        pixel_std=card.pixel_std,
    )
    load_exported(model, state, folder)
    return model.eval(), background_words
