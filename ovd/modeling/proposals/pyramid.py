# SPDX-License-Identifier: Apache-2.0
"""A frozen network of a library with a feature pyramid of its own, as a backbone of class-agnostic proposals."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor

from ovd.modeling.backbone import LibraryBackbone, load_bottom_up
from ovd.modeling.library_network import open_network, read_library_weights
from pretrain.nets.imagenet import PIXEL_MEAN, PIXEL_STD, read_imagenet

STAGES = ("res3", "res4", "res5")
PACKAGE = "package:"

Rgb = tuple[float, float, float]


class FrozenPyramid(Backbone):
    """Normalised RGB (N, 3, H, W) to ``p3``, ``p4``, ``p5``; only the pyramid learns.

    Group norms let it learn from a few pictures a step.

    Args:
        name: of the network, ``timm:NAME`` or ``torchvision:NAME``.
        channels: of each map.

    Raises:
        UserError: unknown network, or it has no maps of strides 8, 16 and 32.
    """

    size_divisibility = 32

    def __init__(self, name: str, *, channels: int) -> None:
        super().__init__()
        opened = open_network(name)
        bottom_up = LibraryBackbone(opened=opened, out_features=STAGES, freeze_at=5, norm="FrozenBN")
        self.pyramid = FPN(bottom_up, list(STAGES), channels, norm="GN")

    @property
    def network(self) -> LibraryBackbone:
        """The frozen network."""
        network = self.pyramid.bottom_up
        assert isinstance(network, LibraryBackbone)
        return network

    def freeze(self) -> None:
        """The network is frozen from the start; the pyramid learns."""

    def train(self, mode: bool = True) -> FrozenPyramid:
        """The frozen network has no batch statistics, but some have dropout: it stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        dtype = next(self.pyramid.parameters()).dtype  # an export for a CPU is bfloat16
        maps: dict[str, Tensor] = self.pyramid(pixels.to(dtype, memory_format=torch.channels_last))
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes: dict[str, ShapeSpec] = self.pyramid.output_shape()
        return shapes


def pixel_statistics(name: str, weights: str) -> tuple[Rgb, Rgb]:
    """Mean and deviation of RGB, 0…255, that a library's weights were trained with.

    Args:
        name: of the network.
        weights: as `init_from_library` takes them.

    Raises:
        UserError: no such weights, or those of another network.
    """
    if weights.startswith(PACKAGE):
        return (255 * PIXEL_MEAN,) * 3, (255 * PIXEL_STD,) * 3
    mean, std = read_library_weights(weights, name)[1] or open_network(name).statistics
    return _bytes(mean), _bytes(std)


def _bytes(values: tuple[float, ...]) -> Rgb:
    red, green, blue = (255 * value for value in values)
    return red, green, blue


def init_from_library(backbone: FrozenPyramid, weights: str, *, name: str) -> None:
    """Load the frozen network; the pyramid stays random.

    Args:
        backbone: to be started.
        weights: of a library, as `read_library_weights` takes them, or ``package:NAME``.
        name: of the network, ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        UserError: no such weights, or those of another network.
    """
    if weights.startswith(PACKAGE):
        state = read_imagenet(weights.removeprefix(PACKAGE), name.partition(":")[2]).state_dict()
    else:
        state = read_library_weights(weights, name)[0]
    load_bottom_up(backbone.network, state, source=f"weights={weights}")
