# SPDX-License-Identifier: Apache-2.0
"""Encode a batch piece by piece, so that one piece's activations are in memory at a time, with the exact gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore every buffer afterwards: batch norm normalises as usual, but its running statistics do not change."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def encode_in_chunks(encode: Callable[..., Tensor], *inputs: Tensor, chunk: int, module: nn.Module) -> Tensor:
    """``encode(*inputs)``, computed in two passes per piece (gradient caching, arXiv:2101.06983).

    The forward pass keeps the embeddings only. When the loss's gradient with respect to them is there, the backward
    pass encodes one piece after another again, this time with activations, and frees them before the next. A loss over
    the whole batch thus needs the activations of one piece, for one more forward pass.

    Random numbers are replayed, so that dropout is the same in both passes. Batch norm in training mode uses the
    statistics of a piece, in both passes: with it, the loss is that of a network with smaller norm batches (as on
    several processes without synchronised batch norm), not that of the whole batch. Its running statistics move once
    per piece, in the forward pass only.

    Args:
        encode: one or more (n, …) → (n, D), each row by itself; runs twice.
        inputs: (N, …) each.
        chunk: rows of a piece; the last may have fewer.
        module: what ``encode`` runs, for its buffers.

    Returns:
        (N, D).
    """
    return torch.cat(
        [
            checkpoint(
                encode,
                *piece,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), buffers_restored(module)),  # of the two passes
            )
            for piece in zip(*(values.split(chunk) for values in inputs), strict=True)
        ]
    )
