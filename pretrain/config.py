# SPDX-License-Identifier: Apache-2.0
"""Typed configuration of `python -m pretrain.train`: which towers, which method, which data. Imports no torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, create_model, model_validator

from pretrain.config_photos import ImageStart, PhotoWords, TimmTower, WordsLoss
from pretrain.config_ssl import (
    BarlowTwinsMethod,
    ByolMethod,
    MoCoMethod,
    SimCLRMethod,
    SimSiamMethod,
    SslMethod,
    SwavMethod,
    WatchConfig,
)
from pretrain.config_views import (
    CifarData,
    DataSection,
    FolderData,
    ImageData,
    ShardData,
    Share,
    StickerScenes,
    StickerSingles,
    require_order,
)
from pretrain.engine.config import FREE, LoopConfig, OptimConfig, Section, check_warmup

Unit = Annotated[float, Field(ge=0, le=1)]


class ResNetTower(Section):
    """Residual network with torchvision's parameter names, so that its backbone converts to Detectron2."""

    kind: Literal["resnet"] = Field(default="resnet", description="residual network")
    depth: Literal[18, 34, 50, 101] = Field(default=18, description="number of layers")
    stem: Literal["small", "imagenet"] = Field(
        default="small", description="small: 3x3 convolution, stride 2; imagenet: 7x7; a max pool follows either"
    )
    image_size: int = Field(default=64, ge=16, le=1024, description="side of the input picture in pixels")


class ViTTower(Section):
    """open_clip's vision transformer."""

    kind: Literal["vit"] = Field(description="vision transformer")
    patch_size: int = Field(default=8, ge=2, le=64, description="side of a patch in pixels")
    width: int = Field(default=192, ge=32, le=2048, description="channels")
    layers: int = Field(default=6, ge=1, le=64, description="blocks")
    heads: int = Field(default=3, ge=1, le=64, description="attention heads")
    image_size: int = Field(default=64, ge=16, le=1024, description="side of the input picture in pixels")

    @model_validator(mode="after")
    def _divides(self) -> ViTTower:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class CbowTower(Section):
    """Continuous bag of words: mean of token embeddings, one hidden layer (CLIP's other text tower; ignores word
    order)."""

    kind: Literal["cbow"] = Field(default="cbow", description="bag of words")
    width: int = Field(default=224, ge=8, le=2048, description="length of a token embedding")
    hidden: int = Field(default=1024, ge=8, le=8192, description="units of the hidden layer")
    context_length: int = Field(default=32, ge=4, le=512, description="longest text in tokens; the rest is truncated")


class TransformerTower(Section):
    """open_clip's text transformer."""

    kind: Literal["transformer"] = Field(description="transformer")
    width: int = Field(default=192, ge=16, le=2048, description="channels")
    layers: int = Field(default=4, ge=1, le=64, description="blocks")
    heads: int = Field(default=4, ge=1, le=64, description="attention heads")
    context_length: int = Field(default=32, ge=4, le=512, description="longest text in tokens; the rest is truncated")
    causal: bool = Field(
        default=False, description="each token sees the earlier ones only, as in CLIP; otherwise all of them"
    )

    @model_validator(mode="after")
    def _divides(self) -> TransformerTower:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


ImageTower = Annotated[ResNetTower | ViTTower | TimmTower, Field(discriminator="kind")]
TextTower = Annotated[CbowTower | TransformerTower, Field(discriminator="kind")]


class EncoderConfig(Section):
    """A joint encoder, written beside its weights. One of the towers may be absent."""

    embed_dim: int = Field(default=384, ge=2, le=4096, description="length of a joint embedding")
    image: ImageTower | None = Field(default=None, description="image tower; null: the encoder knows text only")
    text: TextTower | None = Field(default=None, description="text tower; null: the encoder knows images only")
    text_projection: bool = Field(
        default=False,
        description="a linear layer after the text tower, initialised as the identity; trained even where the tower is "
        "frozen",
    )
    image_mean: tuple[Unit, Unit, Unit] = Field(default=(0.5, 0.5, 0.5), description="mean of the pixels (RGB, 0 to 1)")
    image_std: tuple[Share, Share, Share] = Field(
        default=(0.25, 0.25, 0.25), description="standard deviation of the pixels (RGB, 0 to 1)"
    )


