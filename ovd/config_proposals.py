# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of ``python -m ovd.train`` for class-agnostic proposals (``model.arch`` picodet or nanodet)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ovd.config import RunConfig
from ovd.config_backbone import NetworkConfig
from pretrain.engine.config import LATER, LoopConfig, OptimConfig, Section, check_warmup


class PyramidConfig(NetworkConfig):
    """A frozen network with a feature pyramid of its own (FPN, arXiv:1612.03144) at strides 8, 16 and 32."""

    name: str = Field("timm:tf_efficientnet_lite2", description="timm:NAME or torchvision:NAME")

    @model_validator(mode="after")
    def _of_a_library(self) -> PyramidConfig:
        if self.is_resnet:
            raise ValueError("model.backbone.name: give timm:NAME or torchvision:NAME")
        return self


class ProposalNetworkConfig(Section):
    """The network."""

    arch: Literal["nanodet", "picodet"] = Field(
        ..., description="NanoDet-G or PicoDet-S, with a second, class-agnostic head"
    )
    variant: Literal["agnostic"] = Field("agnostic", description="boxes without names")
    backbone: PyramidConfig | None = Field(
        None,
        description="a frozen network of a library, with a pyramid and class-agnostic heads trained from scratch; "
        "null: the network of `arch`, with scores of 80 words",
        json_schema_extra=LATER,
    )
    ranking: Literal["words", "objectness", "quality", "both"] = Field(
        "words",
        description="what orders the boxes: words (the best known word, the detector as it is), objectness (objects "
        "against background), quality (IoU, learned from objects alone), or the geometric mean of these two",
    )
    nms: float = Field(0.6, gt=0, le=1, description="IoU above which the lesser of two boxes goes")
    pre_nms: int = Field(1000, ge=1, description="best boxes of a picture that enter NMS")
    post_nms: int = Field(300, ge=1, description="boxes kept of a picture, at each of its sizes")
    frozen: bool = Field(True, description="train the class-agnostic heads only; false: the trunk too")

    @model_validator(mode="after")
    def _check_words(self) -> ProposalNetworkConfig:
        if self.backbone is not None and self.arch != "nanodet":
            raise ValueError("arch: the heads on a backbone of a library are NanoDet's; set arch: nanodet")
        if self.backbone is not None and self.ranking == "words":
            raise ValueError("ranking words: a backbone of a library knows none; take objectness, quality or both")
        if self.backbone is not None and not self.frozen:
            raise ValueError("frozen: a backbone of a library stays frozen; its pyramid and the heads are trained")
        return self


def check_ranges(*, doubtful: float, confident: float, scale: tuple[float, float]) -> None:
    """Check the limits of soft labels, and the range of a random factor on a picture's size.

    Raises:
        ValueError: out of order.
    """
    if doubtful > confident:
        raise ValueError(f"doubtful {doubtful} is above confident {confident}")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale {list(scale)}: expected 0 < least <= largest")


class BoxDataConfig(Section):
    """Pictures with boxes, whose names do not matter."""

    images: str = Field(..., description="folder of pictures")
    annotations: tuple[str, ...] = Field(
        ..., min_length=1, description="COCO annotation files, .json or .json.gz; of several, image ids must agree"
    )
    part: str | None = Field(None, description="only images whose `split` in the files is this; null or all: all")
    confident: float = Field(
        0.3, ge=0, le=1, description="boxes with a `score` from here on are objects; boxes without one always are"
    )
    doubtful: float = Field(
        0.08, ge=0, le=1, description="boxes from here to `confident` are neither object nor background; below: nothing"
    )
    withheld: tuple[str, ...] = Field(
        (), description="names whose boxes are left out, to measure recall of unlabelled objects"
    )
    side: int = Field(512, ge=64, le=2048, multiple_of=32, description="longest side of a picture in training, pixels")
    scale: tuple[float, float] = Field((0.4, 1.25), description="range of a random factor on it; larger ones are cut")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")

    @model_validator(mode="after")
    def _in_order(self) -> BoxDataConfig:
        check_ranges(doubtful=self.doubtful, confident=self.confident, scale=self.scale)
        return self


class ProposalTrainConfig(RunConfig):
    """``python -m ovd.train``: fine-tune class-agnostic proposals."""

    weights: str = Field(
        ...,
        description="what it starts from: the file of scripts/convert_picodet.py or convert_nanodet.py, or an exported "
        "folder; for a backbone of a library its weights, or package:NAME, a package of the index that carries them",
    )
    model: ProposalNetworkConfig = Field(..., description="the network")
    sides: tuple[Annotated[int, Field(ge=32, le=4096)], ...] = Field(
        (640,),
        min_length=1,
        description="longest sides, in pixels, at which the exported network sees a picture; boxes of all are joined",
    )
    data: BoxDataConfig = Field(..., description="training pictures")
    loop: LoopConfig = Field(..., description="training loop")
    optim: OptimConfig = Field(..., description="optimiser")
    trunk_lr_scale: float = Field(0.1, gt=0, le=1, description="learning-rate factor of the trunk where it is trained")

    @model_validator(mode="after")
    def _check(self) -> ProposalTrainConfig:
        check_warmup(self.loop, self.optim)
        return self
