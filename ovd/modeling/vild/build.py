# SPDX-License-Identifier: Apache-2.0
"""Assembling, saving and loading detectors. The only place that knows how a config becomes a Detectron2 model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.config import ModelConfig
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.backbone import build_fpn, build_resnet, stage_channels
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.region_head import Tower
from ovd.modeling.vild.mask_head import MaskHead
from ovd.modeling.vild.rcnn import DetailBoxHead, DetailMap, OpenVocabularyHeads, OpenVocabularyRCNN
from ovd.modeling.vild.sampling import SeededRPN
from ovd.vocabulary import TEMPLATE_SETS
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.engine.state import load_tensors

FORMAT = 1
"""Version of ``model.json``."""

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


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
        pixel_mean, pixel_std: of the encoder, RGB in 0…255.
    """
    bb, head = config.backbone, config.head
    backbone: nn.Module
    if bb.kind == "c4":
        backbone = build_resnet(
            depth=bb.depth, stem=bb.stem, norm=bb.norm, out_features=("res3", "res4"), freeze_at=bb.freeze_at
        )
        rpn_in, box_in, mask_in = ["res4"], ["res4"], ["res3"]
        channels = {name: stage_channels(depth=bb.depth, index=int(name[3:])) for name in ("res3", "res4")}
        strides = {"res3": 8, "res4": 16}
    else:
        bottom_up = build_resnet(
            depth=bb.depth, stem=bb.stem, norm=bb.norm, out_features=bb.fpn_levels, freeze_at=bb.freeze_at
        )
        backbone = build_fpn(bottom_up, in_features=bb.fpn_levels, channels=bb.fpn_channels, norm="")
        names = [f"p{int(level[3:])}" for level in bb.fpn_levels]
        extra = f"p{int(names[-1][1:]) + 1}"
        strides = {f"p{int(level[3:])}": STRIDES[level] for level in bb.fpn_levels}
        strides[extra] = strides[names[-1]] * 2
        channels = dict.fromkeys([*names, extra], bb.fpn_channels)
        rpn_in, box_in, mask_in = [*names, extra], names, names

    detail: DetailMap | None = None
    if head.detail is not None:
        detail = DetailMap(fine_channels=channels["res3"], coarse_channels=channels["res4"], channels=head.detail)
        strides["detail"], channels["detail"], mask_in = strides["res3"], head.detail, ["detail"]

    proposals = config.proposals
    anchors = DefaultAnchorGenerator(
        sizes=[list(s) for s in proposals.anchor_sizes],
        aspect_ratios=[list(proposals.aspect_ratios)],
        strides=[strides[name] for name in rpn_in],
    )
    rpn = SeededRPN(
        in_features=rpn_in,
        head=StandardRPNHead(
            in_channels=channels[rpn_in[0]],
            num_anchors=anchors.num_anchors[0],
            conv_dims=[-1] * proposals.conv_layers,
        ),
        anchor_generator=anchors,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=proposals.batch_per_image,
        positive_fraction=0.5,
        pre_nms_topk=proposals.pre_nms,
        post_nms_topk=proposals.post_nms,
        nms_thresh=proposals.nms,
        smooth_l1_beta=1.0 / 9.0,
    )

    def pooler(names: list[str], resolution: int) -> ROIPooler:
        # With one level every box is read from it; with a pyramid Detectron2's canonical rule picks the level.
        return ROIPooler(
            output_size=resolution,
            scales=[1.0 / strides[name] for name in names],
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
        )

    def tower(dim: int | None) -> Tower:
        return Tower(
            kind="res5" if bb.kind == "c4" else "conv_fc",
            in_channels=channels[box_in[0]],
            resolution=head.resolution,
            embed_dim=dim,
            depth=bb.depth,
            norm=head.norm,
            conv_dims=head.conv_dims,
            fc_dims=head.fc_dims,
        )

    has_text = config.variant in ("text", "vild", "ensemble")
    if has_text and rows is None:
        raise ValueError(f"variant {config.variant!r} needs the text embeddings of its vocabulary")
    classifier = (
        EmbeddingClassifier(rows=rows, trainable=trainable, scale=head.scale) if has_text and rows is not None else None
    )
    heads = OpenVocabularyHeads(
        variant=config.variant,
        classifier=classifier,
        tower=None
        if config.variant == "agnostic" and detail is not None
        else tower(None if config.variant == "agnostic" else embed_dim),
        image_tower=tower(embed_dim) if config.variant == "ensemble" else None,
        box_in_features=box_in,
        box_pooler=pooler(box_in, head.resolution),
        mask_in_features=mask_in,
        mask_pooler=pooler(mask_in, head.mask_resolution) if head.mask else None,
        mask_head=MaskHead(
            ShapeSpec(channels=channels[mask_in[0]], height=head.mask_resolution, width=head.mask_resolution),
            num_classes=1,
            conv_dims=list(head.mask_dims),
            conv_norm=head.mask_norm,
        )
        if head.mask
        else None,
        distill_weight=head.distill_weight,
        detail=detail,
        detail_pooler=pooler(["detail"], head.detail_resolution) if detail is not None else None,
        detail_head=DetailBoxHead(channels=channels["detail"], resolution=head.detail_resolution, hidden=head.detail_fc)
        if detail is not None
        else None,
        num_classes=classifier.num_classes if classifier is not None else 1,
        batch_size_per_image=head.batch_per_image,
        positive_fraction=head.positive_fraction,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
    )
    return OpenVocabularyRCNN(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=heads,
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
        input_format="RGB",
    )


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """What stands in ``model.json`` beside the weights.

    Attributes:
        model: the architecture as a plain dict of :class:`ModelConfig`.
        embed_dim: D.
        pixel_mean, pixel_std: RGB, 0…255.
        encoder: name or path of the encoder.
        encoder_fingerprint: its sha256; another encoder's texts would mean nothing here.
        short_side, long_side: input size the model was trained at, pixels.
        classes: training vocabulary, in the order of the classifier's rows.
        novel: indices of the classes that no label of training named.
        bank: words of the fixed bank of competitors.
        calibration: fields of :class:`Calibration`.
        config_hash: of the training configuration.
        templates: name of the prompts that the classes were embedded with.
        second_look: regions of a picture that the image encoder sees too, as the calibration was fitted
            (`ovd.inference.crop_refinement`).
    """

    model: dict[str, Any]
    embed_dim: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    encoder: str
    encoder_fingerprint: str
    short_side: int
    long_side: int
    classes: tuple[str, ...]
    novel: tuple[int, ...]
    bank: tuple[str, ...]
    calibration: dict[str, float]
    config_hash: str
    format: int = FORMAT
    templates: str = "sticker"  # cards that do not say are older than the choice
    second_look: int = 0

    @property
    def is_transformer(self) -> bool:
        """Whether `model` describes a detection transformer, not a Mask R-CNN."""
        return "arch" in self.model


