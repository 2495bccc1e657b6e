# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of ``python -m ovd.train`` for a user's own classes (``model.arch: finetune``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ovd.config import RunConfig
from ovd.config_proposals import check_ranges
from pretrain.engine.config import LoopConfig, OptimConfig, Section, check_warmup

PACKAGED = "packaged"
"""`data.negatives`: the photos that come with the package."""


class FinetuneModelConfig(Section):
    """A branch for new classes, beside the detector that it is added to."""

    arch: Literal["finetune"] = Field(..., description="fine-tuned classes beside a detector of photographs")
    variant: Literal["classes"] = Field("classes", description="boxes with names")
    nms: float = Field(0.6, gt=0, le=1, description="IoU above which the lesser of two boxes of a class goes")
    top: int = Field(100, ge=1, le=1000, description="boxes of a picture, all classes together")


class FinetuneDataConfig(Section):
    """The user's labelled photos. Photos without an object are used, too."""

    kind: Literal["auto", "coco", "yolo", "voc"] = Field("auto", description="label format; auto: recognised")
    images: str | None = Field(None, description="folder of the photos (coco, voc); null: looked for beside the labels")
    annotations: str | tuple[str, ...] = Field(
        ...,
        description="a COCO file, YOLO's data.yaml, or the folder of a data set; or a list of them, joined by the "
        "photos' files and the categories' names",
    )
    part: str | None = Field(
        None, description="only photos of this part: train, val, …; null: train where there is one"
    )
    split: Literal["all"] = Field("all", description="every category is learned")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="share of the photos that the weights are chosen and scores calibrated on; 0: none"
    )
    images_limit: int | None = Field(None, ge=1, description="use this many photos, drawn by loop.seed; null: all")
    confident: float = Field(
        0.3, ge=0, le=1, description="boxes with a `score` from here on are objects; boxes without one always are"
    )
    doubtful: float = Field(
        0.08, ge=0, le=1, description="boxes from here to `confident` are neither object nor background; below: nothing"
    )
    side: int = Field(
        512,
        ge=64,
        le=2048,
        multiple_of=32,
        description="side of the training canvas, and longest side of a photo afterwards, pixels",
    )
    scale: tuple[float, float] = Field((0.5, 1.5), description="range of a random factor on the photo's size in it")
    mosaic: float = Field(0.5, ge=0, le=1, description="share of the canvases that hold four photos")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    flip_vertical: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip: photos from above")
    colour: float = Field(0.2, ge=0, lt=1, description="largest change of each channel's brightness, as a share")

    negatives: str | None = Field(
        PACKAGED,
        description="photos learned as background: a folder of photos without an object of the classes; packaged: "
        "the page's examples, ignoring boxes that may be one of the classes; null: none",
    )
    negative_share: float = Field(
        0.25, ge=0, le=1, description="probability that a place of a mosaic, except the first, shows a negative"
    )

    @model_validator(mode="after")
    def _in_order(self) -> FinetuneDataConfig:
        check_ranges(doubtful=self.doubtful, confident=self.confident, scale=self.scale)
        if self.negatives not in (None, PACKAGED) and not self.mosaic * self.negative_share:
            raise ValueError("negatives are shown in mosaics: set mosaic and negative_share above 0, or negatives=null")
        return self


class FinetuneConfig(RunConfig):
    """``python -m ovd.train``: add fine-tuned classes to a detector of photographs."""

    weights: str = Field(
        "vild-photo", description="detector that the classes are added to: a name under weights/, or an exported folder"
    )
    model: FinetuneModelConfig = Field(..., description="the branch")
    data: FinetuneDataConfig = Field(..., description="labelled photos")
    steps_per_photo: int = Field(10, ge=1, description="steps per photo; at least 150 and at most loop.steps in all")
    loop: LoopConfig = Field(
        ..., description="training loop; loop.log_every is also how often held-out photos are scored"
    )
    optim: OptimConfig = Field(..., description="optimiser")
    trunk_lr_scale: float = Field(0.1, gt=0, le=1, description="learning-rate factor of the trunk, which is pretrained")

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        check_warmup(self.loop, self.optim)
        return self
