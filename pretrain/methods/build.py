# SPDX-License-Identifier: Apache-2.0
"""From the config of a self-supervised method to the module that learns: the one place that puts the parts together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pretrain.augment import ViewAugment
from pretrain.config import StickerPairs
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
from pretrain.config_views import CifarImages, StickerScenes, StickerSingles, expand_views
from pretrain.engine.config import OptimConfig, Section
from pretrain.engine.distributed import is_main, world_size
from pretrain.engine.errors import UserError
from pretrain.engine.task import Task
from pretrain.health import Monitored
from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, split_batch_norm
from pretrain.methods.simclr import SimCLR, scaled_lr
from pretrain.methods.simsiam import SimSiam
from pretrain.methods.swav import SwAV
from pretrain.nets.backbones import build_backbone, parameter_bytes
from pretrain.nets.heads import mlp

COPIES = 3  # of each parameter while it trains: itself, its gradient, its velocity
GIB = 2.0**30
Inputs = tuple[int, tuple[float, ...], tuple[float, ...]]
"""What a backbone expects: side in pixels, mean and standard deviation of RGB in [0, 1]."""


def build_method(config: SslMethod, *, batch_size: int, device: torch.device) -> Task:
    """The method with fresh weights, drawn from torch's generator.

    Args:
        config: Section of the method.
        batch_size: Of one step, over all processes.
        device: Where it will train; several GPUs share their batch norm where the paper's recipe does.

    Raises:
        UserError: The batch is too small, the backbone cannot take the views, or the heads are wider than the memory.
    """
    if batch_size // world_size() < 2:
        raise UserError(f"loop.batch_size: {batch_size} leaves a process one picture; batch norm needs two")
    backbone = build_backbone(config.backbone, sizes=[view.size for view in config.views])
    refuse_too_wide(config, width_of(backbone), device)
    task = _task(config, backbone, [ViewAugment(view) for view in expand_views(config.views)], batch_size)
    shares_norm = not isinstance(config, MoCoMethod)  # MoCo shuffles instead (§3.3)
    if shares_norm and device.type == "cuda" and world_size() > 1:
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activations inside timm's batch norms

        task = cast("Task", convert_sync_batchnorm(task))
    if config.compile:
        for part in task.modules():  # the momentum copy too
            if isinstance(part, type(backbone)):
                part.compile()  # in place: parameters keep their names, so a checkpoint fits either way
    return task


def _projector(config: SslMethod, width: int) -> nn.Sequential:
    """From the backbone's features to what is compared."""
    if isinstance(config, SimCLRMethod):
        return mlp([width, config.hidden, config.dim], last_norm="scale", init_std=0.01)
    if isinstance(config, MoCoMethod):
        if config.name == "moco_v1":
            return mlp([width, config.dim], last_bias=True)
        return mlp([width, config.hidden, config.dim], norm="none", bias=True, last_bias=True)
    if isinstance(config, SimSiamMethod):
        return mlp([width, *[config.dim] * config.layers], last_norm="plain")
    if isinstance(config, BarlowTwinsMethod):
        return mlp([width, *config.dims])
    if isinstance(config, ByolMethod):
        return mlp([width, config.hidden, config.dim], norm=config.backbone.norm, bias=True)
    return mlp([width, config.hidden, config.dim], bias=True, last_bias=True)


def _predictor(config: SimSiamMethod | ByolMethod) -> nn.Sequential:
    """From one view's projection to the other's."""
    if isinstance(config, SimSiamMethod):
        return mlp([config.dim, config.hidden, config.dim], last_bias=True)
    return mlp([config.dim, config.hidden, config.dim], norm=config.backbone.norm, bias=True)


def _task(config: SslMethod, backbone: nn.Module, augment: list[Callable[[Tensor], Tensor]], batch_size: int) -> Task:
    if isinstance(config, MoCoMethod):
        backbone = _split_for_moco(config, backbone, batch_size)
    projector = _projector(config, width_of(backbone))
    if isinstance(config, SimCLRMethod):
        return SimCLR(backbone=backbone, projector=projector, augment=augment, temperature=config.temperature)
    if isinstance(config, MoCoMethod):
        return MoCo(
            backbone=backbone,
            projector=projector,
            augment=augment,
            dim=config.dim,
            queue=config.queue,
            momentum=config.momentum,
            temperature=config.temperature,
            symmetric=config.symmetric,
        )
    if isinstance(config, SimSiamMethod):
        return SimSiam(
            backbone=backbone,
            projector=projector,
            predictor=_predictor(config),
            augment=augment,
            constant_predictor_lr=config.constant_predictor_lr,
        )
    if isinstance(config, BarlowTwinsMethod):
        return BarlowTwins(
            backbone=backbone,
            projector=projector,
            augment=augment,
            lambd=config.lambd,
            bias_lr_ratio=config.bias_lr_ratio,
            gradient_scale=config.gradient_scale,
        )
    if isinstance(config, ByolMethod):
        return BYOL(
            backbone=backbone,
            projector=projector,
            predictor=_predictor(config),
            augment=augment,
            momentum=config.momentum,
        )
    if not isinstance(config, SwavMethod):
        raise TypeError(f"no recipe for {type(config).__name__}")
    return SwAV(
        backbone=backbone,
        projector=projector,
        augment=augment,
        dim=config.dim,
        prototypes=config.prototypes,
        big_crops=config.big_crops,
        temperature=config.temperature,
        epsilon=config.epsilon,
        iterations=config.iterations,
        freeze_steps=config.freeze_steps,
        queue_length=config.queue_length,
        queue_start=config.queue_start,
    )


