# SPDX-License-Identifier: Apache-2.0
"""From the config of a self-supervised method to the module that learns.

What is particular to a method stands in its own file (`SelfSupervised.from_config`, `head_memory`, `learning_rate`);
`METHODS` is the table of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch

from pretrain.augment import ViewAugment
from pretrain.config_ssl import (
    BarlowTwinsMethod,
    ByolMethod,
    MoCoMethod,
    SimCLRMethod,
    SimSiamMethod,
    SslMethod,
    SwavMethod,
)
from pretrain.config_views import expand_views
from pretrain.engine.config import OptimConfig
from pretrain.engine.distributed import world_size
from pretrain.engine.errors import UserError
from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.base import SelfSupervised, width_of
from pretrain.methods.byol import BYOL
from pretrain.methods.head_memory import refuse_too_wide
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.methods.swav import SwAV
from pretrain.nets.backbones import build_backbone

Methods = Mapping[type[SslMethod], type[SelfSupervised[Any]]]
"""The class that learns by a section, by the section's class."""

METHODS: Methods = {
    SimCLRMethod: SimCLR,
    MoCoMethod: MoCo,
    SimSiamMethod: SimSiam,
    BarlowTwinsMethod: BarlowTwins,
    ByolMethod: BYOL,
    SwavMethod: SwAV,
}
NO_MORE: Methods = MappingProxyType({})


def build_method(
    config: SslMethod, *, batch_size: int, device: torch.device, more: Methods = NO_MORE
) -> SelfSupervised[Any]:
    """The method with fresh weights, drawn from torch's generator.

    Args:
        config: section of the method.
        batch_size: of one pass, over all processes.
        device: where it will train; several GPUs share their batch norm where the paper's recipe does.
        more: methods beside `METHODS`.

    Raises:
        UserError: the batch is too small, the backbone cannot take the views, or the heads are wider than the memory.
    """
    if batch_size // world_size() < 2:
        raise UserError(f"loop.batch_size: {batch_size} leaves a process one picture; batch norm needs two")
    method = {**METHODS, **more}[type(config)]
    backbone = build_backbone(config.backbone, sizes=[view.size for view in config.views])
    refuse_too_wide(method, config, width_of(backbone), device)
    task = method.from_config(
        config,
        backbone=backbone,
        augment=[ViewAugment(view) for view in expand_views(config.views)],
        batch_size=batch_size,
    )
    if method.shares_batch_norm and device.type == "cuda" and world_size() > 1:
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activations inside timm's batch norms

        task = cast("SelfSupervised[Any]", convert_sync_batchnorm(task))
    if config.compile:
        for part in task.modules():  # the momentum copy too
            if isinstance(part, type(backbone)):
                part.compile()  # in place: parameters keep their names, so a checkpoint fits either way
    return task


def method_optim(config: SslMethod, optim: OptimConfig, *, batch_size: int, more: Methods = NO_MORE) -> OptimConfig:
    """The optimiser with the method's learning-rate rule applied."""
    lr = {**METHODS, **more}[type(config)].learning_rate(config, optim.lr, batch_size=batch_size)
    return optim.model_copy(update={"lr": lr})
