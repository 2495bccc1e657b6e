# SPDX-License-Identifier: Apache-2.0
"""Configuration of the self-supervised methods; the defaults are each paper's at 224 pixels. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config_views import ViewConfig
from pretrain.engine.config import Section

Momentum = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Width = Annotated[int, Field(ge=1, le=65536)]


class BackboneConfig(Section):
    """The network that is pretrained and kept: pictures to pooled features."""

    name: str = Field(
        default="resnet50",
        pattern=r"^(resnet(18|34|50|101)|(torchvision|timm|detectron2):[A-Za-z0-9_.\-]+)$",
        description="resnet18, 34, 50 or 101 (ours, with torchvision's parameter names), torchvision:NAME, timm:NAME, or "
        "detectron2:R18, R34, R50, R101 (the stride in the 1x1 convolution, as in Detectron2's own ResNets).",
    )
    stem: Literal["small", "imagenet", "cifar"] = Field(
        default="imagenet",
        description="First layer of our ResNets: imagenet 7x7, stride 2, max pool; small 3x3, stride 2, max pool; "
        "cifar 3x3, stride 1, no pool.",
    )
    norm: Literal["bn", "gn_ws"] = Field(
        default="bn", description="Batch norm; or group norm (16 groups) with weight-standardised convolutions."
    )
    zero_init: bool = Field(
        default=False, description="Residual blocks begin as the identity: the gain of their last norm is 0."
    )

    @model_validator(mode="after")
    def _stem_is_ours(self) -> BackboneConfig:
        if self.stem != "imagenet" and not self.name.startswith(("resnet", "detectron2:")):
            raise ValueError(f"stem {self.stem} is for our ResNets; {self.name} has its own: remove stem")
        return self


class SelfSupervised(Section):
    """What every method has."""

    backbone: BackboneConfig = Field(default=BackboneConfig(), description="The network that is kept.")
    lr_rule: Literal["fixed", "linear", "sqrt"] = Field(
        default="fixed",
        description="The learning rate is optim.lr (fixed), times loop.batch_size / lr_batch (linear), or times the "
        "square root of that (sqrt).",
    )
    lr_batch: int = Field(
        default=256, ge=1, le=10**6, description="The batch size at which lr_rule leaves optim.lr as it is."
    )

    def rate(self, lr: float, batch_size: int) -> float:
        """The learning rate for a batch size, by ``lr_rule``."""
        return lr * (batch_size / self.lr_batch) ** {"fixed": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_rule]


# --- SimCLR, MoCo, SimSiam, Barlow Twins -----------------------------------------------------------------------------

SIMCLR_VIEW = ViewConfig(  # arXiv:2002.05709, appendix A; strength 1; the authors' code does not normalise
    crop_scale=(0.08, 1.0), interpolation="bicubic", jitter=(0.8, 0.8, 0.8, 0.2), normalise=None, count=2
)
MOCO_V1_VIEW = ViewConfig(  # arXiv:1911.05722, section 3.3, and the authors' code for the order
    jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_first=True, blur_p=0.0, count=2
)
MOCO_V2_VIEW = ViewConfig(count=2)  # arXiv:2003.04297; SimSiam's as well
BYOL_VIEW_1 = ViewConfig(  # arXiv:2006.07733, table 6; Barlow Twins' as well
    crop_scale=(0.08, 1.0), interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0, solarise_p=0.0
)
BYOL_VIEW_2 = BYOL_VIEW_1.model_copy(update={"blur_p": 0.1, "solarise_p": 0.2})


class SimClrMethod(SelfSupervised):
    """SimCLR: a picture's two views find each other among all views of the batch (arXiv:2002.05709)."""

    name: Literal["simclr"] = Field(description="Method.")
    backbone: BackboneConfig = Field(default=BackboneConfig(zero_init=True), description="The network that is kept.")
    views: tuple[ViewConfig, ...] = Field(default=(SIMCLR_VIEW,), description="Random views; two in all.")
    hidden: Width = Field(default=2048, description="Width of the projector's hidden layers.")
    dim: Width = Field(default=128, description="Length of a projection.")
    layers: int = Field(default=2, ge=2, le=8, description="Linear layers of the projector; SimCLR v2 has 3.")
    temperature: Temperature = Field(default=0.1, description="Of the softmax; .5 on CIFAR-10.")


