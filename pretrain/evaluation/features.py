# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone in eval mode; the processes of a group share the work.

Shapes: `N` pictures, `D` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config_views import InputSpec, ViewConfig
from pretrain.data.crops import crop_box, resized
from pretrain.data.dice import Dice
from pretrain.data.images import ImageSet
from pretrain.data.render import U8
from pretrain.engine import distributed
from pretrain.engine.errors import UserError


def normalised(pictures: Sequence[U8], inputs: InputSpec, device: torch.device) -> Tensor:
    """Pictures (S, S, 3) of one size as a batch (N, 3, S, S) with the backbone's pixel statistics."""
    batch = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (inputs.mean, inputs.std))
    return (batch - mean) / std


def centre(picture: U8, size: int) -> U8:
    """The evaluation view: short side to 8/7 of ``size``, centre crop. A picture of that very size stays as it is."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    scale = size / 0.875 / min(height, width)
    wide, tall = max(size, round(width * scale)), max(size, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = np.asarray(cv2.resize(picture, (wide, tall), interpolation=method), np.uint8)
    top, left = (tall - size) // 2, (wide - size) // 2
    return picture[top : top + size, left : left + size]


def random_crop(picture: U8, size: int, *key: int) -> U8:
    """The training view of the linear protocol: a crop of area .08 to 1, ratio 3/4 to 4/3, flipped half of the time."""
    dice = Dice(*key)
    view = ViewConfig(size=size, crop_scale=(0.08, 1.0))
    top, left, tall, wide = crop_box(picture.shape[0], picture.shape[1], view, dice)
    crop = resized(picture[top : top + tall, left : left + wide], size, "bilinear")
    return np.ascontiguousarray(crop[:, ::-1]) if dice.chance(view.flip) else crop


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def features(
    backbone: nn.Module,
    images: ImageSet,
    indices: Sequence[int],
    inputs: InputSpec,
    *,
    batch: int = 256,
    view: Callable[[U8, int], U8] | None = None,
) -> Tensor:
    """Backbone features (len(indices), D) in float32; each process computes a share, all get the whole.

    Args:
        view: (picture, index) → picture of the right size; None: the evaluation view.
    """
    world, device = distributed.world_size(), distributed.device_of(backbone)
    shard = list(indices)[distributed.rank() :: world]
    share = -(-len(indices) // world)
    shard += list(indices)[: share - len(shard)]  # equal shares; what is too much is cut off below
    rows = []
    with frozen(backbone):
        for start in range(0, share, batch):
            part = shard[start : start + batch]
            make = view or (lambda picture, index: centre(picture, inputs.size))
            pictures = [make(images.image(i), i) for i in part]
            rows.append(backbone(normalised(pictures, inputs, device)).float())
    local = torch.cat(rows)
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local)
    return torch.stack(parts, dim=1).flatten(0, 1)[: len(indices)]  # rank r had every W-th from r on


def labels(images: ImageSet, indices: Sequence[int]) -> Tensor:
    """Labels (len(indices),).

    Raises:
        UserError: a picture has none.
    """
    label_N = torch.tensor([images.label(i) for i in indices], dtype=torch.int64)
    if len(label_N) == 0 or int(label_N.min()) < 0:
        raise UserError("the probe needs labelled pictures: sticker_singles, or a folder with a subfolder per class")
    return label_N
