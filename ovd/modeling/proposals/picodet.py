# SPDX-License-Identifier: Apache-2.0
"""PicoDet-S: a detector of 1.2 million parameters made of depthwise separable convolutions (arXiv:2111.00902).

Three parts: :class:`LcNet` (PP-LCNet, Cui et al., arXiv:2109.15099, at .75 of its width), :class:`CspPan` (a path
aggregation of cross-stage partial blocks with one more, coarser level), and one :class:`PicoHead` per level with
squeezed attention, a distribution over bins for each side of the box (arXiv:2006.04388), and an alignment score that
multiplies the scores of the words (TOOD, arXiv:2108.07755).

The structure is read off the program that the weights come with (``scripts/convert_picodet.py`` proves that both
compute the same). Batch norms are folded into the convolutions there, so every convolution has a bias and nothing
normalises.

Shapes: ``N`` pictures, ``H``, ``W`` pixels (multiples of 32), ``A`` cells of all levels together, finest level first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.proposals.cells import Cells, gather
from ovd.modeling.proposals.depthwise import depthwise

STRIDES = (8, 16, 32, 64)
"""Pixels between the cells of the four levels."""

CHANNELS = 96
"""Of each level's map."""

WORDS = 80
"""COCO's categories, in the order of their ids."""

BINS = 8
"""Of each side's distribution: distances of 0 to 7 strides."""

KERNEL = 5
"""Of depthwise convolutions in the neck, the heads and the last stages of the backbone."""


class Convolution(nn.Module):
    """A convolution and hard-swish."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.conv(x) if self.conv.groups == 1 else depthwise(x, self.conv))


class SqueezeExcitation(nn.Module):
    """Each channel times a weight that depends on all channels' means (arXiv:1709.01507)."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(weight)


