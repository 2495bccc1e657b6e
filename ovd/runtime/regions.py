# SPDX-License-Identifier: Apache-2.0
"""The networks of a detector of photographs, run by ONNX Runtime; everything between the graphs is NumPy.

What `ovd.modeling.proposals` and `ovd.modeling.fvlm.tower` do with tensors, done with arrays: the tests hold both to
the same boxes and scores.

Shapes: A cells, P proposals, R regions, K known words, D joint embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first, sigmoid
from ovd.inference.fvlm_regions import FvlmRegionModel
from ovd.inference.known_words import WordList
from ovd.inference.postprocess import batched_nms
from ovd.inference.scoring import RegionSet
from ovd.modeling.export import DetectorCard
from ovd.pictures import resized
from ovd.runtime.encoder import OnnxEncoder
from ovd.runtime.files import BACKGROUND, PROPOSALS, REGIONS, TOWER, RuntimeCard, read_runtime_card
from ovd.runtime.session import Graph
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError

STEP = 32  # inputs are padded to a multiple of it
MAX_ENLARGEMENT = 4 / 3
"""Of a small picture in the proposal network, as in `ovd.modeling.proposals.build`."""
LEAST_SIDE = 1.0  # of a proposal, in pixels of the network's input


class Proposed(NamedTuple):
    """Boxes (P, 4), objectness (P,) and scores of known words (P, K), 0…1."""

    boxes: Floats
    objectness: Floats
    words: Floats

    def at(self, index: NDArray[np.int64]) -> Proposed:
        """Some of them, in the order of ``index``."""
        return Proposed(self.boxes[index], self.objectness[index], self.words[index])


class OnnxNetwork:
    """`ovd.inference.fvlm_regions.FvlmNetwork` of an export.

    Args:
        folder: of the export.
        card: its card.
        tower: its image tower.
        threads: see `Graph`.
    """

    def __init__(self, folder: Path, card: RuntimeCard, *, tower: Graph, threads: int | None = None) -> None:
        self.card, self.scale, self.sides = card, card.scale, card.proposal_sides
        self._proposals, self._head = (Graph(folder / name, threads=threads) for name in (PROPOSALS, REGIONS))
        self._tower = tower
        self._mean, self._std = (255 * np.array(x, np.float32) for x in (card.image_mean, card.image_std))

    def regions(self, image: NDArray[np.uint8], *, top: int) -> RegionSet:
        """See `FvlmNetwork`."""
        found = self._proposed(image, top=top)
        height, width = image.shape[:2]
        small = resized(image, self.card.side / max(height, width))
        pixels = padded((small - self._mean) / self._std)
        fine, coarse, last = self._tower(["fine", "coarse", "last"], pixels=pixels)
        scale = np.array([small.shape[1] / width, small.shape[0] / height] * 2, np.float32)
        boxes = found.boxes * scale
        known = found.words if self.card.words else found.words[:, :0]
        embedding, bias, own = self._head(
            ["embedding", "bias", "image"],
            fine=fine,
            coarse=coarse,
            last=last,
            boxes=boxes,
            around=widened(boxes, self.card.context, small.shape[:2]),
            known=known,
        )
        return RegionSet(
            boxes=found.boxes,
            objectness=found.objectness,
            text=embedding,
            image=own,
            masks=None,
            size=(height, width),
            known=known,
            bias=bias,
        )

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """See `FvlmNetwork`."""
        found = self._proposed(image, top=top)
        return found.boxes, found.objectness

    def _proposed(self, image: NDArray[np.uint8], *, top: int) -> Proposed:
        limit = round(MAX_ENLARGEMENT * max(image.shape[:2]))
        sides = dict.fromkeys(min(side, limit) for side in self.sides)
        parts = [self._at(image, side) for side in sides]
        found = Proposed(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        return found.at(kept(found.boxes, found.objectness, self.card.nms)[:top])

    def _at(self, image: NDArray[np.uint8], side: int) -> Proposed:
        """Proposals in pixels of the picture, of the picture with its longest side at ``side`` pixels."""
        card = self.card
        small = resized(image, side / max(image.shape[:2]))
        height, width = small.shape[:2]
        black = np.pad(small, ((0, -height % STEP), (0, -width % STEP), (0, 0)))
        mean, std = np.array(card.proposal_mean, np.float32), np.array(card.proposal_std, np.float32)
        words, sides = self._proposals(["words", "sides"], pixels=padded((black - mean) / std))
        centres, strides = cell_centres(black.shape[:2], card.strides)
        objectness = np.nan_to_num(sigmoid(words[0].max(axis=1)))
        best = best_first(objectness, card.pre_nms)
        boxes = np.nan_to_num(decode(sides[0][best], centres[best], strides[best]))
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
        there = ((boxes[:, 2:] - boxes[:, :2]) > LEAST_SIDE).all(axis=1)
        best, boxes = best[there], boxes[there]
        first = kept(boxes, objectness[best], card.nms)[: card.post_nms]
        back = np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32)
        return Proposed(boxes[first] * back, objectness[best[first]], sigmoid(words[0][best[first]]))


def load_onnx(
    folder: Path, detector: DetectorCard, *, threads: int | None = None, top: int = 150
) -> tuple[FvlmRegionModel, OnnxEncoder]:
    """An exported detector of photographs and its encoder.

    Args:
        folder: of the export.
        detector: the detector's card: its calibration is the one that counts.
        threads: see `Graph`.
        top: regions kept per picture.

    Raises:
        UserError: missing or damaged files.
    """
    card = read_runtime_card(folder)
    try:
        background = np.load(folder / BACKGROUND).astype(np.float32)
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder / BACKGROUND}: cannot be read ({problem}); export the weights again") from problem
    tower = Graph(folder / TOWER, threads=threads)
    lexicon = read_lexicon()
    model = FvlmRegionModel(
        network=OnnxNetwork(folder, card, tower=tower, threads=threads),
        card=detector,
        background_words=background,
        known=WordList(words=card.words, lexicon=lexicon),
        trained=WordList(words=detector.bank, lexicon=lexicon),
        top=top,
    )
    return model, OnnxEncoder(folder, card, tower=tower, threads=threads)


def padded(pixels: Floats) -> Floats:
    """(h, w, 3) to (1, 3, H, W), with zeros below and right up to a multiple of `STEP`."""
    height, width = pixels.shape[:2]
    return np.pad(pixels.transpose(2, 0, 1), ((0, 0), (0, -height % STEP), (0, -width % STEP)))[None]


def widened(boxes: Floats, factor: float, size: tuple[int, int]) -> Floats:
    """Boxes grown about their centres, inside a picture of (height, width)."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    grown = np.concatenate([centre - factor * half, centre + factor * half], axis=1)
    return np.clip(grown, 0, np.array([size[1], size[0]] * 2, np.float32))