def save_detector(
    folder: Path, model: OpenVocabularyRCNN, card: DetectorCard, *, bank: Tensor, half: bool = True
) -> None:
    """Write ``model.safetensors`` and ``model.json``; floats as fp16 when ``half``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.detach().cpu() for k, v in model.state_dict().items()}
    tensors["bank"] = bank.cpu()
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_weights(folder / "model.safetensors", {k: v.contiguous() for k, v in tensors.items()}, {"format": str(FORMAT)})
    (folder / "model.json").write_text(json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_card(folder: Path) -> DetectorCard:
    """The card of an exported detector.

    Raises:
        UserError: no detector there, or a card this version cannot read.
    """
    path = folder / "model.json"
    hint = "a detector is a folder with model.json and model.safetensors, as ovd.train exports it"
    raw = read_json(path, hint=hint)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: not a detector card of format {FORMAT}; export the model again with this version")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        card = DetectorCard(**values)
        if card.templates not in TEMPLATE_SETS:
            raise TypeError(f"unknown templates {card.templates!r}")
        return card
    except TypeError as error:
        raise UserError(f"{path}: {error}; export the model again with this version") from error


def load_model(folder: Path) -> tuple[OpenVocabularyRCNN, DetectorCard, Tensor]:
    """(model in eval mode, card, (B, D) bank embeddings) of an exported detector.

    Raises:
        UserError: missing file or tensors that do not fit the card.
    """
    card = read_card(folder)
    if card.is_transformer:
        raise UserError(f"{folder}: a detection transformer, where a Mask R-CNN is needed (mask_rcnn.yaml, vild.yaml)")
    state, bank = exported_tensors(folder)
    config = ModelConfig.model_validate(card.model)
    trainable = torch.ones(len(card.classes), dtype=torch.bool)
    trainable[list(card.novel)] = False
    rows = torch.ones(len(card.classes), card.embed_dim) if card.classes else None
    model = build_model(
        config,
        embed_dim=card.embed_dim,
        rows=rows,
        trainable=trainable,
        pixel_mean=card.pixel_mean,
        pixel_std=card.pixel_std,
    )
    load_exported(model, state, folder)
    return model.eval(), card, bank


def exported_tensors(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """(state dict, (B, D) bank embeddings) of an exported detector, in full precision."""
    tensors, _ = load_weights(folder / "model.safetensors")
    state = {
        k.removeprefix("model."): v.float() if v.is_floating_point() else v
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    return state, tensors["bank"].float()


def load_exported(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Load an exported state dict whole.

    Raises:
        UserError: it does not fit the card that the model was built from.
    """
    hint = "Its model.json describes another model; export it again"
    load_tensors(model, state, source=folder / "model.safetensors", hint=hint)


