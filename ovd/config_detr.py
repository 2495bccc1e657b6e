# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of ``python -m ovd.train`` for detection transformers: DETR, and UP-DETR's pretraining of it.

`TRAIN_CONFIGS` is what the command reads: ``model.arch`` chooses between a Mask R-CNN and a transformer. A
transformer with a ``pretext`` section is pretrained; without one it is trained as a detector.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ovd.config import DataConfig, RunConfig, TrainConfig, TrainingConfig
from ovd.config_backbone import NetworkConfig
from ovd.config_finetune import FinetuneConfig
from ovd.config_fvlm import FvlmTrainConfig
from ovd.config_proposals import ProposalTrainConfig
from pretrain.config_views import ImagesConfig, StickerScenes
from pretrain.engine.config import FREE, LATER, LoopConfig, OptimConfig, Section, check_warmup
from pretrain.engine.config_choice import ConfigChoice


class DetrBackboneConfig(NetworkConfig):
    """The network whose feature maps become the transformer's tokens."""

    depth: Literal[18, 34, 50, 101] = Field(18, description="ResNet depth")
    stem: Literal["small", "imagenet"] = Field("small", description="3x3 stem of our encoders, or ImageNet's 7x7 one")
    norm: Literal["FrozenBN", "BN", "SyncBN"] = Field("FrozenBN", description="normalisation inside the ResNet")
    features: tuple[Literal["res3", "res4", "res5"], ...] = Field(
        ("res4", "res5"),
        min_length=1,
        description="stages that are joined at the first one's resolution (paper: [res5])",
    )
    frozen: bool = Field(True, description="no gradient, eval mode; false: trained with pretrained_lr_scale")
    freeze_at: int = Field(
        0,
        ge=0,
        le=5,
        description="stages frozen while the rest is trained: 1 stem, 2 res2 too (DETR), ...; 0 nothing",
        json_schema_extra=LATER,
    )


class DetrLossConfig(Section):
    """Weights of the losses; the matching cost uses those of object, classes, l1 and giou."""

    object: float = Field(2.0, ge=0, le=100, description="objectness (conditional: focal; detr: 1)")
    object_kind: Literal["focal", "weighted"] = Field(
        "focal", description="focal of Conditional DETR; weighted: DETR's cross-entropy with no_object_weight"
    )
    no_object_weight: float = Field(0.1, gt=0, le=1, description="weight of queries without an object (weighted)")
    l1: float = Field(5.0, ge=0, le=100, description="L1 of the box")
    giou: float = Field(2.0, ge=0, le=100, description="1 - GIoU of the box")
    classes: float = Field(1.0, ge=0, le=100, description="softmax over the vocabulary, of matched queries")
    reconstruction: float = Field(
        1.0, ge=0, le=100, description="2 - 2 cos to the frozen encoder's embedding of the patch (pretext)"
    )
    contrast: float = Field(
        0.0, ge=0, le=100, description="softmax over the patches of the picture: a vocabulary of patches (pretext)"
    )