class AugmentConfig(Section):
    """Random changes of the training pictures, drawn per picture, applied to the whole batch at once."""

    crop_scale: tuple[Share, Share] = Field(default=(0.5, 1.0), description="area of the random crop, as a share")
    flip: Unit = Field(default=0.5, description="probability of a horizontal flip")
    brightness: Unit = Field(default=0.2, description="largest change of brightness, as a factor")
    contrast: Unit = Field(default=0.2, description="largest change of contrast, as a factor")
    colour: Unit = Field(default=0.1, description="largest change of each colour channel, as a factor")
    hue: Unit = Field(default=0.0, description="probability that all colours are turned by one random angle")
    grey: Unit = Field(default=0.0, description="probability of grey")
    random_filter: Unit = Field(
        default=0.0, description="probability of a mixture with a random 3x3 filter of itself (arXiv:2007.13003)"
    )

    @model_validator(mode="after")
    def _in_order(self) -> AugmentConfig:
        require_order(crop_scale=self.crop_scale)
        return self


class ClipMethod(Section):
    """CLIP: images and captions that belong together are brought together in one space (arXiv:2103.00020)."""

    name: Literal["clip"] = Field(description="method")
    encoder: EncoderConfig = Field(default=EncoderConfig(), description="the towers to train")
    text_weights: Path | None = Field(
        default=None,
        description="encoder folder that the text tower is loaded from (pretrain/text.yaml makes one); null: random",
    )
    image_weights: Path | None = Field(
        default=None, description="encoder folder that the image tower is loaded from; null: random"
    )
    start: ImageStart | None = Field(
        default=None, description="ImageNet network that an image tower of kind timm starts from; null: none"
    )
    words: WordsLoss | None = Field(
        default=None, description="loss for data of kind photo_words; null: the captions of a batch"
    )
    freeze_text: bool = Field(
        default=False, description="leave the text tower as it is; its text_projection is still trained"
    )
    same_noun_positive: bool = Field(
        default=True,
        description="count every caption of the same main noun as right, in equal shares; false: only a picture's own "
        "caption, as in CLIP",
    )
    noun_negatives: bool = Field(
        default=False,
        description="names of all classes as further negatives of each picture; needs same_noun_positive",
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="augmentation of the pictures")
    chunk: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="encode this many pictures at a time, twice: less memory, more time, the same gradient (batch norm "
        "sees chunks of this size); null: all at once",
    )

    @model_validator(mode="after")
    def _has_text(self) -> ClipMethod:
        if self.noun_negatives and not self.same_noun_positive:
            raise ValueError("noun_negatives needs same_noun_positive: a picture's own name would be a negative")
        if self.encoder.image is None:
            raise ValueError("encoder.image is missing: CLIP trains an image tower, for example image: {kind: resnet}")
        if self.encoder.text is None and self.text_weights is None:
            raise ValueError("give encoder.text (a new text tower) or text_weights (a trained one)")
        if self.start is not None and not isinstance(self.encoder.image, TimmTower):
            raise ValueError("start needs encoder.image of kind timm")
        if self.words is not None and not self.freeze_text:
            raise ValueError("words needs freeze_text: the vocabulary is embedded once")
        if isinstance(self.encoder.image, TimmTower) and self.encoder.image.conse is not None and self.words is None:
            raise ValueError("encoder.image.conse needs words, which gives it ImageNet's classifier; or set it to null")
        if self.words is not None and self.words.conse and self.start is None:
            raise ValueError("words.conse needs start, the network whose classes it uses; or set words.conse=0")
        if self.freeze_text and self.text_weights is None:
            raise ValueError("freeze_text without text_weights would freeze random weights; name text_weights")
        return self


class TextDistillMethod(Section):
    """A small text tower learns a sentence encoder's embeddings of many nouns and phrases."""

    name: Literal["text_distill"] = Field(description="method")
    encoder: EncoderConfig = Field(default=EncoderConfig(text=CbowTower()), description="the text tower to train")
    similarity_weight: float = Field(
        default=1.0, ge=0, le=100, description="weight of the loss on similarities within the batch, beside 1 - cosine"
    )
    similarity_temperature: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="temperature of those similarities; smaller weights nearer neighbours more",
    )

    @model_validator(mode="after")
    def _has_text(self) -> TextDistillMethod:
        if self.encoder.text is None:
            raise ValueError("encoder.text is missing, for example text: {kind: cbow}")
        return self


class StickerPairs(DataSection):
    """Pictures with captions, drawn from the shipped Sticker Scenes."""

    kind: Literal["sticker_pairs"] = Field(description="captioned sticker pictures")
    root: Path | None = Field(default=None, description="folder of the stickers; null: the shipped ones")
    length: int = Field(default=1_000_000, ge=1, le=10**9, description="different pictures in one pass")
    extra_styles: bool = Field(default=False, description="draw in the further training styles too (extra_styles.json)")

    def labelled_halves(self) -> str | None:
        """Single stickers."""
        return "sticker_singles"


