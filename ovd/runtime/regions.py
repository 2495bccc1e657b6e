# SPDX-License-Identifier: Apache-2.0
"""The networks of a detector of photographs, run by ONNX Runtime; everything between the graphs is NumPy.

What `ovd.modeling.proposals` and `ovd.modeling.fvlm.tower` do with tensors, done with arrays: the tests hold both to
the same boxes and scores.

Shapes: A cells, P proposals, R regions, K words of the proposal network, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first, sigmoid
from ovd.inference.finetuned_names import FinetunedNames
from ovd.inference.fvlm_regions import FvlmRegionModel
from ovd.inference.known_words import WordList
from ovd.inference.postprocess import batched_nms
from ovd.inference.scoring import Deferred, RegionSet
from ovd.modeling.export import DetectorCard
from ovd.pictures import resized, resized_copy
from ovd.runtime.cells import CellGraph, padded
from ovd.runtime.encoder import OnnxEncoder
from ovd.runtime.files import (
    BACKGROUND,
    CARD,
    CONSE,
    PROPOSALS,
    QUALITY,
    REGION_OUTPUTS,
    REGIONS,
    TOWER,
    RuntimeCard,
    export_file,
    read_runtime_card,
)
from ovd.runtime.finetuned import OnnxBranches
from ovd.runtime.session import Graph
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError

MAX_ENLARGEMENT = 4 / 3
"""Of a small picture in the proposal network, as in `ovd.modeling.proposals.build`."""
MIN_SIDE = 1.0  # of a proposal, in pixels of the network's input


class Proposed(NamedTuple):
    """Boxes (P, 4), objectness (P,) and scores of the proposal network's words (P, K), 0…1."""

    boxes: Floats
    objectness: Floats
    words: Floats

    def at(self, index: NDArray[np.int64]) -> Proposed:
        """Some of them, in the order of ``index``."""
        return Proposed(self.boxes[index], self.objectness[index], self.words[index])

    def with_boxes(self, boxes: Floats) -> Proposed:
        """These, and after them boxes with objectness and word scores of 0."""
        added = len(boxes)
        return Proposed(
            np.concatenate([self.boxes, boxes]),
            np.pad(self.objectness, (0, added)),
            np.pad(self.words, ((0, added), (0, 0))),
        )


