# SPDX-License-Identifier: Apache-2.0
"""Augmentation of CLIP's pictures (`pretrain.methods.clip`): crop, flip, colour, and random convolutions (RandConv).

One view of each picture, on the device of the training; the two views of self-supervised methods are augmented by
`pretrain.augment`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.augment import luma
from pretrain.config import AugmentConfig


def augment(pixels: Tensor, config: AugmentConfig, size: int) -> Tensor:
    """Random resized crop, flip and colour changes, drawn per picture from torch's generator.

    Args:
        pixels: (N, 3, h, w) in [0, 1].
        config: how much.
        size: side of the result.

    Returns:
        (N, 3, size, size) in [0, 1].
    """
    return apply_augmentation(pixels, draw_parameters(config, len(pixels), pixels.device), config, size)


def draw_parameters(config: AugmentConfig, count: int, device: torch.device) -> dict[str, Tensor]:
    """Parameters of the augmentation of ``count`` pictures, (N, …) by name, drawn for the whole batch at once.

    No random number is drawn for a change of colour that is off, so that older runs resume as they began.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device)

    stretch = min(0.2, -math.log(max(config.crop_scale[0], 1e-6)))  # width to height 0.82 to 1.22; none without a crop
    parameters = {"area": uniform(*config.crop_scale), "aspect": uniform(-stretch, stretch).exp()}
    parameters |= {"x": uniform(-1, 1), "y": uniform(-1, 1), "mirrored": torch.rand(count, device=device) < config.flip}
    parameters["gain"] = (1 + uniform(-config.brightness, config.brightness, 1, 1, 1)) * (
        1 + uniform(-config.colour, config.colour, 3, 1, 1)
    )
    parameters["contrast"] = 1 + uniform(-config.contrast, config.contrast, 1, 1, 1)
    if config.hue:
        parameters["angle"] = 2 * math.pi * torch.rand(count, device=device)
        parameters["turned"] = torch.rand(count, device=device) < config.hue
    if config.grey:
        parameters["grey"] = torch.rand(count, device=device) < config.grey
    if config.random_filter:
        # a kernel per picture; variance 1 / (3 · 3²) keeps the size of a picture's contrasts (RandConv, §3.1)
        kernel = torch.randn(count * 3, 3, 3, 3, device=device) / math.sqrt(27)
        parameters["kernel"] = kernel.unflatten(0, (count, 3))
        parameters["share"] = torch.rand(count, 1, 1, 1, device=device)
        parameters["filtered"] = torch.rand(count, device=device) < config.random_filter
    return parameters


def apply_augmentation(pixels: Tensor, parameters: Mapping[str, Tensor], config: AugmentConfig, size: int) -> Tensor:
    """Apply what `draw_parameters` drew; arguments and result as of `augment`."""
    count = len(pixels)
    if config.crop_scale != (1.0, 1.0) or config.flip or pixels.shape[-2:] != (size, size):
        area, aspect = parameters["area"], parameters["aspect"]
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x, y = parameters["x"] * (1 - width), parameters["y"] * (1 - height)  # centre, in [-1, 1] coordinates
        mirror = torch.where(parameters["mirrored"], -1.0, 1.0)
        zero = torch.zeros_like(x)
        matrix = torch.stack([torch.stack([width * mirror, zero, x], -1), torch.stack([zero, height, y], -1)], 1)
        grid = F.affine_grid(matrix, [count, 3, size, size], align_corners=False)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (((pixels - mean) * parameters["contrast"] + mean) * parameters["gain"]).clamp(0, 1)
    return _recolour(pixels, parameters)


def _recolour(pixels: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Change colour and texture and keep shapes: drawing styles differ in colour and texture."""
    if "angle" in parameters:
        turned = torch.einsum("noc,nchw->nohw", grey_axis_rotation(parameters["angle"]), pixels).clamp(0, 1)
        pixels = torch.where(_per_picture(parameters["turned"]), turned, pixels)
    if "grey" in parameters:
        pixels = torch.where(_per_picture(parameters["grey"]), luma(pixels), pixels)
    if "kernel" in parameters:
        stack = F.pad((pixels - 0.5).flatten(0, 1)[None], (1, 1, 1, 1), mode="replicate")
        filtered = F.conv2d(stack, parameters["kernel"].flatten(0, 1), groups=len(pixels)).view_as(pixels) + 0.5
        mixed = (parameters["share"] * pixels + (1 - parameters["share"]) * filtered).clamp(0, 1)
        pixels = torch.where(_per_picture(parameters["filtered"]), mixed, pixels)
    return pixels


def _per_picture(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1)


def grey_axis_rotation(angle: Tensor) -> Tensor:
    """(N,) radians → (N, 3, 3): turns RGB around the axis r = g = b (Rodrigues); grey stays grey."""
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    third = torch.full((3, 3), 1 / 3, device=angle.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    return cosine * (torch.eye(3, device=angle.device) - third) + third + sine * cross
