# SPDX-License-Identifier: Apache-2.0
"""Whether two networks are the same function: their features of real pictures are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest feature of a stage
PICTURES = 4  # that the two networks are compared on
SIDE = 128  # pixels of the comparison: four cells at stride 32


def require_same(expected: Mapping[str, Tensor], exported: Mapping[str, Tensor], *, target: str) -> float:
    """Largest difference of the features, relative to the largest feature of each.

    Raises:
        UserError: more than `TOLERANCE`, or not finite.
    """
    worst = 0.0
    for name, feature in expected.items():
        other = exported[name]
        if feature.shape != other.shape:
            raise UserError(f"{target}: {name} has shape {tuple(other.shape)}, the source {tuple(feature.shape)}")
        difference = float((feature - other).abs().max() / feature.abs().max().clamp_min(1e-12))
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"{target}: {name} differs from the source by {difference:.1e} of its largest feature, more than "
                f"{TOLERANCE:.0e}. Nothing was written"
            )
        worst = max(worst, difference)
    return worst


def require_same_function(original: nn.Module, rebuilt: nn.Module, *, name: str) -> None:
    """Compare a library's network with our ResNet of the same tensors: they may differ in parts without tensors.

    Raises:
        UserError: they are different functions.
    """
    import torch

    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = [network.eval()(pixels).flatten(1) for network in (original, rebuilt)]
    require_same({"pooled": pooled[0]}, {"pooled": pooled[1]}, target=f"our ResNet in place of {name}")


def real_pictures(folder: Path | None, *, count: int = PICTURES, side: int = SIDE) -> Tensor:
    """(N, 3, side, side) uint8: pictures of a folder, or Sticker Scenes."""
    import cv2
    import numpy as np
    import torch

    if folder is None:
        from pretrain.data.scenes import SceneSource
        from pretrain.data.stickers import Stickers

        source = SceneSource(Stickers.load(), split="val", seed=4000, size=side, length=count)
        pictures = [source.scene(i).image for i in range(count)]
    else:
        from pretrain.data.folder import list_images, read_image

        files = list_images(folder) if folder.is_dir() else [folder]
        pictures = [cv2.resize(read_image(f), (side, side), interpolation=cv2.INTER_AREA) for f in files[:count]]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