class OnnxNetwork:
    """`ovd.inference.fvlm_regions.FvlmNetwork` of an export.

    Args:
        folder: of the export.
        card: its card.
        tower: its image tower.
        finetuned: branches of classes that were added by fine-tuning; None: there are none.
        threads: see `Graph`.
    """

    def __init__(
        self,
        folder: Path,
        card: RuntimeCard,
        *,
        tower: Graph,
        finetuned: OnnxBranches | None = None,
        threads: int | None = None,
    ) -> None:
        self.card, self.scale, self.sides = card, card.scale, card.proposal_sides
        self._proposals = CellGraph(export_file(folder, PROPOSALS), card, threads=threads)
        self._head, self._tower = Graph(export_file(folder, REGIONS), threads=threads), tower
        self._conse = Graph(export_file(folder, CONSE), threads=threads) if card.conse_side else None
        self._finetuned = finetuned

    def regions(self, image: NDArray[np.uint8], *, top: int) -> RegionSet:
        """See `FvlmNetwork`."""
        proposals, finetuned_RO = self._proposed(image, top=top), None
        if self._finetuned is not None:
            added, scores = self._finetuned(image)
            finetuned_RO = np.pad(scores, ((len(proposals.boxes), 0), (0, 0)))
            proposals = proposals.with_boxes(added)
        height, width = image.shape[:2]
        small = resized(image, self.card.side / max(height, width))
        pixels = pixels_for_tower(small, self.card)
        fine, coarse, last = self._tower(["fine", "coarse", "last"], pixels=pixels)
        scale = np.array([small.shape[1] / width, small.shape[0] / height] * 2, np.float32)
        boxes = proposals.boxes * scale
        word_scores = proposals.words if self.card.words else proposals.words[:, :0]
        has_quality = self.card.quality
        embedding, bias, image_embedding, *quality = self._head(
            [*REGION_OUTPUTS, *([QUALITY] if has_quality else [])],
            fine=fine,
            coarse=coarse,
            last=last,
            boxes=boxes,
            around=widened(boxes, self.card.context, small.shape[:2]),
            known=word_scores,
            **({"size": np.array(small.shape[:2], np.float32)} if has_quality else {}),
        )
        return RegionSet(
            boxes=proposals.boxes,
            objectness=proposals.objectness,
            text=embedding,
            image=image_embedding,
            masks=None,
            size=(height, width),
            word_scores=word_scores,
            bias=bias,
            conse=None if self._conse is None else self._deferred(self._conse, image, proposals.boxes),
            quality=quality[0] if has_quality else None,
            finetuned=finetuned_RO,
        )

    def _deferred(self, graph: Graph, image: NDArray[np.uint8], boxes: Floats) -> Deferred:
        """(R, D) of `ovd.modeling.fvlm.conse.RegionConse.deferred`."""
        small = resized_copy(image, self.card.conse_side)
        scale = np.array([small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]] * 2, np.float32)

        def rows() -> Floats:
            pixels = normalised(small, mean=self.card.conse_mean, std=self.card.conse_std)
            return graph(["row"], pixels=pixels, boxes=boxes * scale)[0]

        return Deferred(rows)

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """See `FvlmNetwork`."""
        proposals = self._proposed(image, top=top)
        return proposals.boxes, proposals.objectness

    def _proposed(self, image: NDArray[np.uint8], *, top: int) -> Proposed:
        limit = round(MAX_ENLARGEMENT * max(image.shape[:2]))
        sides = dict.fromkeys(min(side, limit) for side in self.sides)
        parts = [self._at(image, side) for side in sides]
        proposals = Proposed(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        return proposals.at(suppressed(proposals.boxes, proposals.objectness, self.card.nms)[:top])

    def _at(self, image: NDArray[np.uint8], side: int) -> Proposed:
        """Proposals in pixels of the picture, of the picture with its longest side at ``side`` pixels."""
        card, cells = self.card, self._proposals(image, side=side)
        objectness = np.nan_to_num(sigmoid(cells.words.max(axis=1)))
        best = best_first(objectness, card.pre_nms)
        boxes = cells.boxes(best)
        is_large = ((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE).all(axis=1)
        best, boxes = best[is_large], boxes[is_large]
        first = suppressed(boxes, objectness[best], card.nms)[: card.post_nms]
        best = best[first]
        return Proposed(boxes[first] * cells.to_picture, objectness[best], sigmoid(cells.words[best]))


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
        UserError: missing or damaged files, or an export without a part that the calibration is for.
    """
    card = read_runtime_card(folder)
    parts = {"open_conse": card.conse_side, "open_quality": card.quality}
    if lacking := [key for key, there in parts.items() if detector.calibration.get(key) and not there]:
        raise UserError(
            f"{folder / CARD}: the export lacks what calibration.{lacking[0]} of its model.json is for; export the "
            "weights again with this version"
        )
    try:
        background = np.load(export_file(folder, BACKGROUND)).astype(np.float32)
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder / BACKGROUND}: cannot be read ({problem}); export the weights again") from problem
    tower = Graph(export_file(folder, TOWER), threads=threads)
    lexicon = read_lexicon()
    names = FinetunedNames.of(detector.finetuned, lexicon=lexicon)
    finetuned = None
    if names is not None:
        finetuned = OnnxBranches(folder, card, branches=detector.finetuned, names=names, threads=threads)
    model = FvlmRegionModel(
        network=OnnxNetwork(folder, card, tower=tower, finetuned=finetuned, threads=threads),
        card=detector,
        background_words=background,
        proposal_words=WordList(words=card.words, lexicon=lexicon),
        training_words=WordList(words=detector.background_words, lexicon=lexicon),
        finetuned=names,
        top=top,
    )
    return model, OnnxEncoder(folder, card, tower=tower, threads=threads)


def pixels_for_tower(small: NDArray[np.uint8], card: RuntimeCard) -> Floats:
    """(1, 3, H, W) of a resized (h, w, 3) RGB picture, padded with the mean colour."""
    return normalised(small, mean=card.image_mean, std=card.image_std)


def normalised(small: NDArray[np.uint8], *, mean: Sequence[float], std: Sequence[float]) -> Floats:
    """The same with the statistics (3,) of RGB in 0…1 that a network was trained with."""
    return padded((small - 255 * np.array(mean, np.float32)) / (255 * np.array(std, np.float32)))


def widened(boxes: Floats, factor: float, size: tuple[int, int]) -> Floats:
    """Boxes grown about their centres, inside a picture of (height, width)."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    grown = np.concatenate([centre - factor * half, centre + factor * half], axis=1)
    return np.clip(grown, 0, np.array([size[1], size[0]] * 2, np.float32))


def suppressed(boxes: Floats, scores: Floats, iou: float) -> NDArray[np.int64]:
    """Indices that remain after class-agnostic NMS, best first."""
    return batched_nms(boxes, scores, np.zeros(len(boxes), np.int64), iou)