class Moco(SelfSupervised):
    """MoCo: a query finds its key, made by a slow copy, among a queue of earlier keys."""

    views: tuple[ViewConfig, ...] = Field(default=(MOCO_V2_VIEW,), description="Random views; two: query, key.")
    dim: Width = Field(default=128, description="Length of a key.")
    queue_size: int = Field(default=65536, ge=1, le=10**8, description="Keys in the queue, over all processes.")
    momentum: Momentum = Field(default=0.999, description="Of the slow copy; the same in every step.")
    symmetric: bool = Field(default=False, description="Each view is query and key once; the losses are added.")
    bn_splits: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="On one process, batch norm sees so many parts of the batch one by one, as on so many GPUs. Several "
        "processes shuffle the keys between them instead.",
    )


class MocoV1Method(Moco):
    """MoCo v1 (arXiv:1911.05722): linear head, temperature .07, mild views."""

    name: Literal["moco_v1"] = Field(description="Method.")
    views: tuple[ViewConfig, ...] = Field(default=(MOCO_V1_VIEW,), description="Random views; two: query, key.")
    head: Literal["linear", "mlp"] = Field(default="linear", description="Projector: one layer, or two.")
    temperature: Temperature = Field(default=0.07, description="Of the softmax.")


class MocoV2Method(Moco):
    """MoCo v2 (arXiv:2003.04297): MLP head, temperature .2, blur and stronger colours, cosine schedule."""

    name: Literal["moco_v2"] = Field(description="Method.")
    head: Literal["linear", "mlp"] = Field(default="mlp", description="Projector: one layer, or two.")
    temperature: Temperature = Field(default=0.2, description="Of the softmax.")


class SimSiamMethod(SelfSupervised):
    """SimSiam: predict the other view's projection, which no gradient enters (arXiv:2011.10566)."""

    name: Literal["simsiam"] = Field(description="Method.")
    backbone: BackboneConfig = Field(default=BackboneConfig(zero_init=True), description="The network that is kept.")
    views: tuple[ViewConfig, ...] = Field(default=(MOCO_V2_VIEW,), description="Random views; two in all.")
    dim: Width = Field(default=2048, description="Width of the projector and length of a projection.")
    layers: int = Field(default=3, ge=1, le=8, description="Linear layers of the projector; 2 on CIFAR-10.")
    bottleneck: Width = Field(default=512, description="Width of the predictor's hidden layer, a quarter of dim.")
    constant_predictor_lr: bool = Field(default=True, description="The predictor's learning rate does not decay.")
    stop_gradient: bool = Field(default=True, description="false collapses; it is there to be shown.")


class BarlowTwinsMethod(SelfSupervised):
    """Barlow Twins: the correlation between two views' channels shall be the identity (arXiv:2103.03230)."""

    name: Literal["barlow_twins"] = Field(description="Method.")
    backbone: BackboneConfig = Field(default=BackboneConfig(zero_init=True), description="The network that is kept.")
    views: tuple[ViewConfig, ...] = Field(default=(BYOL_VIEW_1, BYOL_VIEW_2), description="Random views; two in all.")
    projector: tuple[Width, ...] = Field(
        default=(8192, 8192, 8192), min_length=1, max_length=8, description="Widths of the projector's layers."
    )
    lambd: float = Field(default=0.0051, ge=0, le=100, description="Weight of the off-diagonal terms.")
    bias_lr_ratio: float = Field(
        default=0.024,
        ge=0,
        le=100,
        description="Learning rate of biases and norm layers, as a share of optim.lr: .0048 / .2 in the authors' code.",
    )
    gradient_scale: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the gradient alone. 1 / processes is what the authors' code has (32 in their runs); it "
        "changes biases and norm layers only, whose gradient LARS does not rescale.",
    )


