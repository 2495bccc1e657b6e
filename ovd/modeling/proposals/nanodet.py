# SPDX-License-Identifier: Apache-2.0
"""NanoDet-G: a detector of 3.8 million parameters made of plain convolutions.

Three parts, each named by what it does: :class:`CspBackbone` (cross-stage partial blocks, Wang et al.,
arXiv:1911.11929), :class:`PathAggregation` (top-down and bottom-up additions, Liu et al., arXiv:1803.01534, without
convolutions of its own), and :class:`DenseHead`, one per level, which predicts for each cell the score of each word and
the distances to the sides of its box, each the expectation of a distribution over bins (generalised focal loss, Li et
al., arXiv:2006.04388).

The structure is read off the graph that the weights come with (``scripts/convert_nanodet.py`` proves that both compute
the same). Batch norms are folded into the convolutions there, so every convolution has a bias and nothing else
normalises.

Shapes: ``N`` pictures, ``H``, ``W`` pixels (multiples of 32), ``A`` cells of all levels together, finest level first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.proposals.cells import Cells, gather

STRIDES = (8, 16, 32)
"""Pixels between the cells of the three levels."""

CHANNELS = 128
"""Of each level's map."""

WORDS = 80
"""COCO's categories, in the order of their ids."""

BINS = 11
"""Of each side's distribution: distances of 0 to 10 strides."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""What the network was trained with: ImageNet's mean and deviation, RGB, 0…255. Its files take blue first; the first
convolution is turned round when they are converted."""

SLOPE = 0.1
"""Of the leaky rectifier."""


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    """A 3×3 convolution and the leaky rectifier."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.LeakyReLU(SLOPE, inplace=True))


class Halves(nn.Module):
    """Two 3×3 convolutions in a row, each of half the width, side by side in the result: (N, C, …) to (N, C, …)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = _convolution(channels, width // 2)
        self.second = _convolution(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([self.second(first), first], dim=1)


class CspStage(nn.Module):
    """A convolution, which may halve the resolution; blocks; a convolution; and the first one's output beside it.

    (N, C, H, W) to (N, 2C, H/stride, W/stride).
    """

    def __init__(self, channels: int, *, blocks: int, stride: int) -> None:
        super().__init__()
        self.enter = _convolution(channels, channels, stride=stride)
        self.blocks = nn.Sequential(*[Halves(channels, channels) for _ in range(blocks)])
        self.leave = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return torch.cat([self.leave(self.blocks(x)), x], dim=1)


class CspBackbone(nn.Module):
    """Normalised pixels (N, 3, H, W), RGB, to maps of strides 8, 16 and 32 with 128, 256 and 512 channels."""

    CHANNELS = (128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, stride=2)
        self.stages = nn.ModuleList(
            [
                CspStage(32, blocks=1, stride=1),
                CspStage(64, blocks=2, stride=2),
                CspStage(128, blocks=2, stride=2),
                CspStage(256, blocks=3, stride=2),
            ]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem(pixels), kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class PathAggregation(nn.Module):
    """Maps of three strides to as many of one width, each combined with the coarser and the finer ones."""

    def __init__(self, *, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in inputs])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for fine in range(len(out) - 2, -1, -1):
            out[fine] = out[fine] + _resize(out[fine + 1], out[fine])
        for coarse in range(1, len(out)):
            out[coarse] = out[coarse] + _resize(out[coarse - 1], out[coarse])
        return out


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear with half-pixel centres; downwards it reads four neighbours and blurs nothing, as in training."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class NanoDetTrunk(nn.Module):
    """Normalised pixels (N, 3, H, W), RGB, to one map per stride; H and W multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.csp = CspBackbone()
        self.neck = PathAggregation(inputs=CspBackbone.CHANNELS, channels=CHANNELS)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.neck(self.csp(pixels))
        return maps


class DenseHead(nn.Module):
    """(N, C, h, w) to the logits of words (N, words, h, w) and of sides (N, 4·bins, h, w): left, top, right, bottom."""

    def __init__(self, channels: int, *, words: int, bins: int) -> None:
        super().__init__()
        self.words = words
        self.hidden = _convolution(channels, channels)
        self.output = nn.Conv2d(channels, words + 4 * bins, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.output(self.hidden(x))
        return out[:, : self.words], out[:, self.words :]

    def side_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (4·bins, C, 1, 1) and bias (4·bins,) that predict the sides."""
        assert self.output.bias is not None
        return self.output.weight[self.words :], self.output.bias[self.words :]

    def word_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (words, C, 1, 1) and bias (words,) that score the words."""
        assert self.output.bias is not None
        return self.output.weight[: self.words], self.output.bias[: self.words]


class NanoDet(nn.Module):
    """Backbone, path aggregation and heads. Input (N, 3, H, W) normalised RGB; H and W multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = CspBackbone()
        self.neck = PathAggregation(inputs=CspBackbone.CHANNELS, channels=CHANNELS)
        self.heads = nn.ModuleList([DenseHead(CHANNELS, words=WORDS, bins=BINS) for _ in STRIDES])

    def forward(self, pixels: Tensor) -> Cells:
        return gather(self.heads, self.neck(self.backbone(pixels)))
