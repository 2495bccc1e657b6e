# SPDX-License-Identifier: Apache-2.0
"""The dense detectors that boxes of photographs can come from, and what the parts around them need to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor, nn

from ovd.modeling.proposals import nanodet, picodet
from ovd.modeling.proposals.nanodet import DenseHead, NanoDetTrunk
from ovd.modeling.proposals.picodet import PicoDetTrunk, PicoHead

Arch = Literal["nanodet", "picodet"]
PIXEL_MEAN, PIXEL_STD = nanodet.PIXEL_MEAN, nanodet.PIXEL_STD
"""Of RGB, 0…255: both detectors were trained with ImageNet's mean and deviation."""
STEP = 32
"""Height and width of what enters a trunk are multiples of it."""


class Head(Protocol):
    """A head of one level: (N, C, h, w) to the logits of words (N, words, h, w) and of sides (N, 4·bins, h, w).

    Attributes:
        hidden: layers before the logits, (N, C, h, w) to the same.
    """

    hidden: nn.Module

    def side_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (4·bins, C, 1, 1) and bias (4·bins,) that predict the sides."""

    def word_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (words, C, 1, 1) and bias (words,) that score the words."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense detector.

    Attributes:
        trunk: makes backbone and neck, normalised pixels (N, 3, H, W) to one map (N, C, h, w) per stride.
        known_head: makes the head of one level that scores the words of its weights, random.
        class_head: makes the head of one level for so many classes, random.
        hidden: makes what such a head has before its logits.
        strides: pixels between the cells of each level, finest first.
        channels: C.
        bins: of the distribution of each side.
        converter: script that converts its weights.
    """

    trunk: Callable[[], nn.Module]
    known_head: Callable[[], nn.Module]
    class_head: Callable[[int], nn.Module]
    hidden: Callable[[], nn.Module]
    strides: tuple[int, ...]
    channels: int
    bins: int
    converter: str

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the maps, as Detectron2 has them: p3 has stride 8."""
        return tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)


def _nanodet_head(words: int) -> nn.Module:
    return DenseHead(nanodet.CHANNELS, words=words, bins=nanodet.BINS)


def _nanodet_hidden() -> nn.Module:
    return DenseHead(nanodet.CHANNELS, words=0, bins=nanodet.BINS).hidden  # a whole head: seeds give what they gave


def _picodet_head(words: int, *, aligned: bool = False) -> nn.Module:
    return PicoHead(picodet.CHANNELS, words=words, bins=picodet.BINS, aligned=aligned)


ARCHITECTURES: dict[Arch, Architecture] = {
    "nanodet": Architecture(
        trunk=NanoDetTrunk,
        known_head=partial(_nanodet_head, nanodet.WORDS),
        class_head=_nanodet_head,
        hidden=_nanodet_hidden,
        strides=nanodet.STRIDES,
        channels=nanodet.CHANNELS,
        bins=nanodet.BINS,
        converter="scripts/convert_nanodet.py",
    ),
    "picodet": Architecture(
        trunk=PicoDetTrunk,
        known_head=partial(_picodet_head, picodet.WORDS, aligned=True),
        class_head=_picodet_head,
        hidden=partial(picodet.HeadTower, picodet.CHANNELS),
        strides=picodet.STRIDES,
        channels=picodet.CHANNELS,
        bins=picodet.BINS,
        converter="scripts/convert_picodet.py",
    ),
}


def adopt_trunk(module: nn.Module, architecture: Architecture) -> tuple[nn.Module]:
    """A new trunk whose parts are parts of ``module``, under their own names; in a tuple, so that it adds no name."""
    trunk = architecture.trunk()
    for name, part in trunk.named_children():
        module.add_module(name, part)
    return (trunk,)
