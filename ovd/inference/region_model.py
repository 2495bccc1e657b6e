# SPDX-License-Identifier: Apache-2.0
"""Interface of loaded detectors: a picture in, its regions out, as NumPy arrays. One subclass per network.

Shapes: R regions, P proposals, D joint embedding, B background words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first
from ovd.inference.everything import PromptFreeWords
from ovd.inference.example_scorers import CentredCosineScorer
from ovd.inference.scorers import CalibratedScorer, Scorer
from ovd.inference.scoring import Calibration, RegionSet
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from ovd.regions.cutting import CropEncoder


class RegionModel(ABC):
    """The interface of networks that `ovd.Detector` runs; `ovd.modeling.load.load_detector_model` returns one.

    Attributes:
        card: of an exported detector; None for a network that was not loaded from a folder.
        background_words: (B, D) unit embeddings of the words that every class competes with.
        background: (D,) unit embedding of "nothing", or None.
        calibration: what turns cosines into scores.
        example_encoder: embeds crops of examples, where regions live in another image space than the text encoder's
            (a DETR pretrained on patches); None: the image tower of the text encoder does.
        objectness_weight: w of ``class^(1−w) · objectness^w`` in the published scores. 0 where the embedding itself
            separates objects from background.
        has_published_protocol: whether its embeddings can be scored by the published protocol, one softmax over the
            vocabulary.
    """

    card: DetectorCard | None = None
    background_words: Floats
    background: Floats | None = None
    calibration: Calibration
    example_encoder: CropEncoder | None = None
    objectness_weight: float = 0.0
    has_published_protocol: bool = True

    @abstractmethod
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """The regions of a uint8 (H, W, 3) RGB picture, embedded and in its pixels.

        Raises:
            UserError: a network without text embeddings.
        """

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """((P, 4) boxes in pixels, (P,) objectness): class-agnostic proposals, best first."""
        regions = self.regions(image)
        best = best_first(regions.objectness, top)
        return regions.boxes[best], regions.objectness[best]

    def set_sides(self, sides: tuple[int, ...]) -> None:
        """Look for boxes in pictures with these longest sides, in pixels.

        Raises:
            UserError: a network of one input size.
        """
        raise UserError("sides are for detectors of photographs; this one looks at pictures in one size")

    def notices(self, phrases: Sequence[Sequence[str]], rows: Floats) -> tuple[str, ...]:
        """Notes on how these classes are interpreted; arguments as those of `scorer`."""
        return ()

    def kind_of(self, phrases: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
        """(C, C) bool: the class in the row is a kind of the class in the column, as *dog* is of *animal*.

        Args:
            phrases: of each class its name and synonyms; none for a class of examples.
        """
        return np.zeros((len(phrases), len(phrases)), dtype=bool)

    def prompt_free_words(self) -> PromptFreeWords:
        """The words of prompt-free detection; none without a card."""
        return PromptFreeWords.plain(() if self.card is None else self.card.classes)

    def scorer(self, rows: Floats, phrases: Sequence[Sequence[str]], competitors: Floats) -> Scorer:
        """The scorer of typed classes; each class is scored alone.

        Args:
            rows: (C, D) unit text embeddings.
            phrases: of each class its name and synonyms.
            competitors: (B, D) unit text embeddings: the background words, then the user's negative words.
        """
        return CalibratedScorer(
            rows=rows, background_words=competitors, background=self.background, calibration=self.calibration
        )

    def example_scorer(self, rows: Floats, competitors: Floats, negatives: Floats) -> Scorer:
        """The scorer of classes given by crops, each scored alone; see `ovd.inference.example_scorers`.

        Args:
            rows: (E, D) unit image embeddings.
            competitors: (B, D) unit text embeddings: the background words, then the person's negative words.
            negatives: (N, D) unit image embeddings of what is not meant.
        """
        return CentredCosineScorer(
            rows=rows, background_words=competitors, negatives=negatives, calibration=self.calibration
        )


class ConditionedBoxes(NamedTuple):
    """Boxes of conditioned queries, in no order.

    Attributes:
        boxes: (K, 4) corners in pixels of the picture.
        score: (K,) how certain each query is.
        class_id: (K,) row of the embedding that conditioned it.
    """

    boxes: Floats
    score: Floats
    class_id: NDArray[np.int64]


class PatchLocator(RegionModel):
    """A network of UP-DETR's pretext, which localises what looks like a patch and has no text embeddings."""

    @abstractmethod
    def locate(self, image: NDArray[np.uint8], rows_CD: Floats) -> ConditionedBoxes:
        """Search a uint8 (H, W, 3) RGB picture for patches.

        Args:
            image: the picture.
            rows_CD: `patch_rows`; without an ``example_encoder``, embeddings of the image-text encoder.
        """

    @abstractmethod
    def patch_rows(self, crops: Sequence[tuple[NDArray[np.uint8], Sequence[float]]]) -> Floats:
        """(K, D) embeddings, not unit rows, of boxes (x1, y1, x2, y2) of pictures, as the pretext embeds its patches.

        Raises:
            UserError: no ``example_encoder``: the image-text encoder embeds the patches.
        """
