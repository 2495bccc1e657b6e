# SPDX-License-Identifier: Apache-2.0
"""Configuration of the self-supervised methods: what each is made of and its own constants. Imports no torch.

Defaults of the methods' own constants are the papers' (ImageNet, ResNet-50). `configs/paper/NAME.yaml` has the whole
recipe of each, `configs/pretrain/NAME.yaml` one for small pictures and a CPU.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config_views import InputSpec, ViewConfig, expand_views
from pretrain.engine.config import FREE, Section

OWN_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
DETECTRON2 = ("detectron2:R18", "detectron2:R34", "detectron2:R50", "detectron2:R101")

Unit = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Width = Annotated[int, Field(ge=2, le=65536)]


class BackboneConfig(Section):
    """The network that is pretrained."""

    name: str = Field(
        default="resnet50",
        description="resnet18, 34, 50, 101; torchvision:NAME; timm:NAME; detectron2:R50 (our resnet50)",
    )
    stem: Literal["small", "imagenet", "cifar"] = Field(
        default="imagenet", description="first layers of our ResNets: small suits 64 pixels, cifar 32"
    )
    norm: Literal["bn", "gn_ws"] = Field(
        default="bn", description="bn: batch norm; gn_ws: group norm and weight standardisation"
    )
    zero_init: bool = Field(
        default=True,
        description="start every residual block of a ResNet (ours, torchvision's, timm's) as the identity; the papers "
        "of MoCo, BYOL, SwAV do not",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        library, _, model = name.rpartition(":")
        if name in OWN_RESNETS + DETECTRON2 or (library in ("torchvision", "timm") and model):
            return name
        names = ", ".join(OWN_RESNETS + DETECTRON2)
        raise ValueError(f"unknown backbone {name!r}; known are {names}, torchvision:NAME and timm:NAME")


class SslMethod(Section):
    """Section of a self-supervised method: base class; a subclass adds ``name`` and its constants."""

    many_views: ClassVar[bool] = False
    name: str = Field(description="method")
    backbone: BackboneConfig = Field(default=BackboneConfig(), description="the network to pretrain")
    views: tuple[ViewConfig, ...] = Field(description="random views of a picture, in order")
    compile: bool = Field(
        default=False,
        description="compile the backbone with torch.compile: needs a C++ compiler, and a minute or two at the start",
    )

    @model_validator(mode="after")
    def _two_views(self) -> SslMethod:
        count = len(expand_views(self.views))
        if count < 2 or (count > 2 and not self.many_views):
            number = "at least two" if self.many_views else "two"
            raise ValueError(f"views: {number} are compared, not {count}; give two entries, or one with count: 2")
        return self

    def inputs(self) -> InputSpec:
        """Input of the backbone, by the first view."""
        view = self.views[0]
        if view.normalise is None:
            return InputSpec(view.size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return InputSpec(view.size, view.normalise.mean, view.normalise.std)


class SimCLRMethod(SslMethod):
    """SimCLR: two views of a picture find each other among all views of the batch (arXiv:2002.05709)."""

    name: Literal["simclr"] = Field(description="method")
    hidden: Width = Field(default=2048, description="units of the projector's hidden layer")
    dim: Width = Field(default=128, description="length of the projection")
    temperature: Temperature = Field(
        default=0.1, description="temperature of the softmax: .1 on ImageNet, .5 on CIFAR-10"
    )
    lr_rule: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="optim.lr is multiplied: linear by batch / 256 (.3 in the paper), sqrt by the root of the batch "
        "(.075); none: taken as it is",
    )


class MoCoMethod(SslMethod):
    """MoCo: a query finds its key among a queue of a momentum encoder's earlier keys (arXiv:1911.05722, 2003.04297)."""

    name: Literal["moco_v1", "moco_v2"] = Field(description="method; v2 has an MLP head")
    dim: Width = Field(default=128, description="length of queries and keys")
    hidden: Width = Field(default=2048, description="units of the hidden layer of v2's head")
    queue: int = Field(default=65536, ge=1, le=10**7, description="keys in the queue; any number")
    momentum: Unit = Field(default=0.999, description="momentum of the key encoder")
    temperature: Temperature = Field(description="temperature of the softmax: .07 in v1, .2 in v2")
    symmetric: bool = Field(default=False, description="each view is query once and key once")
    bn_splits: int = Field(
        default=8,
        ge=1,
        le=64,
        description="on one process: groups that batch norm treats as separate GPUs would; 1 is ordinary batch norm",
    )