class RegionModel:
    """A loaded detector that turns a picture into a :class:`RegionSet`.

    Args:
        model: in eval mode.
        card: its card.
        bank: (B, D) unit embeddings of the bank words.
        top: regions kept per picture.
        masks: whether regions have masks, if the model has a mask head.
    """

    def __init__(
        self, *, model: OpenVocabularyRCNN, card: DetectorCard, bank: Tensor, top: int = 150, masks: bool = True
    ) -> None:
        self.model = model
        self.card = card
        self.top, self.masks = top, masks
        self.bank = F.normalize(bank, dim=1) if len(bank) else bank
        self.calibration = Calibration(**card.calibration)
        classifier = model.roi_heads.classifier
        self.background = F.normalize(classifier.background.detach().cpu(), dim=0) if classifier else None

    def _input(self, image: np.ndarray) -> tuple[dict[str, Tensor], float, float]:
        height, width = image.shape[:2]
        scale = min(self.card.short_side / min(height, width), self.card.long_side / max(height, width))
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
        if (new_height, new_width) != (height, width):
            pixels = F.interpolate(pixels[None], (new_height, new_width), mode="bilinear", antialias=True)[0]
        return {"image": pixels}, width / new_width, height / new_height

    @torch.no_grad()
    def regions(self, image: np.ndarray) -> RegionSet:
        """Regions of one RGB picture (H, W, 3) uint8; see :class:`RegionSet`."""
        inputs, scale_x, scale_y = self._input(image)
        raw = self.model.regions([inputs], top=self.top, masks=self.masks)[0]
        if raw.text is None:
            raise UserError("this detector is class-agnostic (variant agnostic): it proposes boxes but knows no words")
        boxes = raw.boxes * raw.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return RegionSet(
            boxes=boxes.cpu(),
            objectness=raw.objectness.cpu(),
            text=raw.text.cpu(),
            image=None if raw.image is None else raw.image.cpu(),
            masks=None if raw.masks is None else raw.masks.cpu(),
            size=(image.shape[0], image.shape[1]),
        )

    @torch.no_grad()
    def propose(self, image: np.ndarray, *, top: int) -> tuple[np.ndarray, np.ndarray]:
        """((P, 4) float32 boxes in original pixels, (P,) objectness): refined class-agnostic proposals, best first."""
        inputs, scale_x, scale_y = self._input(image)
        raw = self.model.regions([inputs], top=top, masks=False)[0]
        scale = raw.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return (raw.boxes * scale).cpu().numpy(), raw.objectness.cpu().numpy()
