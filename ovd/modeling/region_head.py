# SPDX-License-Identifier: Apache-2.0
"""The head that embeds one region of a feature map into the joint space of words and pictures.

Two kinds: `conv_fc_head` is ViLD's on an FPN (4 convolutions and 2 fully connected layers; the box regressor reads what
the projection reads); `last_stage_head` is Detectron2's C4 head, whose last stage and projection can start as those of
an image encoder.

Shapes: ``R`` regions, ``S`` side of the pooled map, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch import Tensor, nn

from ovd.modeling.backbone import MISMATCH_HINT, build_last_stage, norm_of
from ovd.modeling.library_network import Chain
from pretrain.engine.state import LoadReport, load_tensors
from pretrain.nets.checkpoints import to_detectron2

if TYPE_CHECKING:
    from ovd.config import DetectorBackboneConfig
    from ovd.config_detr import DetrBackboneConfig


class RegionHead(nn.Module):
    """Pooled features of a region → (box features, joint embedding).

    Args:
        body: maps (R, C, S, S) to (R, channels) or to (R, channels, s, s), whose average is embedded.
        channels: of its output.
        cells: s² of its output; 1 for a vector.
        resolution: S.
        embed_dim: D; None embeds nothing.
    """

    def __init__(self, *, body: nn.Module, channels: int, cells: int, resolution: int, embed_dim: int | None) -> None:
        super().__init__()
        self.body, self.resolution = body, resolution
        self.box_features = channels * cells
        self.projection = nn.Linear(channels, embed_dim) if embed_dim is not None else None

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.body(pooled)
        flat = features.flatten(1)
        if self.projection is None:
            return flat, None
        return flat, self.projection(features.mean(dim=(2, 3)) if features.ndim == 4 else flat)


def conv_fc_head(
    *,
    in_channels: int,
    resolution: int,
    norm: str,
    conv_dims: tuple[int, ...],
    fc_dims: tuple[int, ...],
    embed_dim: int | None,
) -> RegionHead:
    """ViLD's head on a pyramid, with random weights; it reads maps of ``resolution`` cells a side."""
    shape = ShapeSpec(channels=in_channels, height=resolution, width=resolution)
    body = FastRCNNConvFCHead(shape, conv_dims=list(conv_dims), fc_dims=list(fc_dims), conv_norm=norm_of(norm))
    return RegionHead(body=body, channels=fc_dims[-1], cells=1, resolution=resolution, embed_dim=embed_dim)


def last_stage_head(
    config: DetectorBackboneConfig | DetrBackboneConfig, *, resolution: int, norm: str, embed_dim: int | None
) -> RegionHead:
    """The layers after res4 of a backbone's network, with random weights, as the head of regions pooled from res4."""
    body, channels = build_last_stage(config, norm=norm)
    cells = (-(-resolution // 2)) ** 2  # a stride of 2 rounds up
    return RegionHead(body=body, channels=channels, cells=cells, resolution=resolution, embed_dim=embed_dim)


def init_body(head: RegionHead, state: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Load the body of a `last_stage_head` from the whole network's tensors, under the names of its library.

    Raises:
        UserError: that stage is missing or of another shape.
    """
    last = state
    if not isinstance(head.body, Chain):
        last = {k.removeprefix("res5."): v for k, v in to_detectron2(state).items() if k.startswith("res5.")}
    return load_tensors(head.body, last, source=f"{source}, last stage", strict="module", hint=MISMATCH_HINT)


@torch.no_grad()
def init_projection(head: RegionHead, weight: Tensor) -> None:
    """Start the projection of a head as the image encoder's own, (D, channels) without a bias."""
    assert head.projection is not None
    head.projection.weight.copy_(weight)
    head.projection.bias.zero_()