class SimSiamMethod(SslMethod):
    """SimSiam: predict the other view's projection, whose gradient is stopped (arXiv:2011.10566)."""

    name: Literal["simsiam"] = Field(description="method")
    dim: Width = Field(default=2048, description="length of projection and prediction")
    layers: Literal[2, 3] = Field(default=3, description="layers of the projector; 2 on CIFAR-10")
    hidden: Width = Field(default=512, description="units of the predictor's bottleneck, a quarter of dim")
    constant_predictor_lr: bool = Field(default=True, description="the predictor's learning rate does not decay")


class BarlowTwinsMethod(SslMethod):
    """Barlow Twins: the correlation of two views' features becomes the identity (arXiv:2103.03230)."""

    name: Literal["barlow_twins"] = Field(description="method")
    dims: tuple[Width, ...] = Field(default=(8192, 8192, 8192), description="layers of the projector")
    lambd: float = Field(default=0.0051, ge=0, le=10, description="weight of the off-diagonal terms")
    bias_lr_ratio: float = Field(
        default=0.024,
        gt=0,
        le=10,
        description="learning rate of biases and norms beside that of the weights: .0048 / .2 in the authors' code",
    )
    gradient_scale: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="1: the true gradient; 1 / processes is what the authors' code has on several GPUs, and what "
        "its learning rate for biases was tuned to",
    )


class ByolMethod(SslMethod):
    """BYOL: predict a momentum network's projection of another view (arXiv:2006.07733, 2010.10241)."""

    name: Literal["byol", "byol_gn"] = Field(description="method; byol_gn has no batch statistics anywhere")
    hidden: Width = Field(default=4096, description="units of the hidden layers of projector and predictor")
    dim: Width = Field(default=256, description="length of projection and prediction")
    momentum: Unit = Field(
        default=0.996, description="momentum of the target network at the first step; it rises to 1 at the last"
    )

    @model_validator(mode="after")
    def _norm(self) -> ByolMethod:
        norm = "gn_ws" if self.name == "byol_gn" else "bn"
        if self.backbone.norm != norm:
            raise ValueError(f"{self.name} goes with backbone.norm: {norm}, not {self.backbone.norm}")
        return self


class SwavMethod(SslMethod):
    """SwAV: predict from one view to which prototypes another was assigned (arXiv:2006.09882)."""

    many_views = True
    name: Literal["swav"] = Field(description="method")
    hidden: Width = Field(default=2048, description="units of the projector's hidden layer")
    dim: Width = Field(default=128, description="length of the projection and of a prototype")
    prototypes: Width = Field(default=3000, description="number of prototypes")
    big_crops: int = Field(default=2, ge=2, le=16, description="views that give codes; they come first in views")
    temperature: Temperature = Field(default=0.1, description="temperature of the softmax over prototypes")
    epsilon: float = Field(default=0.05, gt=0, le=10, description="sharpness of the codes; smaller is sharper")
    iterations: int = Field(default=3, ge=1, le=100, description="iterations of Sinkhorn-Knopp")
    freeze_steps: int = Field(default=313, ge=0, le=10**7, description="steps before the prototypes begin to learn")
    queue_length: int = Field(
        default=0, ge=0, le=10**7, description="earlier embeddings per big crop that take part in the assignment"
    )
    queue_start: int = Field(default=0, ge=0, le=10**7, description="steps before the queue begins to fill")

    @model_validator(mode="after")
    def _check_views(self) -> SwavMethod:
        if self.big_crops > len(expand_views(self.views)):
            raise ValueError(f"big_crops {self.big_crops}: views has only {len(expand_views(self.views))}")
        return self


class WatchConfig(Section):
    """Monitoring of a training; the health panel is in every log line. Nothing here changes the training."""

    probe_every: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="steps between kNN probes of the backbone; 0: none",
        json_schema_extra=FREE,
    )
    probe_data: str | None = Field(
        default=None,
        description="labelled pictures of the probe: sticker_singles, cifar:ROOT, or a folder with train/CLASS/ and "
        "val/CLASS/; null: the stickers or CIFAR-10 where data has them, otherwise there is no probe",
        json_schema_extra=FREE,
    )
    probe_pictures: int = Field(
        default=2000,
        ge=2,
        le=10**7,
        description="number of labelled pictures that kNN searches, kept in memory; half as many queries",
        json_schema_extra=FREE,
    )
    probe_seconds: float = Field(
        default=20.0, gt=0, le=86400, description="time budget of one probe", json_schema_extra=FREE
    )