class Separable(nn.Module):
    """A depthwise convolution, attention where asked for, and a pointwise one: (N, inputs, …) to (N, outputs, …)."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = KERNEL, stride: int = 1, attention: bool = False
    ) -> None:
        super().__init__()
        self.depthwise = Convolution(inputs, inputs, kernel=kernel, stride=stride, groups=inputs)
        self.attention = SqueezeExcitation(inputs) if attention else nn.Identity()
        self.pointwise = Convolution(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.pointwise(self.attention(self.depthwise(x)))
        return mixed


class LcNet(nn.Module):
    """Normalised pixels (N, 3, H, W), RGB, to maps of strides 8, 16 and 32 with 96, 192 and 384 channels."""

    CHANNELS = (96, 192, 384)

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 16, kernel=3, stride=2)
        fine, middle, coarse = self.CHANNELS
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    Separable(16, 24, kernel=3),
                    Separable(24, 48, kernel=3, stride=2),
                    Separable(48, 48, kernel=3),
                    Separable(48, fine, kernel=3, stride=2),
                    Separable(fine, fine, kernel=3),
                ),
                nn.Sequential(
                    Separable(fine, middle, kernel=3, stride=2), *[Separable(middle, middle) for _ in range(5)]
                ),
                nn.Sequential(
                    Separable(middle, coarse, stride=2, attention=True), Separable(coarse, coarse, attention=True)
                ),
            ]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem(pixels)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _joining_block(channels: int) -> nn.Sequential:
    """Two maps side by side to one of (N, C, …)."""
    return nn.Sequential(Separable(2 * channels, 2 * channels), Separable(2 * channels, channels))


class BottomUp(nn.Module):
    """A map (N, C, 2h, 2w) into the next coarser one (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = Separable(channels, channels, stride=2)
        self.block = _joining_block(channels)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        joined: Tensor = self.block(torch.cat([self.down(fine), coarse], dim=1))
        return joined


class CspPan(nn.Module):
    """Maps of strides 8, 16 and 32 to those of strides 8 to 64 of one width, each combined with finer and coarser ones.

    (N, C, h, w), h and w even but for the coarsest map.
    """

    def __init__(self, *, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([Convolution(width, channels) for width in inputs])
        self.extra_in = Separable(channels, channels, stride=2)
        self.extra_out = Separable(channels, channels, stride=2)
        self.top_down = nn.ModuleList([_joining_block(channels) for _ in inputs[1:]])
        self.bottom_up = nn.ModuleList([BottomUp(channels) for _ in inputs[1:]])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        lateral = [convolution(x) for convolution, x in zip(self.lateral, maps, strict=True)]
        out = [lateral[-1]]
        for block, fine in zip(self.top_down, lateral[-2::-1], strict=True):
            coarse = F.interpolate(out[0], scale_factor=2.0, mode="nearest")
            out.insert(0, block(torch.cat([coarse, fine], dim=1)))
        for level, join in enumerate(self.bottom_up, start=1):
            out[level] = join(out[level - 1], out[level])
        return [*out, self.extra_in(lateral[-1]) + self.extra_out(out[-1])]


class PicoDetTrunk(nn.Module):
    """Normalised pixels (N, 3, H, W), RGB, to one map per stride; H and W multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.lcnet = LcNet()
        self.neck = CspPan(inputs=LcNet.CHANNELS, channels=CHANNELS)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.neck(self.lcnet(pixels))
        return maps


class HeadTower(nn.Module):
    """(N, C, h, w) to the features that the alignment reads, and to those of words and sides, which have attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.separable = nn.Sequential(Separable(channels, channels), Separable(channels, channels))
        self.gate = nn.Conv2d(channels, channels, 1)
        self.pointwise = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.separable(x))

    def attend(self, x: Tensor) -> Tensor:
        """Features of words and sides, of those that the alignment reads."""
        weight: Tensor = self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        attended: Tensor = self.pointwise(x * weight)
        return attended


class Alignment(nn.Module):
    """(N, C, h, w) to one logit per cell (N, 1, h, w): how well the cell's score and box agree."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = Convolution(channels, 1, kernel=KERNEL)
        self.logit = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        logit: Tensor = self.logit(self.wide(x))
        return logit


class PicoHead(nn.Module):
    """(N, C, h, w) to the logits of words (N, words, h, w) and of sides (N, 4·bins, h, w): left, top, right, bottom.

    Args:
        channels: C.
        words: that are scored.
        bins: of the distribution of each side.
        aligned: a word's score is the geometric mean of its own and of the cell's alignment, as in the weights; without
            it the word's own.
    """

    def __init__(self, channels: int, *, words: int, bins: int, aligned: bool = True) -> None:
        super().__init__()
        self.words = words
        self.hidden = HeadTower(channels)
        self.word_logits = nn.Conv2d(channels, words, 1)
        self.side_logits = nn.Conv2d(channels, 4 * bins, 1)
        self.alignment = Alignment(channels) if aligned else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hidden.separable(x)
        features = self.hidden.attend(x)
        words = self.word_logits(features)
        if self.alignment is not None:
            words = geometric_mean(words, self.alignment(x))
        return words, self.side_logits(features)

    def side_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (4·bins, C, 1, 1) and bias (4·bins,) that predict the sides."""
        assert self.side_logits.bias is not None
        return self.side_logits.weight, self.side_logits.bias

    def word_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (words, C, 1, 1) and bias (words,) that score the words."""
        assert self.word_logits.bias is not None
        return self.word_logits.weight, self.word_logits.bias


def geometric_mean(one: Tensor, other: Tensor) -> Tensor:
    """The logit of √(σ(one)·σ(other)), in single precision."""
    # The mean's inverse is √(1 + exp(-one)) · √(1 + exp(-other)), kept above 1, where the logit is infinite.
    inverse = _root_of_inverse(one) * _root_of_inverse(other)
    return -torch.log((inverse - 1).clamp(1e-6, 3e38))


def _root_of_inverse(logit: Tensor) -> Tensor:
    """√(1 / σ(logit)) in single precision, which holds the root of exp(90) and not exp(90)."""
    root = (logit.float().clamp_min(-170) / -2).exp()
    return torch.maximum(root, (1 + root.clamp_max(1e18) ** 2).sqrt())


class PicoDet(nn.Module):
    """Backbone, neck and heads. Input (N, 3, H, W) normalised RGB; H and W multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LcNet()
        self.neck = CspPan(inputs=LcNet.CHANNELS, channels=CHANNELS)
        self.heads = nn.ModuleList([PicoHead(CHANNELS, words=WORDS, bins=BINS) for _ in STRIDES])

    def forward(self, pixels: Tensor) -> Cells:
        return gather(self.heads, self.neck(self.backbone(pixels)))
