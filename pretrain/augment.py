# SPDX-License-Identifier: Apache-2.0
"""Colour changes of a batch of uint8 crops on the training device: jitter, grey, blur, solarise, normalise.

Each sample has its own parameters, drawn from torch's generator of the device, so that a resumed run continues alike.
Two implementations take the same parameters: batched torch in float32 (no mask indexing, no device synchronisation, so
it compiles), and OpenCV in uint8 per sample, which is several times faster on a CPU. Both follow torchvision's PIL
operations in formula, order and range.

Shapes: `N` samples, `S` side, `P` random numbers per sample.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pretrain.config_views import ViewConfig

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, what PIL, OpenCV and torchvision make grey with
SOLARISE_FROM = 0.5  # of 1: uint8 values from 128 up, PIL's default and BYOL's (arXiv:2006.07733, appendix B)
KERNEL_SIGMAS = 3.0  # reach of the blur; what lies beyond is .3 % of the weight
IDENTITY_SIGMA = 1e-3  # a kernel this narrow is 1 in the middle and 0 elsewhere
_RANDOM_NUMBERS = 13
U8 = NDArray[np.uint8]


class Parameters(NamedTuple):
    """Parameters of each sample; all (N,) float32 but ``order``, and on one device. Neutral where an op is not drawn.

    Attributes:
        order: (N, 3) int64, brightness (0), contrast (1) and saturation (2) in the order they are applied in.
        hue_at: int64, how many of the three come before the hue.
        factors: (N, 3) of brightness, contrast and saturation; 1 changes nothing.
        hue: turns of the colour circle; 0 changes nothing.
        grey, solarise: bool.
        sigma: of the blur in pixels; 0: none.
    """

    order: Tensor
    hue_at: Tensor
    factors: Tensor
    hue: Tensor
    grey: Tensor
    sigma: Tensor
    solarise: Tensor


def draw_parameters(config: ViewConfig, count: int, device: torch.device) -> Parameters:
    """Draw for ``count`` samples; the number of random numbers does not depend on the config."""
    u = torch.rand(count, _RANDOM_NUMBERS, device=device)  # (N, P)
    jittered = u[:, 0] < config.jitter_p
    low = torch.tensor([max(0.0, 1 - s) for s in config.jitter[:3]], device=device)
    high = torch.tensor([1 + s for s in config.jitter[:3]], device=device)
    factors = low + (high - low) * u[:, 1:4]
    small, large = config.blur_sigma
    return Parameters(
        order=u[:, 4:7].argsort(dim=1),
        hue_at=(u[:, 7] * 4).long().clamp(max=3),  # with the order of the three: all 24 orders alike often
        factors=torch.where(jittered[:, None], factors, torch.ones_like(factors)),
        hue=torch.where(jittered, (2 * u[:, 8] - 1) * config.jitter[3], torch.zeros_like(u[:, 8])),
        grey=u[:, 9] < config.grey_p,
        sigma=torch.where(u[:, 10] < config.blur_p, small + (large - small) * u[:, 11], torch.zeros_like(u[:, 11])),
        solarise=u[:, 12] < config.solarise_p,
    )


class ViewAugment:
    """Make the network's input from uint8 crops.

    Args:
        config: which changes, how strong and how often.
        backend: "torch", "opencv" (CPU tensors only), or "auto": OpenCV on a CPU, torch elsewhere.
    """

    def __init__(self, config: ViewConfig, *, backend: Literal["auto", "torch", "opencv"] = "auto") -> None:
        self.config, self.backend = config, backend

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB → (N, 3, S, S) float32, contiguous: channels-last slows an fp32 ResNet on a CPU.

        Raises:
            ValueError: not uint8, or not (N, 3, S, S).
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"views are uint8 (N, 3, S, S), not {images.dtype} {tuple(images.shape)}")
        drawn = draw_parameters(self.config, len(images), images.device)
        if self.backend == "opencv" or (self.backend == "auto" and images.device.type == "cpu"):
            return apply_opencv(images, drawn, self.config)
        return apply_torch(images, drawn, self.config)


def _per_sample(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


# --- torch -----------------------------------------------------------------------------------------------------------


def apply_torch(images: Tensor, drawn: Parameters, config: ViewConfig) -> Tensor:
    """The changes as batched tensor operations. Operations that the config never draws cost nothing."""
    x = images.float() / 255
    if config.grey_p and config.grey_first:
        x = torch.where(_per_sample(drawn.grey), luma(x), x)
    if config.jitter_p and any(config.jitter):
        x = jitter(x, drawn)
    if config.grey_p and not config.grey_first:
        x = torch.where(_per_sample(drawn.grey), luma(x), x)
    if config.blur_p:
        x = blur(x, drawn.sigma, largest=config.blur_sigma[1])
    if config.solarise_p:
        x = torch.where(_per_sample(drawn.solarise) & (x >= SOLARISE_FROM), 1 - x, x)
    return normalise(x, config).contiguous()


def normalise(x: Tensor, config: ViewConfig) -> Tensor:
    """Subtract the mean, divide by the standard deviation, if the config has any."""
    if config.normalise is None:
        return x
    mean = torch.tensor(config.normalise.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(config.normalise.std, device=x.device).view(3, 1, 1)
    return (x - mean) / std


def luma(x: Tensor) -> Tensor:
    """(N, 1, S, S) brightness of RGB."""
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def jitter(x: Tensor, drawn: Parameters) -> Tensor:
    """Brightness, contrast, saturation and hue, each sample in its own order.

    The first three are one formula, clip(a·x + k·luma(x) + m), with other numbers. So a sample whose hue comes second
    has a first pass before the common hue step, and two after it; passes on the other side of it do nothing.
    """
    for position in range(3):
        x = _tone(x, drawn, position, drawn.hue_at > position)
    shifted = shift_hue(x, drawn.hue)
    x = torch.where(_per_sample(drawn.hue) == 0, x, shifted)
    for position in range(3):
        x = _tone(x, drawn, position, drawn.hue_at <= position)
    return x


def _tone(x: Tensor, drawn: Parameters, position: int, active: Tensor) -> Tensor:
    kind = drawn.order[:, position]
    factor = torch.where(active, drawn.factors.gather(1, kind[:, None])[:, 0], torch.ones_like(drawn.hue))
    grey = luma(x)
    weight = 1 - factor
    mean = grey.mean(dim=(1, 2, 3))
    shift = torch.where(kind == 1, weight * mean, torch.zeros_like(weight))  # contrast: towards the mean brightness
    blend = torch.where(kind == 2, weight, torch.zeros_like(weight))  # saturation: towards grey
    return (x * _per_sample(factor) + grey * _per_sample(blend) + _per_sample(shift)).clamp(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV; value and saturation stay. Written without the conversion back and forth."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):  # the closed form of HSV to RGB
        k = torch.remainder(sixth + offset, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def kernel_reach(sigma: float, size: int) -> int:
    """Half-width of the blur kernel in pixels; reflection at the border needs it smaller than the picture."""
    return min(max(1, math.ceil(KERNEL_SIGMAS * sigma)), size - 1)


def blur(x: Tensor, sigma: Tensor, *, largest: float) -> Tensor:
    """Gaussian blur, first along one axis and then the other; the picture is reflected at its border.

    Args:
        x: (N, 3, S, S).
        sigma: (N,) in pixels; 0 leaves a sample exactly as it is.
        largest: no sigma is larger; sets the kernel's length.
    """
    count, channels, height, width = x.shape
    reach = kernel_reach(largest, min(height, width))
    offset = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=IDENTITY_SIGMA)[:, None]) ** 2)
    weight = weight / weight.sum(dim=1, keepdim=True)  # (N, K)
    weight = weight.repeat_interleave(channels, dim=0)[:, None, None]  # (3N, 1, 1, K)
    planes = F.pad(x, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, weight, groups=count * channels)
    planes = F.conv2d(planes, weight.transpose(2, 3), groups=count * channels)
    return planes.reshape(count, channels, height, width)


# --- OpenCV ----------------------------------------------------------------------------------------------------------


def apply_opencv(images: Tensor, drawn: Parameters, config: ViewConfig) -> Tensor:
    """The same with OpenCV on a CPU, in uint8 as PIL does it; solarise and normalise are one table of 256 numbers."""
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())  # no copy for channels-last crops
    out = np.empty(images.shape, np.float32)  # plane by plane, as the network wants it
    order, hue_at, factors, hue, grey, sigma, solarise = (value.tolist() for value in drawn)
    values = torch.arange(256, dtype=torch.float32) / 255
    inverted = torch.where(values >= SOLARISE_FROM, 1 - values, values)
    tables = [  # of each channel (1, 256)
        [row.numpy() for row in normalise(column.expand(3, 1, 256), config)] for column in (values, inverted)
    ]
    for n, picture in enumerate(pixels):
        if grey[n] and config.grey_first:
            picture = _grey(picture)
        if hue[n] or factors[n] != [1.0, 1.0, 1.0]:
            picture = _jitter(picture, order[n], hue_at[n], factors[n], hue[n])
        if grey[n] and not config.grey_first:
            picture = _grey(picture)
        if sigma[n]:
            side = 2 * kernel_reach(sigma[n], min(picture.shape[:2])) + 1
            weight = cv2.getGaussianKernel(side, sigma[n], cv2.CV_32F)  # GaussianBlur takes 3 times as long on uint8
            picture = cv2.sepFilter2D(picture, -1, weight, weight, borderType=cv2.BORDER_REFLECT_101)
        for channel, (plane, table) in enumerate(zip(cv2.split(picture), tables[solarise[n]], strict=True)):
            cv2.LUT(plane, table, dst=out[n, channel])
    return torch.from_numpy(out)


def _grey(picture: U8) -> U8:
    return cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _jitter(picture: U8, order: list[int], hue_at: int, factors: list[float], hue: float) -> U8:
    for position, kind in enumerate(order):
        if position == hue_at:
            picture = _shift_hue(picture, hue)
        factor = factors[kind]
        if kind == 0:
            picture = cv2.convertScaleAbs(picture, alpha=factor)
        elif kind == 1:
            red, green, blue, _ = cv2.mean(picture)
            mean = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
            table = np.clip(np.arange(256) * factor + (1 - factor) * mean + 0.5, 0, 255).astype(np.uint8)
            picture = cv2.LUT(picture, table)
        else:
            matrix = factor * np.eye(3) + (1 - factor) * np.array([LUMA] * 3)
            picture = cv2.transform(picture, matrix)
    return _shift_hue(picture, hue) if hue_at == len(order) else picture


def _shift_hue(picture: U8, turns: float) -> U8:
    if turns == 0:
        return picture
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # a full circle is 256: the overflow is meant
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