# --- BYOL, SwAV ------------------------------------------------------------------------------------------------------

SWAV_VIEWS = (  # arXiv:2006.09882, section 4 and the authors' code
    ViewConfig(size=224, crop_scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), count=2),
    ViewConfig(size=96, crop_scale=(0.05, 0.14), jitter=(0.8, 0.8, 0.8, 0.2), count=6),
)


class ByolMethod(SelfSupervised):
    """BYOL: predict a slow copy's projection of the other view (arXiv:2006.07733)."""

    name: Literal["byol"] = Field(description="Method.")
    views: tuple[ViewConfig, ...] = Field(default=(BYOL_VIEW_1, BYOL_VIEW_2), description="Random views; two in all.")
    hidden: Width = Field(default=4096, description="Width of the hidden layer of projector and predictor.")
    dim: Width = Field(default=256, description="Length of a projection.")
    momentum: Momentum = Field(default=0.99, description="Of the slow copy at the first step; 1 at the last.")
    head_norm: Literal["bn", "gn_ws", "none"] = Field(default="bn", description="Norm in projector and predictor.")
    predictor: bool = Field(default=True, description="false collapses; it is there to be shown.")


class ByolGnMethod(ByolMethod):
    """BYOL without batch statistics: group norm and weight standardisation everywhere (arXiv:2010.10241)."""

    name: Literal["byol_gn"] = Field(description="Method.")  # type: ignore[assignment]
    backbone: BackboneConfig = Field(default=BackboneConfig(norm="gn_ws"), description="The network that is kept.")
    head_norm: Literal["bn", "gn_ws", "none"] = Field(default="gn_ws", description="Norm in projector and predictor.")
    momentum: Momentum = Field(default=0.999, description="Of the slow copy at the first step; 1 at the last.")


class SwavMethod(SelfSupervised):
    """SwAV: predict from each crop the prototypes that another crop was assigned to (arXiv:2006.09882)."""

    name: Literal["swav"] = Field(description="Method.")
    views: tuple[ViewConfig, ...] = Field(default=SWAV_VIEWS, description="Random crops, the big ones first.")
    big_crops: int = Field(default=2, ge=2, le=64, description="How many of the crops give codes.")
    hidden: Width = Field(default=2048, description="Width of the projector's hidden layer.")
    dim: Width = Field(default=128, description="Length of a projection.")
    prototypes: int = Field(default=3000, ge=2, le=10**6, description="Prototypes.")
    temperature: Temperature = Field(default=0.1, description="Of the softmax over prototypes.")
    epsilon: Temperature = Field(default=0.05, description="Sharpness of the codes; smaller is sharper.")
    iterations: int = Field(default=3, ge=1, le=100, description="Of Sinkhorn-Knopp.")
    freeze_steps: int = Field(default=313, ge=0, le=10**9, description="Steps before the prototypes begin to learn.")
    queue_length: int = Field(
        default=0, ge=0, le=10**7, description="Earlier embeddings per big crop that codes count with; 0: no queue."
    )
    queue_start: int = Field(default=0, ge=0, le=10**9, description="Steps before the queue begins to fill.")


SelfSupervisedMethod = (
    SimClrMethod
    | MocoV1Method
    | MocoV2Method
    | ByolMethod
    | ByolGnMethod
    | SwavMethod
    | SimSiamMethod
    | BarlowTwinsMethod
)


