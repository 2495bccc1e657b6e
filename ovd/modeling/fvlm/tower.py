# SPDX-License-Identifier: Apache-2.0
"""Feature maps of a frozen image tower, and the features pooled from them for each region.

Shapes: ``P`` regions, ``F`` pooled features, ``D`` joint embedding. Pictures are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovd.pictures import resized
from pretrain.engine.errors import UserError
from pretrain.nets.batch_norm import fold_batch_norms
from pretrain.nets.timm_tower import TimmImage
from pretrain.nets.towers import JointEncoder

STRIDE = 32  # of the tower: inputs are padded to a multiple of it
FINE, COARSE = 16, 32  # strides of the maps that are pooled


class TowerMaps(NamedTuple):
    """Of one picture: (1, C, h, w) at strides 16 and 32, and after the last convolution (stride 32)."""

    fine: Tensor
    coarse: Tensor
    last: Tensor


class PooledRegions(NamedTuple):
    """A picture's regions before the head.

    Attributes:
        boxes: (P, 4) x1, y1, x2, y2 in pixels of the picture.
        objectness: (P,) 0…1, best first.
        word_scores: (P, K) 0…1, the proposal network's own scores of the words it was trained on.
        features: (P, F) pooled from the tower's maps.
    """

    boxes: Tensor
    objectness: Tensor
    word_scores: Tensor
    features: Tensor


def padded_pixels(
    image: NDArray[np.uint8], *, mean: Tensor | float, std: Tensor | float, device: torch.device
) -> Tensor:
    """(1, 3, H, W) normalised pixels, H and W multiples of `STRIDE`: zeros, the mean colour, lie below and right.

    Args:
        image: (h, w, 3) RGB.
        mean, std: of RGB, 0…255.
        device: of the result.
    """
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None].float()
    return F.pad((pixels - mean) / std, (0, -width % STRIDE, 0, -height % STRIDE))


class FrozenTower(nn.Module):
    """Maps of a picture from a copy of the encoder's image tower.

    Args:
        encoder: whose image tower is one of timm's EfficientNets.
        side: longest side of a picture in the tower, pixels.
        pool: RoIAlign output side on the maps of strides 16 and 32.
        context: factor on the box in which the last map is pooled once more.
        precision: bfloat16 takes half the time of float32 on a CPU that has it.
        fold: fold batch norms into convolutions: the same maps up to rounding, in less time.

    Raises:
        UserError: the encoder has another image tower.
    """

    def __init__(
        self,
        encoder: JointEncoder,
        *,
        side: int,
        pool: int,
        context: float,
        precision: torch.dtype = torch.bfloat16,
        fold: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder.visual, TimmImage):
            raise UserError("model.arch fvlm needs an encoder whose image tower is of timm (encoder.image.kind: timm)")
        network = copy.deepcopy(encoder.visual.backbone)
        self.stem = nn.Sequential(network.get_submodule("conv_stem"), network.get_submodule("bn1"))
        self.stages = cast(nn.Sequential, network.get_submodule("blocks"))
        self.top = nn.Sequential(network.get_submodule("conv_head"), network.get_submodule("bn2"))
        strides = {str(info["module"]): int(info["reduction"]) for info in network.feature_info}  # type: ignore[union-attr]
        self.fine_stage = max(
            i for i in range(len(self.stages)) if strides.get(f"blocks.{i}", 0) == FINE
        )  # the last of its stride
        self.proj = copy.deepcopy(encoder.visual.proj)
        self.width = encoder.visual.width
        self.side, self.pool, self.context, self.precision = side, pool, context, precision
        mean = torch.tensor(encoder.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(encoder.image_std).view(1, 3, 1, 1)
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("std", 255 * std, persistent=False)
        self.requires_grad_(False).eval()
        for part in (self.stem, self.stages, self.top):
            if fold:
                fold_batch_norms(part)
            # once, not at every picture as autocast would
            part.to(precision).to(memory_format=torch.channels_last)

    @property
    def map_features(self) -> int:
        """Of the F features, the first: those pooled from the maps of strides 16 and 32."""
        fine, coarse = (self._channels(i) for i in (self.fine_stage, len(self.stages) - 1))
        return (fine + coarse) * self.pool**2

    @property
    def features(self) -> int:
        """F."""
        return self.map_features + 2 * self.width

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return cast(Tensor, self.mean).device

    def _channels(self, stage: int) -> int:
        convolutions = [m for m in self.stages[stage].modules() if isinstance(m, nn.Conv2d)]
        return convolutions[-1].out_channels

    def train(self, mode: bool = True) -> FrozenTower:
        """Always in eval mode."""
        return super().train(False)

    @torch.inference_mode()
    def maps(self, image: NDArray[np.uint8]) -> tuple[TowerMaps, tuple[float, float]]:
        """Maps of a picture, and the factors (x, y) from its pixels to those of the tower's input."""
        height, width = image.shape[:2]
        image = resized(image, self.side / max(height, width))
        size = image.shape[:2]
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        pixels = padded_pixels(image, mean=mean, std=std, device=self.device)
        x = self.stem(pixels.to(self.precision, memory_format=torch.channels_last))
        fine = x
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == self.fine_stage:
                fine = x
        return TowerMaps(fine, x, self.top(x)), (size[1] / width, size[0] / height)

    @torch.inference_mode()
    def pooled(self, image: NDArray[np.uint8], boxes_P4: Tensor) -> Tensor:
        """(P, F) features of boxes in pixels of the picture: fine, coarse, last in the box, last around it."""
        maps, (scale_x, scale_y) = self.maps(image)
        boxes = boxes_P4.to(maps.last.device)
        boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        around = torch.cat([centre - self.context * half, centre + self.context * half], dim=1)
        limit = boxes.new_tensor([image.shape[1] * scale_x, image.shape[0] * scale_y]).repeat(2)
        around = torch.minimum(around.clamp_min(0), limit)
        fine, coarse = (
            roi_align(values.float(), [boxes], self.pool, 1 / stride, sampling_ratio=2, aligned=True).flatten(1)
            for values, stride in ((maps.fine, FINE), (maps.coarse, COARSE))
        )
        inside, outside = averages(maps.last.float(), torch.cat([boxes, around])).chunk(2)
        return torch.cat([fine, coarse, inside, outside], dim=1)

    def embed(self, features_PF: Tensor) -> Tensor:
        """(P, D) unit rows: the encoder's own projection of the last map in the box (F-VLM, section 3.2)."""
        return F.normalize(self.proj(features_PF[:, -2 * self.width : -self.width].float()), dim=1)


def averages(last: Tensor, boxes_P4: Tensor) -> Tensor:
    """(P, C) RoIAlign of side 1 on a (1, C, h, w) map of stride 32, over all its cells in a box.

    So the encoder's own pooling averages over a crop's. RoIAlign is linear: the shares of the cells are pooled, fewer
    than the channels.
    """
    height, width = last.shape[2:]
    cells = torch.eye(height * width, device=last.device).view(1, -1, height, width)
    share_PS = roi_align(cells, [boxes_P4], 1, 1 / COARSE, sampling_ratio=0, aligned=True).flatten(1)
    return share_PS @ last[0].flatten(1).T