class CaptionTable(DataSection):
    """Photos named in a table with their captions."""

    kind: Literal["caption_table"] = Field(description="table of paths and captions")
    path: Path = Field(description="a .csv (commas) or .tsv (tabs) file with a header; a picture may have several rows")
    root: Path | None = Field(default=None, description="folder that the paths start from; null: the table's own")
    image: str = Field(default="image", min_length=1, description="name of the column of paths")
    caption: str = Field(default="caption", min_length=1, description="name of the column of texts")


class CocoCaptions(DataSection):
    """COCO's pictures and captions."""

    kind: Literal["coco_captions"] = Field(description="COCO's captions")
    images: Path = Field(description="folder of the pictures")
    annotations: Path = Field(description="captions_train2017.json")


class CaptionedShards(DataSection):
    """Photos and captions in tar files, in webdataset's layout: KEY.jpg and KEY.txt."""

    kind: Literal["captioned_shards"] = Field(description="pictures and captions in tar files")
    pattern: str = Field(
        min_length=1, description="path of the tar files, with braces or wildcards: data/cc3m-{0000..0331}.tar"
    )


CaptionedConfig = CaptionTable | CocoCaptions | CaptionedShards


class PhraseTargets(DataSection):
    """Phrases with a teacher's embeddings."""

    kind: Literal["phrase_targets"] = Field(description="phrases and their teacher embeddings")
    targets: Path = Field(description="file written by scripts/teacher_embeddings.py")
    phrases: Path | None = Field(
        default=None, description="phrase file with sampling weights; null: all phrases of the targets equally often"
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the phrases that is kept out of training (by a hash of the text)",
    )


Method = Annotated[
    ClipMethod
    | TextDistillMethod
    | SimCLRMethod
    | MoCoMethod
    | SimSiamMethod
    | BarlowTwinsMethod
    | ByolMethod
    | SwavMethod,
    Field(discriminator="name"),
]
Data = Annotated[
    StickerPairs
    | CaptionTable
    | CocoCaptions
    | CaptionedShards
    | PhotoWords
    | PhraseTargets
    | FolderData
    | CifarData
    | ShardData
    | StickerScenes
    | StickerSingles,
    Field(discriminator="kind"),
]
CAPTIONED = ("sticker_pairs", "caption_table", "coco_captions", "captioned_shards", "photo_words")
IMAGES = ("folder", "cifar", "shards", "sticker_scenes", "sticker_singles")


class PretrainConfig(Section):
    """One pretraining run."""

    out: Path = Field(description="folder of the run; it is created", json_schema_extra=FREE)
    method: Method = Field(description="method and its settings")
    data: Data = Field(description="training data")
    watch: WatchConfig = Field(default=WatchConfig(), description="measurements during training")
    loop: LoopConfig = Field(description="length, batch, checkpoints")
    optim: OptimConfig = Field(default=OptimConfig(), description="optimiser and schedule")

    @model_validator(mode="after")
    def _check_data(self) -> PretrainConfig:
        allowed = {"clip": CAPTIONED, "text_distill": ("phrase_targets",)}.get(self.method.name, IMAGES)
        of_pictures = isinstance(self.method, SslMethod) and isinstance(self.data, ImageData)
        if not of_pictures and self.data.kind not in allowed:
            kinds = " or ".join(allowed)
            raise ValueError(f"method {self.method.name} learns from data of kind {kinds}, not {self.data.kind}")
        if isinstance(self.method, ClipMethod) and (self.method.words is None) != (self.data.kind != "photo_words"):
            raise ValueError("method.words and data of kind photo_words go together")
        named = ("sticker_pairs", "photo_words")
        if isinstance(self.method, ClipMethod) and self.method.same_noun_positive and self.data.kind not in named:
            raise ValueError(
                f"method.same_noun_positive: nothing says which captions of {self.data.kind} name the same; set it to "
                "false"
            )
        check_warmup(self.loop, self.optim)
        return self


def extended(*, methods: Sequence[type[SslMethod]] = (), data: Sequence[type[ImageData]] = ()) -> type[PretrainConfig]:
    """`PretrainConfig` with additional methods and data sections."""
    if not methods and not data:
        return PretrainConfig
    fields = PretrainConfig.model_fields
    method_union = reduce(operator.or_, methods, get_args(Method)[0])
    data_union = reduce(operator.or_, data, get_args(Data)[0])
    return create_model(
        "PretrainConfig",
        __base__=PretrainConfig,
        method=(method_union, Field(discriminator="name", description=fields["method"].description)),
        data=(data_union, Field(discriminator="kind", description=fields["data"].description)),
    )
