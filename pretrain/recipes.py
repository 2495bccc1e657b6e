# SPDX-License-Identifier: Apache-2.0
"""From the config of a self-supervised method to the module that learns: the one place that puts the parts together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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
from pretrain.config_views import expand_views
from pretrain.engine.config import OptimConfig
from pretrain.engine.distributed import world_size
from pretrain.engine.errors import UserError
from pretrain.health import Watched
from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, split_batch_norm
from pretrain.methods.simclr import SimCLR, scaled_lr
from pretrain.methods.simsiam import SimSiam
from pretrain.methods.swav import SwAV
from pretrain.nets.backbones import build_backbone, parameter_bytes
from pretrain.nets.heads import mlp
from pretrain.views import ViewAugment

HEAD_INPUT = 2048  # width of a ResNet-50, as far as memory is concerned
COPIES = 3  # of each parameter while it trains: itself, its gradient, its velocity


def build_method(config: SslMethod, *, batch_size: int, device: torch.device) -> nn.Module:
    """The method with fresh weights, drawn from torch's generator.

    Args:
        config: Section of the method.
        batch_size: Of one step, over all processes.
        device: Where it will train; several GPUs share their batch norm where the paper's recipe does.

    Raises:
        UserError: The batch is too small, or the network is wider than the memory.
    """
    if batch_size // world_size() < 2:
        raise UserError(f"loop.batch_size: {batch_size} leaves a process one picture; batch norm needs two")
    refuse_too_wide(config, device)
    backbone = build_backbone(config.backbone)
    task = _task(config, backbone, [ViewAugment(view) for view in expand_views(config.views)], batch_size)
    shares_norm = not isinstance(config, MoCoMethod)  # MoCo shuffles instead (§3.3)
    if shares_norm and device.type == "cuda" and world_size() > 1:
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activations inside timm's batch norms

        task = convert_sync_batchnorm(task)
    if config.compile:
        for part in task.modules():  # the momentum copy too
            if isinstance(part, type(backbone)):
                part.compile()  # in place: parameters keep their names, so a checkpoint fits either way
    return task


def _task(
    config: SslMethod, backbone: nn.Module, augment: list[Callable[[Tensor], Tensor]], batch_size: int
) -> nn.Module:
    width = int(backbone.width)  # type: ignore[arg-type]
    if isinstance(config, SimCLRMethod):
        projector = mlp([width, config.hidden, config.dim], last_norm="scale", init_std=0.01)
        return SimCLR(backbone=backbone, projector=projector, augment=augment, temperature=config.temperature)
    if isinstance(config, MoCoMethod):
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
        if config.name == "moco_v1":
            projector = mlp([width, config.dim], last_bias=True)
        else:
            projector = mlp([width, config.hidden, config.dim], norm="none", bias=True, last_bias=True)
        return MoCo(
            backbone=split_batch_norm(backbone, splits),
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
            projector=mlp([width, *[config.dim] * config.layers], last_norm="plain"),
            predictor=mlp([config.dim, config.hidden, config.dim], last_bias=True),
            augment=augment,
            constant_predictor_lr=config.constant_predictor_lr,
        )
    if isinstance(config, BarlowTwinsMethod):
        return BarlowTwins(
            backbone=backbone,
            projector=mlp([width, *config.dims]),
            augment=augment,
            lambd=config.lambd,
            bias_lr_ratio=config.bias_lr_ratio,
            gradient_scale=config.gradient_scale,
        )
    if isinstance(config, ByolMethod):
        norm = config.backbone.norm
        return BYOL(
            backbone=backbone,
            projector=mlp([width, config.hidden, config.dim], norm=norm, bias=True),
            predictor=mlp([config.dim, config.hidden, config.dim], norm=norm, bias=True),
            augment=augment,
            momentum=config.momentum,
        )
    if not isinstance(config, SwavMethod):
        raise TypeError(f"no recipe for {type(config).__name__}")
    return SwAV(
        backbone=backbone,
        projector=mlp([width, config.hidden, config.dim], bias=True, last_bias=True),
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


def method_optim(config: SslMethod, optim: OptimConfig, *, batch_size: int) -> OptimConfig:
    """The optimiser with SimCLR's learning-rate rule applied."""
    if not isinstance(config, SimCLRMethod) or config.lr_rule == "none":
        return optim
    return optim.model_copy(update={"lr": scaled_lr(optim.lr, batch_size, rule=config.lr_rule)})


def watched(task: nn.Module, config: SslMethod, watch: WatchConfig) -> Watched:
    """The task with its health panel and, where it is asked for, a kNN probe on single stickers."""
    if not watch.probe_every:
        return Watched(task)
    from pretrain.probes import Normalise, Probe, open_data

    size, mean, std = input_of(config)
    train, test, _ = open_data("sticker_singles", size=size)
    probe = Probe(train, test, Normalise(size, mean, std), seconds=watch.probe_seconds)
    return Watched(task, probe=probe, probe_every=watch.probe_every)


def input_of(config: SslMethod) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(side, mean, standard deviation) of what the backbone sees, by the first view."""
    view = config.views[0]
    if view.normalise is None:
        return view.size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return view.size, view.normalise.mean, view.normalise.std


def refuse_too_wide(config: SslMethod, device: torch.device) -> None:
    """Say what heads, queue and Barlow Twins' correlation would need, before the memory runs out.

    Raises:
        UserError: More than there is.
    """
    if not isinstance(config, BarlowTwinsMethod):
        _refuse_wide_heads(config, device)
        return
    with torch.device("meta"):
        projector = mlp([HEAD_INPUT, *config.dims])
    weights, correlation = parameter_bytes(projector) * COPIES, 3 * 4 * config.dims[-1] ** 2
    free = _free_memory(device)
    if weights + correlation > free:
        gib = 2.0**30
        raise UserError(
            f"method.dims: a projector of {list(config.dims)} needs about {weights / gib:.1f} GiB to train and "
            f"{correlation / gib:.1f} GiB for the correlation matrix; {free / gib:.1f} GiB are free on {device}. "
            "Take smaller layers"
        )


def _refuse_wide_heads(config: SslMethod, device: torch.device) -> None:
    sizes = config.model_dump()
    dim, hidden = int(sizes["dim"]), int(sizes.get("hidden", 0))
    first = hidden or dim
    numbers = HEAD_INPUT * first + first * dim  # of a projector; predictors and further layers below
    kept = 0
    if isinstance(config, SimSiamMethod):
        numbers = HEAD_INPUT * dim + (config.layers - 1) * dim * dim + 2 * dim * hidden
    elif isinstance(config, ByolMethod):
        numbers, kept = numbers + 2 * dim * hidden, numbers
    elif isinstance(config, MoCoMethod):
        kept = numbers + config.queue * dim
    elif isinstance(config, SwavMethod):
        numbers, kept = numbers + config.prototypes * dim, config.big_crops * config.queue_length * dim
    needed, free = 4 * (numbers * COPIES + kept), _free_memory(device)
    if needed > free:
        gib = 2.0**30
        named = [name for name in ("hidden", "dim", "queue", "queue_length", "prototypes") if sizes.get(name)]
        named.sort(key=lambda name: -int(sizes[name]))  # the likeliest mistake first
        raise UserError(
            f"method.{named[0]}: heads and queue of {', '.join(f'{name} {sizes[name]}' for name in named)} need about "
            f"{needed / gib:.1f} GiB to train; {free / gib:.1f} GiB are free on {device}. Take smaller ones"
        )


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:  # free pages alone would not do: the page cache makes room when asked
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux: all that the machine has
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
