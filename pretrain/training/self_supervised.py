# SPDX-License-Identifier: Apache-2.0
"""A backbone that learns from views of pictures: SimCLR, MoCo, BYOL, SwAV, SimSiam, Barlow Twins, and added ones."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from pretrain.config import PretrainConfig
from pretrain.config_ssl import SslMethod
from pretrain.config_views import ImageData
from pretrain.data.crops import ViewSource
from pretrain.data.images import Builders, build_images
from pretrain.engine.distributed import pick_device
from pretrain.methods.build import NO_MORE, Methods, build_method, method_optim
from pretrain.monitor import monitored
from pretrain.nets.backbones import save_backbone
from pretrain.training.parts import PretrainingParts, require_distinct

NO_DATA: Builders = MappingProxyType({})


def build_self_supervised(
    cfg: PretrainConfig, *, methods: Methods = NO_MORE, data: Builders = NO_DATA
) -> PretrainingParts:
    """The monitored method, the views it learns from, and the optimiser with the method's learning-rate rule.

    Args:
        cfg: its method is self-supervised, its data are pictures.
        methods: further methods, by the class of their section.
        data: what opens further sets of pictures, by the class of their section.

    Raises:
        UserError: the data are missing, or the batch does not fit them or the method.
    """
    method, images, loop = cfg.method, cfg.data, cfg.loop
    if not isinstance(method, SslMethod) or not isinstance(images, ImageData):
        raise TypeError(f"{method.name} is not self-supervised")
    learner = build_method(
        method, batch_size=loop.batch_size // loop.accumulate, device=pick_device(loop.device), more=methods
    )
    source = ViewSource(build_images(images, more=data), method.views, loop.seed)
    require_distinct(loop, source)
    size, mean, std = inputs = method.inputs()

    def save(folder: Path) -> str:
        backbone = learner.backbone
        save_backbone(folder, backbone, config=method.backbone, method=method.name, size=size, mean=mean, std=std)
        return f"backbone {method.backbone.name} by {method.name}"

    return PretrainingParts(
        task=monitored(learner, cfg.watch, images, inputs),
        source=source,
        optim=method_optim(method, cfg.optim, batch_size=loop.batch_size, more=methods),
        save=save,
    )
