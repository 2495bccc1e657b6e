# SPDX-License-Identifier: Apache-2.0
"""An image tower out of timm's EfficientNet family: stem, stages, last convolution, average pool, projection.

Shapes: `N` pictures, `S` side, `F` pooled features, `D` joint embedding. A projection of the pooled map lets
a detector pool a box out of the map in place of the picture (F-VLM, arXiv:2209.15639).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pretrain.config_photos import TimmTower
from pretrain.engine.errors import UserError
from pretrain.nets.conse import ConseProjection

PARTS = ("conv_stem", "bn1", "blocks", "conv_head", "bn2")
"""Of timm's EfficientNets, from the picture to the last map."""


def create_efficientnet(name: str, *, key: str, classes: int | None = None) -> nn.Module:
    """timm's network with random weights.

    Args:
        name: in timm.
        key: of the configuration that names it, for messages.
        classes: of its classifier; None: as many as timm's weights have.

    Raises:
        UserError: unknown to timm, or a network of another family.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"{key}: timm has no model {name!r}")
    network = timm.create_model(name, pretrained=False, num_classes=classes)
    if not {*PARTS, "classifier"} <= {child for child, _ in network.named_children()}:
        raise UserError(f"{key}: {name} is not of the EfficientNet family; take tf_efficientnet_lite0 to 4")
    return network


class TimmImage(nn.Module):
    """(N, 3, S, S) -> (N, D). Batch norms always use their stored statistics.

    Raises:
        UserError: unknown to timm, or a network of another family.
    """

    def __init__(self, *, tower: TimmTower, embed_dim: int) -> None:
        super().__init__()
        self.backbone = create_efficientnet(tower.name, key="encoder.image.name", classes=0)
        self.width = cast(int, self.backbone.num_features)
        learned = nn.Linear(self.width, embed_dim)
        nn.init.normal_(learned.weight, std=self.width**-0.5)
        nn.init.zeros_(learned.bias)
        self.proj = learned if tower.conse is None else ConseProjection(learned, conse=tower.conse)
        self.frozen_stages = 0

    @property
    def learned(self) -> nn.Linear:
        """The trained projection, without ConSE."""
        return self.proj if isinstance(self.proj, nn.Linear) else self.proj.learned

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The network's stages between stem and last convolution."""
        return list(cast(nn.Sequential, self.backbone.blocks))

    def freeze(self, stages: int) -> None:
        """Train no stem and none of the first `stages` stages; of more stages than there are, nothing but `proj`."""
        self.frozen_stages = min(stages, len(self.stages) + 1)
        children = dict(self.backbone.named_children())
        frozen = [children["conv_stem"], children["bn1"], *self.stages[:stages]] if stages else []
        frozen += [children["conv_head"], children["bn2"]] if stages > len(self.stages) else []
        for part in frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> TimmImage:
        """Batch norms stay in eval mode."""
        super().train(mode)
        for part in self.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def lower(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> the map after the frozen stages, without gradient where there are any."""
        children = dict(self.backbone.named_children())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_stages):
            x = children["bn1"](children["conv_stem"](pixels))
            for stage in self.stages[: self.frozen_stages]:
                x = stage(x)
        return x

    def upper(self, x: Tensor) -> Tensor:
        """The map of `lower` -> (N, width) pooled features."""
        return pooled(self.backbone, x, first_stage=self.frozen_stages)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(self.upper(self.lower(pixels)))


def pooled(network: nn.Module, x: Tensor, *, first_stage: int) -> Tensor:
    """The map before a stage of an EfficientNet -> (N, width), by its further stages and average pool."""
    children = dict(network.named_children())
    for stage in list(cast(nn.Sequential, children["blocks"]))[first_stage:]:
        x = stage(x)
    return children["bn2"](children["conv_head"](x)).mean((2, 3))