def _split_for_moco(config: MoCoMethod, backbone: nn.Module, batch_size: int) -> nn.Module:
    """The backbone with batch norm in groups.

    Raises:
        UserError: The batch does not fit the queue or the groups.
    """
    keys = batch_size * (2 if config.symmetric else 1)
    if config.queue < keys:
        raise UserError(
            f"method.queue: {config.queue} is less than the {keys} keys of one step (loop.batch_size); take more"
        )
    splits = config.bn_splits if world_size() == 1 else 1
    if batch_size % splits or batch_size < 2 * splits:
        fitting = max(n for n in range(1, splits + 1) if batch_size % n == 0 and batch_size >= 2 * n)
        raise UserError(
            f"method.bn_splits: {batch_size} pictures (of one pass) do not make {splits} equal groups of two or "
            f"more; set method.bn_splits={fitting}, or another loop.batch_size"
        )
    return split_batch_norm(backbone, splits)


def method_optim(config: SslMethod, optim: OptimConfig, *, batch_size: int) -> OptimConfig:
    """The optimiser with SimCLR's learning-rate rule applied."""
    if not isinstance(config, SimCLRMethod) or config.lr_rule == "none":
        return optim
    return optim.model_copy(update={"lr": scaled_lr(optim.lr, batch_size, rule=config.lr_rule)})


def monitored(task: Task, watch: WatchConfig, data: Section, inputs: Inputs) -> Monitored:
    """The task with its health panel and, where it is asked for and there are labels, a kNN probe.

    Args:
        task: The method.
        watch: What to measure.
        data: What is learned from; its labelled pictures are the probe's if ``watch`` names none.
        inputs: What the backbone expects.

    Raises:
        UserError: The probe's pictures are not there.
    """
    if not watch.probe_every:
        return Monitored(task)
    named = watch.probe_data or _labelled_halves(data)
    if named is None:
        if is_main():
            print("no kNN while training: watch.probe_data names no labelled pictures (a folder with train/ and val/)")
        return Monitored(task)
    from pretrain.probes import Normalise, Probe, open_data

    size, mean, std = inputs
    train, test, _ = open_data(named, size=size, key="watch.probe_data")
    probe = Probe(
        train,
        test,
        Normalise(size, mean, std),
        seconds=watch.probe_seconds,
        bank=watch.probe_pictures,
        queries=watch.probe_pictures // 2,
    )
    name = f"{named}, {watch.probe_pictures} pictures"
    return Monitored(task, probe=probe, probe_every=watch.probe_every, probe_name=name)


def _labelled_halves(data: Section) -> str | None:
    """Where a data section has a training and a test half with labels, as ``open_data`` takes it."""
    if isinstance(data, CifarImages):
        return f"cifar:{data.root}"
    return "sticker_singles" if isinstance(data, StickerPairs | StickerScenes | StickerSingles) else None


def input_of(config: SslMethod) -> Inputs:
    """What the backbone sees, by the first view."""
    view = config.views[0]
    if view.normalise is None:
        return view.size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return view.size, view.normalise.mean, view.normalise.std


def refuse_too_wide(config: SslMethod, width: int, device: torch.device) -> None:
    """Say what heads, queue and Barlow Twins' correlation would need, before the memory runs out.

    Args:
        config: Section of the method.
        width: Of the backbone's features.
        device: Whose memory it is.

    Raises:
        UserError: More than there is.
    """
    with torch.device("meta"):
        projector = parameter_bytes(_projector(config, width))
        predictor = parameter_bytes(_predictor(config)) if isinstance(config, SimSiamMethod | ByolMethod) else 0
    heads, beside, what = COPIES * (projector + predictor), 0, ""
    if isinstance(config, BarlowTwinsMethod):
        beside, what = 3 * 4 * config.dims[-1] ** 2, "the correlation matrix"  # itself, its gradient, its square
    elif isinstance(config, MoCoMethod):
        beside, what = projector + 4 * config.queue * config.dim, "the slow head and the queue"
    elif isinstance(config, ByolMethod):
        beside, what = projector, "the slow head"
    elif isinstance(config, SwavMethod):
        heads += 4 * COPIES * config.prototypes * config.dim
        beside, what = 4 * config.big_crops * config.queue_length * config.dim, "the queue"
    free = _free_memory(device)
    if heads + beside <= free:
        return
    sizes = config.model_dump()
    widths = ("dims", "hidden", "dim", "queue", "queue_length", "prototypes")
    named = {name: sizes[name] for name in widths if sizes.get(name)}
    largest = max(named, key=lambda name: max(named[name]) if name == "dims" else named[name])  # the likeliest mistake
    kept = f" and {beside / GIB:.1f} GiB for {what}" if what else ""
    raise UserError(
        f"method.{largest}: heads of {', '.join(f'{name} {value}' for name, value in named.items())} need about "
        f"{heads / GIB:.1f} GiB to train{kept}; {free / GIB:.1f} GiB are free on {device}. Take smaller ones"
    )


def width_of(backbone: nn.Module) -> int:
    """Length of a backbone's features."""
    return int(backbone.width)  # type: ignore[arg-type]


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:  # free pages alone would not do: the page cache makes room when asked
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux: all that the machine has
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