class DetrConfig(Section):
    """The detection transformer."""

    arch: Literal["conditional", "detr"] = Field(
        ..., description="conditional: anchors that are refined, conditional attention; detr: the original"
    )
    variant: Literal["text", "closed", "agnostic"] = Field(
        "text", description="text: classes are text embeddings; closed: a linear layer; agnostic: boxes only (pretext)"
    )
    backbone: DetrBackboneConfig = Field(DetrBackboneConfig(), description="ResNet")
    width: int = Field(128, ge=16, le=1024, multiple_of=8, description="channels of the transformer (paper: 256)")
    heads: int = Field(4, ge=1, le=32, description="attention heads (paper: 8)")
    ffn: int = Field(384, ge=16, le=8192, description="hidden units of its feed-forward layers (paper: 2048)")
    encoder_layers: int = Field(3, ge=0, le=12, description="encoder layers (paper: 6)")
    decoder_layers: int = Field(3, ge=1, le=12, description="decoder layers (paper: 6)")
    queries: int = Field(50, ge=1, le=2000, description="object queries (paper: 100)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout (paper: 0.1)")
    pre_norm: bool = Field(True, description="layer norm before instead of after each part (UP-DETR: true)")
    denoising: int = Field(0, ge=0, le=20, description="groups of denoising queries (conditional); 0: none")
    box_noise: float = Field(0.4, ge=0, le=1, description="noise of denoising boxes, in half sides")
    label_noise: float = Field(
        0.2, ge=0, le=1, description="share of denoising labels that are another class; in the pretext: without a patch"
    )
    scale: float = Field(40.0, gt=0, le=200, description="inverse temperature of the classes' softmax")
    embed_space: Literal["ssl", "clip"] = Field(
        "clip",
        description="what queries are conditioned on and embedded into: backbone features, or the encoder's space",
    )
    conditioned: int = Field(
        0, ge=0, le=200, description="classes whose words queries are conditioned on per step; 0: free queries"
    )
    crop_conditions: float = Field(
        0.0, description="removed, as no gain was measured; 0 is still read", json_schema_extra=LATER
    )
    region_tower: bool = Field(
        False,
        description="embed each free query from the backbone's res4 inside its box, by a last stage that starts as "
        "the encoder's (as ViLD's regions); false: by the query's own state",
    )
    loss: DetrLossConfig = Field(DetrLossConfig(), description="losses")

    @model_validator(mode="after")
    def _check(self) -> DetrConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.arch == "detr" and self.denoising:
            raise ValueError("denoising queries start from anchors: use arch conditional, or denoising: 0")
        if self.conditioned > self.queries:
            raise ValueError(f"conditioned {self.conditioned} groups need at least as many queries, not {self.queries}")
        if self.conditioned and (self.variant != "text" or self.embed_space != "clip"):
            raise ValueError("queries conditioned on words need variant text and embed_space clip")
        if self.crop_conditions:
            raise ValueError(
                "crop_conditions was removed: conditioning on crops in training gave no gain; leave it out"
            )
        if self.region_tower and (self.variant != "text" or "res4" not in self.backbone.features):
            raise ValueError("region_tower reads res4 for words: it needs variant text and res4 in backbone.features")
        return self


Sampler = Literal["official", "log_uniform", "prior"]


class PatchConfig(Section):
    """Random query patches."""

    sampler: Sampler = Field(
        "log_uniform",
        description="official: uniform sides; log_uniform: even over scales; prior: likely objects (selective search)",
    )
    count: int = Field(10, ge=1, le=500, description="patches per picture, M; 1 is the single-query form")
    size: int = Field(64, ge=16, le=512, description="patches are resized to this side (paper: 128)")
    min_side: int = Field(8, ge=2, le=256, description="smallest side in pixels of the original picture (official: 8)")
    scale: tuple[float, float] = Field(
        (0.08, 0.6), description="square root of area against the picture (log_uniform, prior)"
    )
    max_aspect: float = Field(3.0, ge=1, le=20, description="longest against shortest side (log_uniform, prior)")
    max_iou: float = Field(0.5, gt=0, le=1, description="a patch that overlaps an earlier one more is drawn again")
    jitter: bool = Field(False, description="colour jitter, grey and blur on the patch only (paper: true)")
    variants: int = Field(4, ge=1, le=10_000, description="different sets of patches per picture; all are cached")

    @model_validator(mode="after")
    def _scales(self) -> PatchConfig:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"pretext.patches.scale {list(self.scale)}: expected 0 < smallest <= largest <= 1")
        return self


