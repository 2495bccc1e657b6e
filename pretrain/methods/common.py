# SPDX-License-Identifier: Apache-2.0
"""What every method does first: the batch's views through their augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def augmented(batch: Mapping[str, Any], augment: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """Each view of the batch, (N, 3, S, S) uint8, through its own augmentation.

    Raises:
        ValueError: The batch has another number of views than the method has augmentations.
    """
    views = batch["views"]
    if len(views) != len(augment):
        raise ValueError(f"the batch has {len(views)} views, the method {len(augment)} augmentations")
    with torch.autocast(views[0].device.type, enabled=False):  # pixels stay exact; only the networks are autocast
        return [function(view) for function, view in zip(augment, views, strict=True)]
