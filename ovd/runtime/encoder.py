# SPDX-License-Identifier: Apache-2.0
"""An exported image-text encoder: `ovd.text.TextEncoder` and `ovd.regions.cutting.CropEncoder` in arrays.

Shapes: N texts or crops, T tokens, S side of a crop, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.runtime.files import MERGES, TEXT, RuntimeCard, export_file
from ovd.runtime.session import Graph
from ovd.runtime.tokenizer import BytePairs


class OnnxEncoder:
    """Text tower and image tower of an export.

    Args:
        folder: of the export.
        card: its card.
        tower: its image tower, which the regions share.
        threads: see `Graph`.
    """

    def __init__(self, folder: Path, card: RuntimeCard, *, tower: Graph, threads: int | None = None) -> None:
        self.embed_dim, self.image_size, self.image_mean = card.embed_dim, card.image_size, card.image_mean
        self.has_image_tower = card.image_size > 0
        self._fingerprint = card.encoder_fingerprint
        self._mean, self._std = (np.array(x, np.float32)[:, None, None] for x in (card.image_mean, card.image_std))
        self._tokenizer = BytePairs(export_file(folder, MERGES), context_length=card.context_length)
        self._text, self._tower = Graph(export_file(folder, TEXT), threads=threads), tower

    def fingerprint(self) -> str:
        """That of the encoder that was exported: a cache of its texts fits both."""
        return self._fingerprint

    def token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(N, T) tokens; longer texts are cut off."""
        return self._tokenizer(texts)

    def text_rows(self, texts: Sequence[str]) -> Floats:
        """(N, D) embeddings, not normalised."""
        (rows,) = self._text(["row"], tokens=self._tokenizer(texts))
        return rows

    def crop_rows(self, crops: NDArray[np.uint8]) -> Floats:
        """Uint8 (N, 3, S, S) -> (N, D), not normalised."""
        pixels = (crops.astype(np.float32) / 255 - self._mean) / self._std
        (rows,) = self._tower(["row"], pixels=pixels)
        return rows