def check_method(method: SelfSupervised, *, batch_size: int, accumulate: int) -> list[str]:
    """What does not fit together, one line each; empty when all is well.

    Args:
        method: The method.
        batch_size: Pictures per optimiser step, over all processes.
        accumulate: Passes per step.
    """
    problems = []
    count = sum(view.count for view in method.views)  # type: ignore[attr-defined]
    part = batch_size // accumulate
    if part < 2:
        problems.append(f"loop.batch_size: a pass of {part} picture has nothing to compare; give at least 2")
    if isinstance(method, SwavMethod):
        if count <= method.big_crops - 1:
            problems.append(f"method.views: {count} crops, but big_crops is {method.big_crops}")
        known = part + method.queue_length
        if known < method.prototypes:
            problems.append(
                f"method.prototypes: {method.prototypes} prototypes cannot be used alike by {known} samples (a pass of "
                f"{part} and a queue of {method.queue_length}); set method.prototypes={known} or less, or "
                f"method.queue_length={method.prototypes - part} or more"
            )
    elif count != 2:
        problems.append(f"method.views: two views are compared, not {count}; give two, or one with count: 2")
    if isinstance(method, Moco):
        keys = part * (2 if method.symmetric else 1)
        if keys > method.queue_size:
            problems.append(
                f"method.queue_size: {keys} keys come at a time, more than the queue of {method.queue_size} holds; set "
                f"method.queue_size={keys} or more, or a smaller loop.batch_size"
            )
    return problems


class ByolMethod(_Method):
    """BYOL: predict what a slow copy says of another view (arXiv:2006.07733; without batch statistics 2010.10241)."""

    name: Literal["byol", "byol_gn"] = Field(description="Method; byol_gn has no batch statistics anywhere.")
    hidden: Width = Field(default=4096, description="Units of the hidden layers of projector and predictor.")
    dim: Width = Field(default=256, description="Length of projection and prediction.")
    momentum: Unit = Field(default=0.99, description="Of the slow copy at the first step; it rises to 1 at the last.")

    @model_validator(mode="after")
    def _norm(self) -> ByolMethod:
        wanted = "gn_ws" if self.name == "byol_gn" else "bn"
        if self.backbone.norm != wanted:
            raise ValueError(f"{self.name} goes with backbone.norm: {wanted}, not {self.backbone.norm}")
        return self


class SwavMethod(_Method):
    """SwAV: predict from one view to which prototypes another was assigned (arXiv:2006.09882)."""

    name: Literal["swav"] = Field(description="Method.")
    hidden: Width = Field(default=2048, description="Units of the projector's hidden layer.")
    dim: Width = Field(default=128, description="Length of the projection and of a prototype.")
    prototypes: Width = Field(default=3000, description="How many.")
    big_crops: int = Field(default=2, ge=2, le=16, description="Views that give codes; they come first in views.")
    temperature: Temperature = Field(default=0.1, description="Of the softmax over prototypes.")
    epsilon: float = Field(default=0.05, gt=0, le=10, description="Sharpness of the codes; smaller is sharper.")
    iterations: int = Field(default=3, ge=1, le=100, description="Of Sinkhorn-Knopp.")
    freeze_steps: int = Field(default=313, ge=0, le=10**7, description="Steps before the prototypes begin to learn.")
    queue_length: int = Field(
        default=0, ge=0, le=10**7, description="Earlier embeddings per big crop that take part in the assignment."
    )
    queue_start: int = Field(default=0, ge=0, le=10**7, description="Steps before the queue begins to fill.")

    @model_validator(mode="after")
    def _big_crops_are_there(self) -> SwavMethod:
        if self.big_crops > len(expand_views(self.views)):
            raise ValueError(f"big_crops {self.big_crops}: views has only {len(expand_views(self.views))}")
        return self


class WatchConfig(Section):
    """What is measured while a self-supervised method trains; the panel stands in every log line."""

    probe_every: int = Field(
        default=0, ge=0, le=10**9, description="Steps between kNN probes on single stickers; 0: none."
    )
    probe_seconds: float = Field(default=20.0, gt=0, le=86400, description="Time budget of one probe.")


SSL_METHODS = (SimCLRMethod, MoCoMethod, SimSiamMethod, BarlowTwinsMethod, ByolMethod, SwavMethod)
SslMethod = SimCLRMethod | MoCoMethod | SimSiamMethod | BarlowTwinsMethod | ByolMethod | SwavMethod
