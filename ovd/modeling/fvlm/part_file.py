# SPDX-License-Identifier: Apache-2.0
"""Parts of a detector of photographs that have a file of their own in its folder, beside ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError


def save_part(path: Path, part: nn.Module, *, file_format: str) -> None:
    """Write a part's tensors, in half precision."""
    tensors = {
        name: tensor.detach().cpu().half().contiguous()
        for name, tensor in part.state_dict().items()
        if tensor.is_floating_point()
    }
    save_weights(path, tensors, {"format": file_format})


def read_part(path: Path, *, file_format: str) -> dict[str, Tensor]:
    """The tensors of a part.

    Raises:
        UserError: no such file, or one of another part.
    """
    tensors, facts = load_weights(path)
    if facts.get("format") != file_format:
        raise UserError(f"{path}: has format {facts.get('format')!r}, not {file_format!r}; export the detector again")
    return tensors
