# SPDX-License-Identifier: Apache-2.0
"""Crops of a picture's boxes -> embeddings of the joint image-text space, with torch.

Shape legend: ``P`` boxes, ``K`` scales, ``S`` side of a crop, ``D`` embedding.

ViLD (section 3.2) describes a proposal by the *sum* of the embeddings of its 1x and 1.5x crops, L2-normalised once.
`ovd.regions.cutting` cuts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ovd.regions.cutting import BAD_EMBEDDINGS, CropOptions, cut_regions
from pretrain.engine.distributed import device_of
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

# Crops per forward on a CPU. More need memory for activations (17 MB a crop in an EfficientNet-Lite2) and time, as they
# leave the caches: of 96 crops all at once took 10.7 s and 2.6 GB, 32 at once 8.1 s and 1.6 GB.
CPU_CROPS = 32


class RegionEncoder(Protocol):
    """The part of ``pretrain.nets.towers.JointEncoder`` that regions need."""

    embed_dim: int
    image_size: int
    image_mean: tuple[float, float, float]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 ``(N, 3, h, w)`` -> normalised float ``(N, 3, S, S)``."""
        ...

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised ``(N, 3, S, S)`` -> ``(N, D)``, not unit length."""
        ...


def crop_regions(
    image: NDArray[np.uint8],
    boxes: NDArray[np.floating] | torch.Tensor,
    *,
    size: int,
    fill: Sequence[float] = (0.5, 0.5, 0.5),
    **options: Unpack[CropOptions],
) -> torch.Tensor:
    """`ovd.regions.cutting.cut_regions` as a tensor, uint8 ``(P, K, 3, S, S)``."""
    return torch.from_numpy(cut_regions(image, np.asarray(boxes), size=size, fill=fill, **options))


def embed_crops(
    encoder: RegionEncoder,
    crops: torch.Tensor,
    *,
    normalise_each: bool = False,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> torch.Tensor:
    """Embed crops: encode each, sum over the scales, L2-normalise.

    Args:
        encoder: an image encoder in eval mode.
        crops: uint8 ``(P, K, 3, S, S)`` from `crop_regions`.
        normalise_each: normalise each crop's embedding before the sum too. ViLD and DetPro do not.
        batch_size: crops per forward; on a CPU at most `CPU_CROPS`.
        precision: ``bf16`` runs the encoder under autocast; sums and norms are always fp32.

    Returns:
        float32 ``(P, D)`` of unit rows, on the CPU.

    Raises:
        UserError: when the encoder returns NaN, infinity or a zero vector.
    """
    count, scales = crops.shape[:2]
    if count == 0:
        return torch.zeros(0, encoder.embed_dim)
    flat = crops.flatten(0, 1)
    parts = []
    device = device_of(encoder)
    at_once = min(batch_size, CPU_CROPS) if device.type == "cpu" else batch_size
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(flat), at_once):
            pixels = encoder.prepare(flat[start : start + at_once].to(device))
            if precision == "bf16":  # 1.1x in a ResNet-18 on a CPU; fp32 is as much slower that way
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            parts.append(encoder.encode_image(pixels).float().cpu())
    each_PKD = torch.cat(parts).view(count, scales, -1).clone()  # the clone is a normal, not an inference, tensor
    if normalise_each:
        each_PKD = F.normalize(each_PKD, dim=-1)
    total_PD = each_PKD.sum(dim=1)
    norm = total_PD.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(norm).all()) or bool((norm < 1e-12).any()):
        raise UserError(BAD_EMBEDDINGS)
    return total_PD / norm


def embed_regions(
    encoder: RegionEncoder,
    image: NDArray[np.uint8],
    boxes: NDArray[np.floating] | torch.Tensor,
    *,
    normalise_each: bool = False,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    **options: Unpack[CropOptions],
) -> torch.Tensor:
    """Embed the boxes of one picture: `crop_regions` then `embed_crops`.

    Returns:
        float32 ``(P, D)`` of unit rows.
    """
    crops = crop_regions(image, boxes, size=encoder.image_size, fill=encoder.image_mean, **options)
    return embed_crops(encoder, crops, normalise_each=normalise_each, batch_size=batch_size, precision=precision)
