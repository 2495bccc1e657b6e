# SPDX-License-Identifier: Apache-2.0
"""A higher-resolution map beside the C4 backbone's, for boxes and masks.

Shapes: ``N`` images, ``R`` regions, ``S`` side of the pooled map.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DetailMap(nn.Module):
    """One map of stride 8 from res3 and res4 of a C4 backbone, for boxes and masks.

    CLIP's last stage reduces a region to 2x2 cells: enough to classify it, too coarse to localise it. Lateral 1x1
    convolutions, sum after up-sampling, 3x3 convolution, as in FPN (Lin et al., arXiv:1612.03144, section 3).
    """

    def __init__(self, *, fine_channels: int, coarse_channels: int, channels: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine_channels, channels, 1)
        self.coarse = nn.Conv2d(coarse_channels, channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        for convolution in (self.fine, self.coarse, self.smooth):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # FPN's reference initialisation
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(N, fine_channels, H, W) and (N, coarse_channels, about H/2, about W/2) to (N, channels, H, W)."""
        coarse = F.interpolate(self.coarse(coarse), scale_factor=2.0, mode="nearest")
        return self.smooth(self.fine(fine) + coarse[..., : fine.shape[-2], : fine.shape[-1]])


class DetailBoxHead(nn.Module):
    """Regions pooled from the detail map, (R, channels, S, S), to a hidden layer that the box regressor reads."""

    def __init__(self, *, channels: int, resolution: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels // 8, channels),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(channels * resolution**2, hidden),
            nn.ReLU(inplace=True),
        )
        self.width = hidden

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(pooled)
