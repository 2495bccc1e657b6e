# SPDX-License-Identifier: Apache-2.0
"""Configuration of pictures to learn from and of the random views that are made of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from pretrain.engine.config import Section

Unit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=100)]
Strength = Annotated[float, Field(ge=0, le=1)]
HueStrength = Annotated[float, Field(ge=0, le=0.5)]


def require_order(**ranges: tuple[float, float]) -> None:
    """Compare the ends of ranges, by their keys.

    Raises:
        ValueError: one runs backwards.
    """
    for name, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{name} [{low}, {high}] is not in order; give the smaller value first")


class Normalise(Section):
    """Mean and deviation that pixels (RGB, 0 to 1) are normalised with; the defaults are ImageNet's."""

    mean: tuple[Unit, Unit, Unit] = Field(default=(0.485, 0.456, 0.406), description="mean of each channel")
    std: tuple[Share, Share, Share] = Field(
        default=(0.229, 0.224, 0.225), description="standard deviation of each channel"
    )


class ViewConfig(Section):
    """One random view of a picture; the defaults are those of MoCo v2 (arXiv:2003.04297) at 224 pixels.

    The steps are, in this order: crop, flip, colour jitter, grey, blur, solarise, normalise.
    """

    size: int = Field(default=224, ge=8, le=2048, description="side of the view in pixels")
    crop_scale: tuple[Share, Share] = Field(default=(0.2, 1.0), description="area of the crop, as a share")
    crop_ratio: tuple[Positive, Positive] = Field(default=(3 / 4, 4 / 3), description="width by height of the crop")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="how the crop is resized; both are antialiased"
    )
    flip: Unit = Field(default=0.5, description="probability of a horizontal flip")
    jitter: tuple[Strength, Strength, Strength, HueStrength] = Field(
        default=(0.4, 0.4, 0.4, 0.1),
        description="largest change of brightness, contrast, saturation (factors), hue (turns of the circle)",
    )
    jitter_p: Unit = Field(default=0.8, description="probability of the colour jitter")
    grey_p: Unit = Field(default=0.2, description="probability of grey")
    grey_first: bool = Field(default=False, description="grey before the colour jitter, as in MoCo v1")
    blur_p: Unit = Field(default=0.5, description="probability of the Gaussian blur")
    blur_sigma: tuple[Positive, Positive] = Field(
        default=(0.1, 2.0), description="standard deviation of the blur in pixels, drawn uniformly"
    )
    solarise_p: Unit = Field(default=0.0, description="probability that pixels from half brightness up are inverted")
    normalise: Normalise | None = Field(
        default=Normalise(), description="mean and deviation to normalise with; null: pixels stay in 0 to 1"
    )
    count: int = Field(default=1, ge=1, le=64, description="how many views like this one are drawn of a picture")

    @model_validator(mode="after")
    def _in_order(self) -> ViewConfig:
        require_order(crop_scale=self.crop_scale, crop_ratio=self.crop_ratio, blur_sigma=self.blur_sigma)
        return self


def expand_views(views: Sequence[ViewConfig]) -> list[ViewConfig]:
    """One config per view: those with ``count`` above 1 are repeated, in place. The order of a batch's ``views``."""
    return [view for view in views for _ in range(view.count)]


class InputSpec(NamedTuple):
    """Input of a backbone: side of a picture in pixels, mean and standard deviation of RGB in [0, 1]."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]


class DataSection(Section):
    """Section of a data set: base class; a subclass adds ``kind`` and its keys."""

    kind: str = Field(description="kind of data")

    def labelled_halves(self) -> str | None:
        """Labelled training and test pictures of the same kind, by `pretrain.evaluation.data.open_data`'s names."""
        return None


class ImageData(DataSection):
    """Section of a set of pictures, as self-supervised methods learn from: base class."""


class FolderData(ImageData):
    """Pictures of a folder and its subfolders."""

    kind: Literal["folder"] = Field(default="folder", description="pictures of a folder")
    root: Path = Field(description="the folder")
    classes: bool = Field(
        default=False, description="the subfolders directly below root are classes, as in ImageNet's layout"
    )


class CifarData(ImageData):
    """CIFAR-10 from a local copy of its binary version."""

    kind: Literal["cifar"] = Field(description="CIFAR-10, binary version")
    root: Path = Field(description="folder with data_batch_1.bin … (or with cifar-10-batches-bin in it)")
    split: Literal["train", "test"] = Field(default="train", description="the 50,000 or the 10,000 pictures")

    def labelled_halves(self) -> str | None:
        """Its two halves."""
        return f"cifar:{self.root}"


class ShardData(ImageData):
    """Pictures in tar files, in webdataset's layout."""

    kind: Literal["shards"] = Field(description="pictures in tar files")
    pattern: str = Field(
        min_length=1, description="path of the tar files, with braces or wildcards: data/train-{0000..0146}.tar"
    )


class StickerScenes(ImageData):
    """Pictures of the shipped Sticker Scenes, with several objects each and no labels."""

    kind: Literal["sticker_scenes"] = Field(description="unlabelled sticker scenes")
    root: Path | None = Field(default=None, description="folder of the stickers; null: the shipped ones")
    split: Literal["train", "val"] = Field(default="train", description="val: held-out style and photos")
    size: int = Field(default=160, ge=64, le=1024, description="side of a scene in pixels")
    length: int = Field(default=100_000, ge=1, le=10**9, description="different scenes in one pass")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="scenes of different seeds share nothing")

    def labelled_halves(self) -> str | None:
        """Its two halves."""
        return "sticker_singles"


class StickerSingles(ImageData):
    """Single stickers with their class, for kNN and linear probe: train on some styles, test on another."""

    kind: Literal["sticker_singles"] = Field(description="single labelled stickers")
    root: Path | None = Field(default=None, description="folder of the stickers; null: the shipped ones")
    split: Literal["train", "val"] = Field(
        default="train",
        description="train: the training styles on training photos; val: the held-out style and photos",
    )
    size: int = Field(default=64, ge=16, le=1024, description="side of a picture in pixels")
    views: int = Field(default=1, ge=1, le=1000, description="pictures of each drawing, each on its own photo")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="seed of photos, places and lights")

    def labelled_halves(self) -> str | None:
        """Its two halves."""
        return "sticker_singles"


ImagesConfig = Annotated[
    FolderData | CifarData | ShardData | StickerScenes | StickerSingles, Field(discriminator="kind")
]
