# SPDX-License-Identifier: Apache-2.0
"""A graph of a dense detector, of the proposal network or of a branch of fine-tuned classes, run by ONNX Runtime.

Shapes: A cells of all levels, finest first; K words; P some of the cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.pictures import resized
from ovd.runtime.files import RuntimeCard
from ovd.runtime.session import Graph

STEP = 32  # inputs are padded to a multiple of it


@dataclass(frozen=True, kw_only=True)
class CellOutputs:
    """Outputs of a graph for a picture.

    Attributes:
        words: (A, K) logits.
        sides: (A, 4, bins) logits of left, top, right, bottom.
        centres: (A, 2) x and y, pixels of the resized picture.
        strides: (A,) pixels.
        size: (height, width) of the resized picture.
        to_picture: (4,) factors to pixels of the picture.
    """

    words: Floats
    sides: Floats
    centres: Floats
    strides: Floats
    size: tuple[int, int]
    to_picture: Floats

    def boxes(self, index: NDArray[np.int64]) -> Floats:
        """(P, 4) boxes of some cells, in pixels of the resized picture and inside it."""
        boxes = np.nan_to_num(decode(self.sides[index], self.centres[index], self.strides[index]))
        return np.clip(boxes, 0, np.array(self.size[::-1] * 2, np.float32))


class CellGraph:
    """Runs a graph on pictures.

    Args:
        file: ``.onnx``.
        card: of the export: how pixels are prepared.
        threads: see `Graph`.
    """

    def __init__(self, file: Path, card: RuntimeCard, *, threads: int | None = None) -> None:
        self._graph, self._card = Graph(file, threads=threads), card

    def __call__(self, image: NDArray[np.uint8], *, side: int) -> CellOutputs:
        """Outputs for an (H, W, 3) RGB picture with its longest side at ``side`` pixels."""
        resized_image = resized(image, side / max(image.shape[:2]))
        height, width = resized_image.shape[:2]
        pixels = pixels_for_cells(resized_image, self._card)
        words, sides = self._graph(["words", "sides"], pixels=pixels)
        centres, strides = cell_centres((pixels.shape[2], pixels.shape[3]), self._card.strides)
        return CellOutputs(
            words=words[0],
            sides=sides[0],
            centres=centres,
            strides=strides,
            size=(height, width),
            to_picture=np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32),
        )


def pixels_for_cells(small: NDArray[np.uint8], card: RuntimeCard) -> Floats:
    """(1, 3, H, W) of a resized (h, w, 3) RGB picture, padded with black."""
    height, width = small.shape[:2]
    black = np.pad(small, ((0, -height % STEP), (0, -width % STEP), (0, 0)))
    mean, std = (np.array(x, np.float32) for x in (card.proposal_mean, card.proposal_std))
    return padded((black - mean) / std)


def padded(pixels: Floats) -> Floats:
    """(h, w, 3) to (1, 3, H, W), with zeros below and right up to a multiple of `STEP`."""
    height, width = pixels.shape[:2]
    return np.pad(pixels.transpose(2, 0, 1), ((0, 0), (0, -height % STEP), (0, -width % STEP)))[None]


def cell_centres(size: tuple[int, int], strides: tuple[int, ...]) -> tuple[Floats, Floats]:
    """((A, 2) x and y of the centres, (A,) strides) in pixels, finest level first, rows before columns."""
    points, steps = [], []
    for stride in strides:
        y, x = np.mgrid[: -(-size[0] // stride), : -(-size[1] // stride)].astype(np.float32) + np.float32(0.5)
        points.append(np.stack([x, y], axis=-1).reshape(-1, 2) * stride)
        steps.append(np.full(x.size, stride, np.float32))
    return np.concatenate(points), np.concatenate(steps)


def decode(sides: Floats, centres: Floats, strides: Floats) -> Floats:
    """(P, 4, bins) logits to (P, 4) boxes: each side is the expectation of its bins, in strides from the centre."""
    powers = np.exp(sides - sides.max(axis=-1, keepdims=True))
    distance = powers @ np.arange(sides.shape[-1], dtype=np.float32) / powers.sum(axis=-1) * strides[:, None]
    return np.concatenate([centres - distance[:, :2], centres + distance[:, 2:]], axis=1)