def cell_centres(size: tuple[int, int], strides: tuple[int, ...]) -> tuple[Floats, Floats]:
    """((A, 2) x and y of the centres, (A,) strides) in pixels, finest level first, rows before columns."""
    points, steps = [], []
    for stride in strides:
        y, x = np.mgrid[: size[0] // stride, : size[1] // stride].astype(np.float32) + np.float32(0.5)
        points.append(np.stack([x, y], axis=-1).reshape(-1, 2) * stride)
        steps.append(np.full(x.size, stride, np.float32))
    return np.concatenate(points), np.concatenate(steps)


def decode(sides: Floats, centres: Floats, strides: Floats) -> Floats:
    """(P, 4, bins) logits to (P, 4) boxes: each side is the expectation of its bins, in strides from the centre."""
    powers = np.exp(sides - sides.max(axis=-1, keepdims=True))
    reach = powers @ np.arange(sides.shape[-1], dtype=np.float32) / powers.sum(axis=-1) * strides[:, None]
    return np.concatenate([centres - reach[:, :2], centres + reach[:, 2:]], axis=1)


def kept(boxes: Floats, scores: Floats, iou: float) -> NDArray[np.int64]:
    """Indices that remain after NMS of nameless boxes, best first."""
    return batched_nms(boxes, scores, np.zeros(len(boxes), np.int64), iou)
