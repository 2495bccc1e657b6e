# SPDX-License-Identifier: Apache-2.0
"""Backbones of detectors: ResNets with torchvision's weights (what ``pretrain/`` exports), or any network of a library.

Stages are called by stride, as Detectron2 calls those of its ResNets: ``res2`` (4), ``res3`` (8), ``res4``, ``res5``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.library_network import STRIDES, Chain, LibraryNetwork, open_network, with_norms
from pretrain.engine.errors import UserError
from pretrain.engine.state import LoadReport, load_tensors
from pretrain.nets.checkpoints import to_detectron2
from pretrain.nets.grid import conv3x3_on_2x2
from pretrain.nets.standardised import group_norm

if TYPE_CHECKING:
    from ovd.config import DetectorBackboneConfig
    from ovd.config_detr import DetrBackboneConfig

STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks of res2…res5 (He et al. 2015, table 1)."""


MISMATCH_HINT = "Does model.backbone (name, depth, stem) fit the checkpoint?"

Norm = str | Callable[[int], nn.Module]


def norm_of(name: str) -> Norm:
    """Argument of Detectron2's ``get_norm``: its own names, and ``GN16``, the group norm of pretrain/."""
    return group_norm if name == "GN16" else name


class SmallStem(CNNBlockBase):
    """3×3 stride-2 convolution and a max pool: stride 4 like the ImageNet stem, for small pictures."""

    def __init__(self, *, out_channels: int, norm: Norm) -> None:
        super().__init__(3, out_channels, 4)
        self.conv1 = Conv2d(
            3, out_channels, kernel_size=3, stride=2, padding=1, bias=False, norm=get_norm(norm, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class RegionBlock(BasicBlock):
    """A basic block with a faster path for the 2×2 maps of pooled regions; same parameters and results."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self._convolve(self.conv1, x))
        out = self._convolve(self.conv2, out)
        return F.relu_(out + (self.shortcut(x) if self.shortcut is not None else x))

    @staticmethod
    def _convolve(conv: Conv2d, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[-2:] == (2, 2) and conv.stride == (1, 1) and conv.bias is None:
            return conv.norm(conv3x3_on_2x2(x, conv.weight))
        return conv(x)


def stage(*, depth: int, index: int, norm: Norm, block: type[BasicBlock] = BasicBlock) -> list[CNNBlockBase]:
    """Blocks of res``index`` (2…5) with torchvision's stride placement (in the 3×3 convolution)."""
    if depth not in STAGE_BLOCKS:
        raise ValueError(f"depth {depth}: known are {sorted(STAGE_BLOCKS)}")
    blocks = STAGE_BLOCKS[depth][index - 2]
    strides = [1 if index == 2 else 2] + [1] * (blocks - 1)
    width = 64 * 2 ** (index - 2)
    if depth < 50:
        first = 64 if index == 2 else width // 2
        return ResNet.make_stage(
            block, blocks, in_channels=first, out_channels=width, stride_per_block=strides, norm=norm
        )
    return ResNet.make_stage(
        BottleneckBlock,
        blocks,
        in_channels=64 if index == 2 else width * 2,
        out_channels=width * 4,
        bottleneck_channels=width,
        stride_per_block=strides,
        stride_in_1x1=False,
        norm=norm,
    )


def stage_channels(*, depth: int, index: int) -> int:
    """Output channels of res``index``."""
    return 64 * 2 ** (index - 2) * (1 if depth < 50 else 4)


def build_resnet(
    *, depth: int, stem: Literal["small", "imagenet"], norm: str, out_features: tuple[str, ...], freeze_at: int
) -> ResNet:
    """Detectron2 ResNet up to the last stage that ``out_features`` names (``res2`` … ``res5``).

    Args:
        depth: 18, 34, 50 or 101.
        stem: ``small`` (3×3) or ``imagenet`` (7×7); both have stride 4.
        norm: Detectron2's name of a norm (``FrozenBN``, ``BN``, ``SyncBN``, ``GN``), or ``GN16``.
        out_features: stages whose output is returned.
        freeze_at: stages up to this one are frozen, 1 is the stem, 2 is res2; 0 freezes nothing.
    """
    norm_layer = norm_of(norm)
    first = SmallStem(out_channels=64, norm=norm_layer) if stem == "small" else BasicStem(3, 64, norm=norm_layer)
    last = max(int(name.removeprefix("res")) for name in out_features)
    stages = [stage(depth=depth, index=index, norm=norm_layer) for index in range(2, last + 1)]
    return ResNet(first, stages, out_features=list(out_features), freeze_at=freeze_at)


class LibraryBackbone(Backbone):
    """A network of timm or torchvision; its weights are below ``network``, under the library's names.

    Args:
        opened: the network, with random weights.
        out_features: stages whose output is returned.
        freeze_at: stages up to this one are frozen, 1 is what comes before stride 4; 0 freezes nothing.
        norm: ``FrozenBN``, ``BN`` or ``SyncBN``: what happens to its batch norms.
    """

    def __init__(self, *, opened: LibraryNetwork, out_features: tuple[str, ...], freeze_at: int, norm: str) -> None:
        super().__init__()
        self.stage_of = {opened.end(name) - 1: name for name in sorted(out_features)}
        self.shapes = {
            name: ShapeSpec(channels=opened.parts[number].channels, stride=STRIDES[name])
            for number, name in self.stage_of.items()
        }
        frozen = opened.frozen_parts(freeze_at)
        used = opened.parts[: max(self.stage_of) + 1]
        self.network = Chain(
            {
                part.path: with_norms(part.module, "FrozenBN" if number < frozen else norm)
                for number, part in enumerate(used)
            }
        )
        for part in used[:frozen]:
            self.network.part(part.path).requires_grad_(False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps of (N, 3, H, W) normalised pixels, by stage."""
        maps, x = {}, pixels
        for number, path in enumerate(self.network.paths):
            x = self.network.part(path)(x)
            if number in self.stage_of:
                maps[self.stage_of[number]] = x
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each stage that is returned."""
        return self.shapes


def build_bottom_up(
    config: DetectorBackboneConfig | DetrBackboneConfig, *, out_features: tuple[str, ...]
) -> ResNet | LibraryBackbone:
    """The network that a configuration names, with random weights.

    ``output_shape()`` has ``channels`` and ``stride`` of each feature.

    Raises:
        UserError: unknown network, or it has no such features.
    """
    if config.is_resnet:
        return build_resnet(
            depth=config.depth,
            stem=config.stem,
            norm=config.norm,
            out_features=out_features,
            freeze_at=config.freeze_at,
        )
    opened = open_network(config.name)
    return LibraryBackbone(opened=opened, out_features=out_features, freeze_at=config.freeze_at, norm=config.norm)


def build_last_stage(config: DetectorBackboneConfig | DetrBackboneConfig, *, norm: str) -> tuple[nn.Module, int]:
    """(what follows res4 in the network that a configuration names, its output channels), to read pooled regions.

    Raises:
        UserError: nothing follows.
    """
    if config.is_resnet:
        blocks = stage(depth=config.depth, index=5, norm=norm_of(norm), block=RegionBlock)
        return nn.Sequential(*blocks), stage_channels(depth=config.depth, index=5)
    opened = open_network(config.name)
    opened.end("res5")
    last_stage = opened.parts[opened.end("res4") :]
    return Chain({part.path: with_norms(part.module, norm) for part in last_stage}), last_stage[-1].channels


def build_fpn(bottom_up: Backbone, *, in_features: tuple[str, ...], channels: int, norm: str) -> FPN:
    """Feature pyramid with a max-pooled extra level, Detectron2's default for detection."""
    extra = LastLevelMaxPool()
    extra.in_feature = (
        f"p{in_features[-1].removeprefix('res')}"  # Detectron2 assumes p5; a shallower pyramid ends earlier
    )
    return FPN(bottom_up, list(in_features), channels, norm=norm, top_block=extra)


def load_bottom_up(bottom_up: nn.Module, state: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Load all of a backbone from a state under the names of its library (torchvision's for our ResNets).

    Raises:
        UserError: something of the network is missing or has another shape; it is never left partly random.
    """
    if isinstance(bottom_up, LibraryBackbone):
        return load_tensors(bottom_up.network, state, source=source, strict="module", hint=MISMATCH_HINT)
    return load_tensors(bottom_up, to_detectron2(state), source=source, strict="module", hint=MISMATCH_HINT)


TOLERANCE = 1e-5
"""Allowed ``max|a−b| / max|a|`` of every stage of a converted network."""


@torch.no_grad()
def verify_conversion(reference: Callable[[Tensor], Mapping[str, Tensor]], resnet: nn.Module, pixels: Tensor) -> float:
    """Largest relative difference between the features of the source network and the converted one.

    Args:
        reference: maps (N, 3, H, W) pixels to features by torchvision's stage names ``layer1`` ….
        resnet: the converted network, returns features by ``res2`` ….
        pixels: normalised pictures.

    Raises:
        UserError: the conversion is wrong; nothing should be trained on it.
    """
    was_training = resnet.training
    resnet.eval()
    converted, original = resnet(pixels), reference(pixels)
    resnet.train(was_training)
    worst = 0.0
    for name, feature in converted.items():
        other = original[f"layer{int(name.removeprefix('res')) - 1}"]
        difference = float((feature - other).abs().max() / other.abs().max().clamp_min(1e-12))
        worst = max(worst, difference)
        if difference > TOLERANCE:
            raise UserError(f"converted backbone differs from its source at {name}: {difference:.2e} > {TOLERANCE:.0e}")
    return worst
