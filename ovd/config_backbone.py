# SPDX-License-Identifier: Apache-2.0
"""Which network a detector's backbone is, and how its pixels are normalised."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pretrain.engine.config import LATER, Section

RESNET = "resnet"
LIBRARIES = ("timm", "torchvision")
BATCH_NORMS = ("FrozenBN", "BN", "SyncBN")

Pixel = Annotated[float, Field(ge=0, le=255)]
Deviation = Annotated[float, Field(gt=0, le=255)]


class NetworkConfig(Section):
    """The network of a backbone; subclasses say how its stages are used."""

    name: str = Field(
        RESNET,
        description="resnet: by depth and stem; timm:NAME or torchvision:NAME: any network of theirs that gives a "
        "feature pyramid, its stages called by stride (res2: 4, res3: 8, res4: 16, res5: 32)",
        json_schema_extra=LATER,
    )
    pixel_mean: tuple[Pixel, Pixel, Pixel] | None = Field(
        None, description="mean of RGB in 0 to 255; null: what the weights were trained with", json_schema_extra=LATER
    )
    pixel_std: tuple[Deviation, Deviation, Deviation] | None = Field(
        None, description="deviation of RGB in 0 to 255; null: as for pixel_mean", json_schema_extra=LATER
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        library, _, model = name.partition(":")
        if name == RESNET or (library in LIBRARIES and model):
            return name
        raise ValueError(f"unknown backbone {name!r}; known are {RESNET}, timm:NAME and torchvision:NAME")

    @model_validator(mode="after")
    def _both_or_none(self) -> NetworkConfig:
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise ValueError("pixel_mean and pixel_std belong together: set both, or neither")
        return self

    @property
    def is_resnet(self) -> bool:
        """Whether depth and stem describe the network."""
        return self.name == RESNET
