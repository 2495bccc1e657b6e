# SPDX-License-Identifier: Apache-2.0
"""From the config of a self-supervised method to the module that learns.

What is particular to a method stands in its own file (`SelfSupervised.from_config`, `head_memory`, `learning_rate`);
`METHODS` is the table of ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
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
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.methods.swav import SwAV
from pretrain.nets.backbones import build_backbone

COPIES = 3  # of each parameter while it trains: itself, its gradient, its velocity
GIB = 2.0**30

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
        config: Section of the method.
        batch_size: Of one pass, over all processes.
        device: Where it will train; several GPUs share their batch norm where the paper's recipe does.
        more: Methods beside `METHODS`.

    Raises:
        UserError: The batch is too small, the backbone cannot take the views, or the heads are wider than the memory.
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


def refuse_too_wide(method: type[SelfSupervised[Any]], config: SslMethod, width: int, device: torch.device) -> None:
    """Say what heads, queue and Barlow Twins' correlation would need, before the memory runs out.

    Args:
        method: The method.
        config: Its section.
        width: Of the backbone's features.
        device: Whose memory it is.

    Raises:
        UserError: More than there is.
    """
    with torch.device("meta"):
        memory = method.head_memory(config, width)
    heads, free = COPIES * memory.trained, _free_memory(device)
    if heads + memory.kept <= free:
        return
    sizes = config.model_dump()
    widths = ("dims", "hidden", "dim", "queue", "queue_length", "prototypes")
    named = {name: sizes[name] for name in widths if sizes.get(name)}
    largest = max(named, key=lambda name: max(named[name]) if name == "dims" else named[name], default="")
    kept = f" and {memory.kept / GIB:.1f} GiB for {memory.kept_for}" if memory.kept_for else ""
    key = f"method.{largest}" if largest else f"method {config.name}"  # the largest is the likeliest mistake
    raise UserError(
        f"{key}: heads of {', '.join(f'{name} {value}' for name, value in named.items())} need about "
        f"{heads / GIB:.1f} GiB to train{kept}; {free / GIB:.1f} GiB are free on {device}. Take smaller ones"
    )


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:  # free pages alone would not do: the page cache makes room when asked
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux: all that the machine has
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
