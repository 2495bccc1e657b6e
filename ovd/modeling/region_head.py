# SPDX-License-Identifier: Apache-2.0
"""The network that reads one region of a feature map and says where it lies in the joint space of words and pictures.

Shapes: ``R`` regions, ``S`` side of the pooled map, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch import Tensor, nn

from ovd.modeling.backbone import FITTING, RegionBlock, norm_of, stage, stage_channels, to_detectron2
from pretrain.engine.state import load_tensors


class Tower(nn.Module):
    """Pooled features of a region → (box features, joint embedding).

    Two bodies: ``conv_fc`` is the paper's head on an FPN (4 convolutions and 2 fully connected layers; the box
    regressor reads what the projection reads); ``res5`` is Detectron2's C4 head, whose last stage and projection can
    start as CLIP's own.
    """

    def __init__(
        self,
        *,
        kind: Literal["conv_fc", "res5"],
        in_channels: int,
        resolution: int,
        embed_dim: int | None,
        depth: int,
        norm: str,
        conv_dims: tuple[int, ...],
        fc_dims: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.kind, self.resolution = kind, resolution
        self.body: nn.Module
        if kind == "res5":
            self.body = nn.Sequential(*stage(depth=depth, index=5, norm=norm_of(norm), block=RegionBlock))
            channels = stage_channels(depth=depth, index=5)
            self.box_features = channels * (-(-resolution // 2)) ** 2  # a stride of 2 rounds up
            embed_features = channels
        else:
            shape = ShapeSpec(channels=in_channels, height=resolution, width=resolution)
            self.body = FastRCNNConvFCHead(
                shape, conv_dims=list(conv_dims), fc_dims=list(fc_dims), conv_norm=norm_of(norm)
            )
            self.box_features = embed_features = fc_dims[-1]
        self.projection = nn.Linear(embed_features, embed_dim) if embed_dim is not None else None

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.body(pooled)
        flat = features.flatten(1)
        if self.projection is None:
            return flat, None
        return flat, self.projection(features.mean(dim=(2, 3)) if self.kind == "res5" else flat)


def start_body(tower: Tower, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load the body of a tower of kind ``res5`` from the last stage of a torchvision-named ResNet.

    Raises:
        UserError: that stage is missing or of another shape.
    """
    last = {k.removeprefix("res5."): v for k, v in to_detectron2(state).items() if k.startswith("res5.")}
    load_tensors(tower.body, last, source=f"{source}, last stage", strict="module", hint=FITTING)


@torch.no_grad()
def start_projection(tower: Tower, weight: Tensor) -> None:
    """Start the projection of a tower as the image encoder's own, (D, channels) without a bias."""
    assert tower.projection is not None
    tower.projection.weight.copy_(weight)
    tower.projection.bias.zero_()
