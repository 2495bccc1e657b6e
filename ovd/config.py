# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of ``python -m ovd.train``; one section maps onto one constructor."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ovd.config_backbone import BATCH_NORMS, NetworkConfig
from pretrain.engine.config import FREE, LATER, LoopConfig, OptimConfig, Section, check_warmup

AnchorSide = Annotated[float, Field(gt=0, le=100_000)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Width = Annotated[int, Field(ge=1, le=65_536)]


class DetectorBackboneConfig(NetworkConfig):
    """The network and, for ``kind: fpn``, its pyramid."""

    depth: Literal[18, 34, 50, 101] = Field(18, description="ResNet depth")
    stem: Literal["small", "imagenet"] = Field(
        "small", description="3x3 stem of our encoders, or the 7x7 one of ImageNet networks"
    )
    norm: Literal["FrozenBN", "BN", "SyncBN", "GN", "GN16"] = Field(
        "FrozenBN",
        description="normalisation inside the ResNet; GN: 32 groups; GN16: 16, as pretrain's byol_gn has them; timm's "
        "and torchvision's networks: what happens to their batch norms",
    )
    freeze_at: int = Field(0, ge=0, le=5, description="freeze up to this stage: 1 stem, 2 res2, ...; 0 nothing")
    kind: Literal["c4", "fpn"] = Field(
        "c4", description="c4: regions from res4, head is res5; fpn: the paper's pyramid and head"
    )
    fpn_channels: int = Field(256, ge=16, le=1024, description="channels of the pyramid (kind fpn)")
    fpn_levels: tuple[Literal["res2", "res3", "res4", "res5"], ...] = Field(
        ("res2", "res3", "res4", "res5"), description="stages the pyramid starts from (kind fpn)"
    )


class ProposalConfig(Section):
    """Region proposal network."""

    anchor_sizes: tuple[tuple[AnchorSide, ...], ...] = Field(
        ((32.0, 48.0, 72.0, 104.0, 152.0),),
        min_length=1,
        description="anchor sides in input pixels, one tuple per feature level",
    )
    aspect_ratios: tuple[Ratio, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width of the anchors")
    batch_per_image: int = Field(128, ge=2, description="anchors sampled per image for the loss")
    conv_layers: int = Field(1, ge=1, le=4, description="3x3 convolutions before the outputs (ViLD: 2)")
    pre_nms: tuple[Count, Count] = Field(
        (600, 600), description="proposals per level before NMS, (training, inference)"
    )
    post_nms: tuple[Count, Count] = Field(
        (200, 300), description="proposals per image after NMS, (training, inference)"
    )
    nms: float = Field(0.7, gt=0, le=1, description="IoU of the RPN's NMS")


class HeadConfig(Section):
    """Region heads."""

    batch_per_image: int = Field(
        48, ge=2, description="regions sampled per image for the box and text losses (ViLD: 512)"
    )
    positive_fraction: float = Field(0.25, gt=0, le=1, description="share of foreground among these regions")
    resolution: int = Field(
        4, ge=2, le=28, description="RoIAlign output side for the region head (7 with FPN; 4 is CLIP's grid at 64 px)"
    )
    conv_dims: tuple[Width, ...] = Field((256, 256, 256, 256), description="convolutions of the fpn region head")
    fc_dims: tuple[Width, ...] = Field((1024, 1024), description="fully connected layers of the fpn region head")
    norm: Literal["FrozenBN", "BN", "SyncBN", "GN", "GN16", ""] = Field(
        "FrozenBN", description="normalisation inside the region head; names as in model.backbone.norm"
    )
    detail: int | None = Field(
        None,
        ge=16,
        le=1024,
        multiple_of=8,
        description="channels of a stride-8 map made of res3 and res4 that boxes and masks are read from (kind c4); "
        "null: boxes from what the embedding is read from, masks from res3",
    )
    detail_resolution: int = Field(7, ge=2, le=28, description="RoIAlign output side for boxes on the detail map")
    detail_fc: int = Field(256, ge=16, le=4096, description="units of the box head's hidden layer on the detail map")
    mask: bool = Field(True, description="train and run a mask head")
    mask_resolution: int = Field(14, ge=4, description="RoIAlign output side for masks; the mask is twice as large")
    mask_dims: tuple[Width, ...] = Field(
        (64, 64, 64), description="convolutions of the mask head; the last is the up-sampling one"
    )
    mask_norm: Literal["", "BN", "SyncBN", "GN"] = Field("", description="normalisation inside the mask head")
    scale: float = Field(100.0, gt=0, description="inverse temperature of the text classifier (ViLD: 100)")
    distill_weight: float = Field(
        0.5, ge=0, description="w of the L1 distillation, in units of the L1 norm (ViLD R50: .5)"
    )


class ModelConfig(Section):
    """The detector."""

    arch: Literal["mask_rcnn"] = Field(
        "mask_rcnn", description="conditional and detr choose a detection transformer", json_schema_extra=LATER
    )
    variant: Literal["agnostic", "text", "image", "vild", "ensemble"] = Field(
        "vild",
        description="agnostic: boxes and masks only (gives the offline proposals); the others are ViLD's variants",
    )
    backbone: DetectorBackboneConfig = Field(DetectorBackboneConfig(), description="ResNet")
    proposals: ProposalConfig = Field(ProposalConfig(), description="RPN")
    head: HeadConfig = Field(HeadConfig(), description="region heads")
    encoder_start: bool = Field(
        True, description="start the region heads of kind c4 from the image encoder's last stage and projection"
    )

    @model_validator(mode="after")
    def _levels(self) -> ModelConfig:
        levels = 1 if self.backbone.kind == "c4" else len(self.backbone.fpn_levels) + 1
        if len(self.proposals.anchor_sizes) != levels:
            raise ValueError(
                f"proposals.anchor_sizes has {len(self.proposals.anchor_sizes)} levels, the backbone gives {levels}"
            )
        if self.head.detail is not None and self.backbone.kind != "c4":
            raise ValueError("head.detail belongs to backbone.kind c4; a pyramid has finer levels already")
        if self.head.mask_norm == "GN" and any(width % 32 for width in self.head.mask_dims):
            raise ValueError(
                f"head.mask_norm GN has 32 groups; all of {list(self.head.mask_dims)} must be multiples of 32"
            )
        if not self.backbone.is_resnet:
            norms: dict[str, str] = {"backbone.norm": self.backbone.norm}
            if self.backbone.kind == "c4":
                norms["head.norm"] = self.head.norm
            for key, norm in norms.items():
                if norm not in BATCH_NORMS:
                    raise ValueError(
                        f"{key} {norm!r} is for our ResNets; {self.backbone.name} has norms of its own: set {key} to "
                        f"one of {', '.join(BATCH_NORMS)}"
                    )
        stages, used = ["res2", "res3", "res4", "res5"], list(self.backbone.fpn_levels)
        if self.backbone.kind == "fpn" and used not in [stages[a:b] for a in range(4) for b in range(a + 1, 5)]:
            raise ValueError(f"backbone.fpn_levels {used}: levels must be neighbours, in rising order")
        return self


class CutConfig(Section):
    """DETR's augmentation (arXiv:2005.12872, §4): resized, cut to a random rectangle, resized again."""

    probability: float = Field(0.5, gt=0, le=1, description="share of the pictures that are cut")
    short_sides: tuple[Annotated[int, Field(ge=32, le=4096)], ...] = Field(
        (400, 500, 600), min_length=1, description="short sides of the first resize; one is drawn"
    )
    sides: tuple[int, int] = Field((384, 600), description="range that each side of the rectangle is drawn from")

    @model_validator(mode="after")
    def _in_order(self) -> CutConfig:
        if not 1 <= self.sides[0] <= self.sides[1]:
            raise ValueError(f"sides {list(self.sides)}: expected 1 <= least <= largest")
        return self


class DataConfig(Section):
    """Labelled pictures for detection."""

    kind: Literal["stickers", "coco", "yolo", "voc", "auto"] = Field(
        "stickers", description="Sticker Scenes, or photos with labels in one of three formats; auto: recognised"
    )
    labels: Literal["base", "all"] = Field(
        "base", description="base: novel annotations never reach training; all: the oracle"
    )
    seed: int = Field(0, ge=0, description="seed of the scenes (stickers)")
    length: int = Field(4000, ge=1, description="number of different scenes (stickers)")
    size: int = Field(256, ge=64, le=2048, description="side of a scene in pixels (stickers)")
    extra_styles: bool = Field(False, description="scenes in the further training styles too (stickers)")
    images: str | None = Field(None, description="folder of pictures (coco; else looked for)")
    annotations: str | None = Field(
        None, description="COCO instances file, YOLO's data.yaml, or the folder of a data set (not stickers)"
    )
    part: str | None = Field(
        None,
        description="only pictures of this part: train, val, …; null: train, where a data set has one (coco: all)",
        json_schema_extra=LATER,
    )
    split: str = Field(
        "stickers", description="base/novel split: stickers, ovcoco, lvis, all (every category is base) or a split file"
    )
    short_side: int = Field(
        256, ge=32, le=4096, description="pictures are resized to this short side before the network"
    )
    long_side: int = Field(512, ge=32, le=8192, description="longest side after the resize")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field((1.0, 1.0), description="range of a random resize about short_side")
    crop: int | None = Field(
        None, ge=32, description="side of a random crop after the resize (large scale jitter); null: none"
    )

    cut: CutConfig | None = Field(
        None, description="DETR's cut between two resizes; null: none", json_schema_extra=LATER
    )

    @model_validator(mode="after")
    def _coco_files(self) -> DataConfig:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.scale {list(self.scale)}: expected 0 < least <= largest")
        if self.kind == "coco" and not (self.images and self.annotations):
            raise ValueError("data.kind coco needs data.images and data.annotations")
        if self.kind in ("yolo", "voc", "auto") and not self.annotations:
            raise ValueError(f"data.kind {self.kind} needs data.annotations: a data.yaml or the folder of a data set")
        if self.kind == "stickers" and self.split != "stickers":
            raise ValueError("data.split belongs to photos; stickers have a split of their own, and labels=all")
        return self


class RunConfig(Section):
    """Keys of every run."""

    out: str = Field(
        ..., description="run folder; must be new or empty unless --resume or --overwrite", json_schema_extra=FREE
    )


class TrainingConfig(RunConfig):
    """Keys of every training of a detector."""

    encoder: str = Field(
        "clip-sticker",
        description="image-text encoder: a name under weights/, a folder, a CLIP checkpoint, or open_clip:MODEL:TAG",
    )


class TrainConfig(TrainingConfig):
    """``python -m ovd.train``: train a Mask R-CNN, class-agnostic or with ViLD's heads."""

    templates: Literal["sticker", "clip", "vild63", "name"] = Field(
        "sticker",
        description="prompts of the class names: four short ones, CLIP's one, ViLD's 63, or the bare name; the "
        "detector keeps them",
    )
    weights: str | None = Field(
        None, description="start from this exported detector (folder); null: from the encoder's backbone"
    )
    backbone_weights: str | None = Field(
        None,
        description="backbone to start from: exported/ of pretrain.train, a folder of pretrain.export, or a "
        "safetensors file of torchvision's names; null: see backbone_start",
    )
    backbone_start: Literal["encoder", "scratch"] = Field(
        "encoder",
        description="where the backbone comes from without backbone_weights: the encoder's ResNet, or random weights",
    )
    regions: str | None = Field(
        None, description="store of offline regions written by ovd.embed, for distilling variants"
    )
    regions_per_image: int = Field(32, ge=1, description="offline regions drawn per image and step (ViLD: 300)")
    model: ModelConfig = Field(ModelConfig(), description="the detector")
    data: DataConfig = Field(DataConfig(), description="training pictures")
    loop: LoopConfig = Field(..., description="training loop")
    optim: OptimConfig = Field(..., description="optimiser")
    pretrained_lr_scale: float = Field(
        0.3, gt=0, le=1, description="learning-rate factor of layers that start pretrained"
    )

    @property
    def distils(self) -> bool:
        """Whether the variant reads the store of `regions`."""
        return self.model.variant in ("image", "vild", "ensemble")

    def unread_keys(self) -> tuple[str, ...]:
        """The store, where nothing is distilled from it."""
        return () if self.distils else ("regions",)

    @model_validator(mode="after")
    def _regions(self) -> TrainConfig:
        if self.distils and self.regions is None:
            raise ValueError(
                f"variant {self.model.variant!r} distils from offline regions: set regions=FOLDER, "
                "which python -m ovd.embed writes"
            )
        check_warmup(self.loop, self.optim)
        return self
