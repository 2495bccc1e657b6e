# SPDX-License-Identifier: Apache-2.0
"""How well a box fits an object, of whatever kind: localisation quality, learned from positives alone (OLN,
arXiv:2108.06753).

The proposal network's objectness is its best score of the words that it knows, so it is low for all other things. This
head learns the IoU of a box with its object, on boxes that overlap a labelled one. What nobody labelled is no
background to it, and so it also ranks the boxes of objects that no label names.

Shapes: ``P`` regions, ``F`` pooled features, ``M`` of them from the maps of strides 16 and 32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ovd.config_fvlm import QualityConfig
from ovd.modeling.fvlm.part_file import read_part, save_part
from pretrain.engine.state import load_tensors

FILE = "quality.safetensors"
"""Of an exported detector's folder."""
FORMAT = "localization-quality/1"
GEOMETRY = 7
"""Numbers of `geometry`."""
EDGE = 0.005
"""A box that ends within this share of the picture's side may be cut off by the picture's edge."""


def geometry(boxes_P4: Tensor, sizes: Tensor) -> Tensor:
    """(P, 7) logarithms of a box's width and height as shares of the picture and of its aspect ratio, and at which
    of the picture's edges (left, top, right, bottom) it ends.

    Args:
        boxes_P4: x1, y1, x2, y2 in pixels of the picture.
        sizes: (2,) its height and width, or (P, 2) where the boxes are of several pictures.
    """
    whole_height, whole_width = sizes[..., 0], sizes[..., 1]
    width, height = boxes_P4[:, 2] - boxes_P4[:, 0], boxes_P4[:, 3] - boxes_P4[:, 1]
    logs = [width / whole_width, height / whole_height, width / height.clamp(min=1e-3)]
    left, top = boxes_P4[:, 0] <= EDGE * whole_width, boxes_P4[:, 1] <= EDGE * whole_height
    right, bottom = boxes_P4[:, 2] >= (1 - EDGE) * whole_width, boxes_P4[:, 3] >= (1 - EDGE) * whole_height
    edges = [edge.to(boxes_P4.dtype) for edge in (left, top, right, bottom)]
    return torch.stack([*(value.clamp(min=1e-4).log() for value in logs), *edges], dim=1)


class LocalizationQuality(nn.Module):
    """A hidden layer on a region's pooled maps and its geometry.

    The last map, which names a region, is left out: with it the boxes of objects unseen in training are ranked worse.

    Args:
        maps: M, the first of the pooled features.
        config: its size.
    """

    def __init__(self, *, maps: int, config: QualityConfig) -> None:
        super().__init__()
        self.maps = maps
        self.norm = nn.BatchNorm1d(maps + GEOMETRY, affine=False)
        self.layers = nn.Sequential(
            nn.Linear(maps + GEOMETRY, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 1),
        )

    def forward(self, features_PF: Tensor, geometry_PG: Tensor) -> Tensor:
        """(P,) logits of the IoU with an object."""
        inputs = torch.cat([features_PF[:, : self.maps].float(), geometry_PG.float()], dim=1)
        logits_P1: Tensor = self.layers(self.norm(inputs))
        return logits_P1[:, 0]


def save_quality(folder: Path, quality: LocalizationQuality) -> None:
    """Write ``quality.safetensors``, in half precision."""
    save_part(folder / FILE, quality, file_format=FORMAT)


def load_quality(folder: Path, quality: LocalizationQuality) -> None:
    """Load the head of an exported detector's folder.

    Raises:
        UserError: no such file, or one of another network.
    """
    tensors = read_part(folder / FILE, file_format=FORMAT)
    load_tensors(quality, tensors, source=folder / FILE)