class PretextConfig(Section):
    """Random query patch detection (UP-DETR)."""

    images: ImagesConfig = Field(
        StickerScenes(kind="sticker_scenes", size=256, length=4000, seed=11), description="unlabelled pictures"
    )
    held_out: ImagesConfig = Field(
        StickerScenes(kind="sticker_scenes", split="val", size=256, length=128, seed=11),
        description="pictures that localisation is measured on",
    )
    held_out_count: int = Field(128, ge=0, le=100_000, description="number of these pictures; 0: nothing is measured")
    evaluate_every: int = Field(
        200, ge=1, le=10**9, description="steps between measurements (at log lines)", json_schema_extra=FREE
    )
    patches: PatchConfig = Field(PatchConfig(), description="query patches")
    grouped: bool = Field(True, description="match a patch among its own queries; false: the official matching")
    attention_mask: bool = Field(True, description="queries of different patches do not see each other")
    shuffle: bool = Field(
        False,
        description="permute the object queries in each step (UP-DETR section 3.2; its authors: not helpful)",
    )
    mask_queries: float = Field(0.1, ge=0, lt=1, description="share of queries that get no patch, in training only")


class DetrTrainConfig(TrainingConfig):
    """``python -m ovd.train`` for detection transformers."""

    weights: str | None = Field(
        None, description="start from this exported DETR or UP-DETR (folder), or an official .pth file"
    )
    backbone_weights: str | None = Field(
        None, description="torchvision-named ResNet safetensors, or exported/ of a pretrain run; null: the encoder's"
    )
    model: DetrConfig = Field(..., description="the transformer")
    pretext: PretextConfig | None = Field(None, description="pretrain by localising patches of pictures")
    data: DataConfig = Field(DataConfig(), description="labelled pictures (training a detector)")
    images_limit: int | None = Field(
        None, ge=1, description="train on this many labelled pictures, the first ones; null: all"
    )
    cache: str | None = Field(
        None,
        description="folder for features of the frozen backbone, reused by later runs; null: no cache",
        json_schema_extra=FREE,
    )
    cache_precision: Literal["float16", "float32"] = Field("float16", description="how features are cached")
    loop: LoopConfig = Field(..., description="training loop")
    optim: OptimConfig = Field(..., description="optimiser")
    pretrained_lr_scale: float = Field(
        0.1, gt=0, le=10, description="learning-rate factor of an unfrozen backbone and of region_tower"
    )

    @model_validator(mode="after")
    def _check(self) -> DetrTrainConfig:
        check_warmup(self.loop, self.optim)
        if self.pretext is not None and self.pretext.patches.count > self.model.queries:
            raise ValueError(
                f"pretext.patches.count {self.pretext.patches.count} needs at least as many model.queries, "
                f"not {self.model.queries}"
            )
        if self.pretext is None and self.model.variant == "text" and self.model.embed_space == "ssl":
            raise ValueError("words live in the encoder's space: variant text needs model.embed_space clip")
        if self.cache is not None:
            if not self.model.backbone.frozen:
                raise ValueError(
                    "cached features are those of a frozen backbone: set model.backbone.frozen or cache=null"
                )
            if self.data.crop is not None or self.data.cut is not None or self.data.scale != (1.0, 1.0):
                raise ValueError(
                    "cached features allow flips only: unset data.crop, data.cut and data.scale, or cache=null"
                )
        if self.pretext is not None and (self.data.crop is not None or self.data.cut is not None):
            raise ValueError("data.crop and data.cut are for training on labels; the pretext scales its pictures only")
        if self.model.conditioned and self.pretext is not None:
            raise ValueError("model.conditioned is for training on labels; the pretext conditions on patches already")
        return self


TRAIN_CONFIGS: ConfigChoice[RunConfig] = ConfigChoice(
    key="model.arch",
    sections={
        "mask_rcnn": TrainConfig,
        "conditional": DetrTrainConfig,
        "detr": DetrTrainConfig,
        "nanodet": ProposalTrainConfig,
        "picodet": ProposalTrainConfig,
        "fvlm": FvlmTrainConfig,
        "finetune": FinetuneConfig,
    },
    default="mask_rcnn",
)
