# SPDX-License-Identifier: Apache-2.0
"""Boxes of one network, classified by another image-text encoder from crops: any CLIP on any proposals.

A word c of a region is scored alone, as `ovd.inference.fvlm_regions` scores words that no network was trained on:

    p_c = e^{s·cos(crop, c)} / (e^{s·cos(crop, c)} + Σ_b e^{s·cos(crop, b)})
    raw = p_c · objectness^a · area^e

with the encoder's own inverse temperature s, and b over the background words that contradict c: no synonym of it, no
word above or below it. A sigmoid encoder's bias (SigLIP's `logit_bias`) is the same for every word and cancels in p.
Words that the proposal network was trained on have its score beside p, in a geometric mean.

Shapes: R regions, C classes, B background words, K words of the proposal network, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, as_array, best_first, platt_scaled, unit_rows
from ovd.inference.crop_refinement import shrunk
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.hyponyms import best_of
from ovd.inference.known_words import Phrases, WordList
from ovd.inference.open_words import contradicting
from ovd.inference.region_model import RegionModel
from ovd.inference.scoring import Calibration, RegionSet, competitive_probabilities
from ovd.regions.crops import embed_regions
from ovd.regions.proposals import large_enough

if TYPE_CHECKING:
    from ovd.inference.scorers import Scorer
    from ovd.modeling.export import DetectorCard
    from ovd.modeling.proposals.build import PhotoProposer
    from ovd.regions.crops import RegionEncoder
    from ovd.regions.proposals import Proposer

CROPS = 50
"""Default number of regions that are cropped and embedded per picture."""

BATCH = 32
"""Crops per forward pass of the encoder."""

SCALES = (1.2,)
"""Of the crops: the box with a tenth of its sides around it. A second scale would double the time."""


class RegionSource(Protocol):
    """Gives the boxes whose crops the encoder classifies."""

    def __call__(self, image: NDArray[np.uint8]) -> RegionSet:
        """Regions of a uint8 (H, W, 3) RGB picture, best objectness first; their embeddings are not used."""
        ...


@dataclass(frozen=True, kw_only=True)
class PhotoBoxes:
    """Boxes of the proposal network of photographs, with its scores of the words it was trained on.

    Attributes:
        proposer: the network.
        top: boxes kept.
        word_scores: whether its scores of words are kept.
    """

    proposer: PhotoProposer
    top: int
    word_scores: bool = True

    def __call__(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionSource`."""
        proposals = self.proposer.regions(image, top=self.top)
        return RegionSet(
            boxes=proposals.boxes.numpy(),
            objectness=proposals.objectness.numpy(),
            text=np.zeros((len(proposals.boxes), 0), np.float32),
            image=None,
            masks=None,
            size=(image.shape[0], image.shape[1]),
            word_scores=(proposals.words if self.word_scores else proposals.words[:, :0]).numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class DetectorBoxes:
    """Regions of an open-vocabulary detector, with its masks; its own embeddings are not used.

    Attributes:
        model: the detector; its ``top`` limits the regions.
    """

    model: RegionModel

    def __call__(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionSource`."""
        return self.model.regions(image)


@dataclass(frozen=True, kw_only=True)
class ProposedBoxes:
    """Boxes of anything that proposes, such as a class-agnostic detector.

    Attributes:
        proposer: the network.
        top: boxes kept.
    """

    proposer: Proposer
    top: int

    def __call__(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionSource`."""
        boxes, objectness = (as_array(values) for values in self.proposer.propose(image, top=self.top))
        return RegionSet(
            boxes=boxes.astype(np.float32),
            objectness=objectness.astype(np.float32),
            text=np.zeros((len(boxes), 0), np.float32),
            image=None,
            masks=None,
            size=(image.shape[0], image.shape[1]),
        )


class CropClassifier(RegionModel):
    """Regions of any source, embedded by an encoder that sees their crops.

    Args:
        source: gives the boxes.
        encoder: embeds crops, and elsewhere words.
        name: of the encoder, for notices.
        background_words: (B, D) embeddings by ``encoder`` of ``words.words``.
        words: the background words and their places in the lexicon.
        proposal_words: those that the source scores; none where it scores none.
        calibration: ``open_scale`` is the encoder's inverse temperature.
        calibrated: whether the calibration was fitted for this encoder and these boxes.
        card: of the detector that the boxes come from, where it has one.
    """

    has_published_protocol = False

    def __init__(
        self,
        *,
        source: RegionSource,
        encoder: RegionEncoder,
        name: str,
        background_words: Floats,
        words: WordList,
        proposal_words: WordList,
        calibration: Calibration,
        calibrated: bool,
        card: DetectorCard | None = None,
    ) -> None:
        self.source, self.encoder, self.name, self.card = source, encoder, name, card
        self.background_words = unit_rows(background_words)
        self.words, self.proposal_words = words, proposal_words
        self.calibration, self.calibrated = calibration, calibrated

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionModel.regions`; boxes with a side under two pixels cannot be cropped and are left out."""
        return embed_boxes(self.source(image), image, self.encoder)

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `RegionModel.propose`: nothing is cropped for boxes alone."""
        regions = self.source(image)
        best = best_first(regions.objectness, top)
        return regions.boxes[best], regions.objectness[best]

    def set_sides(self, sides: tuple[int, ...]) -> None:
        """See `RegionModel.set_sides`."""
        if not isinstance(self.source, PhotoBoxes):
            super().set_sides(sides)
        else:
            self.source.proposer.sides = sides

    def notices(self, phrases: Phrases, rows: Floats) -> tuple[str, ...]:
        """A notice if the scores are not calibrated."""
        return () if self.calibrated else (uncalibrated_notice(self.name),)

    def scorer(self, rows: Floats, phrases: Phrases, competitors: Floats) -> Scorer:
        """See `RegionModel.scorer`; the background words come first among the competitors."""
        understood = [tuple(phrase for phrase in group if self.words.understands(phrase)) for group in phrases]
        competitor_mask = contradicting(self.words.relations(understood).related, len(competitors))
        relations = self.proposal_words.relations(understood)
        return CropScorer(
            rows=rows,
            competitors=competitors,
            competitor_mask=competitor_mask,
            word_rows=np.zeros((len(self.proposal_words.words), rows.shape[1]), np.float32),  # there is no head
            hyponyms=relations.same_or_below,
            related=relations.related,
            scale=self.calibration.open_scale,
            calibration=self.calibration,
        )


@dataclass(frozen=True, kw_only=True)
class CropScorer(WordScorer):
    """Scores words alone by the embeddings of crops; ``head_weight`` of the calibration is the encoder's share.

    A phrase that is no noun of the lexicon ("red car") is scored by the encoder alone, and its noun competes with it.
    """

    def closed_scores(self, regions: RegionSet) -> Floats:
        """(R, C) geometric means of the best proposal word of each class and the encoder's p; near 0 without any."""
        assert regions.word_scores is not None and regions.image is not None
        c = self.calibration
        named_RC = competitive_probabilities(
            regions.image, self.rows, self.competitors, None, scale=c.open_scale, mask_CB=self.competitor_mask
        )
        best_RC = best_of(regions.word_scores, self.hyponyms)
        return platt_scaled(best_RC ** (1 - c.head_weight) * named_RC**c.head_weight, slope=c.slope, offset=c.offset)


def embed_boxes(regions: RegionSet, image: NDArray[np.uint8], encoder: RegionEncoder) -> RegionSet:
    """Regions with the encoder's embeddings of their crops in place of their own.

    Large pictures are shrunk first, as `ovd.inference.crop_refinement` does.

    Args:
        regions: of one picture; those with a side under two pixels are left out.
        image: (H, W, 3) uint8 RGB, the picture.
        encoder: embeds the crops.
    """
    regions = regions.at(large_enough(regions.boxes))
    small = shrunk(image, regions.boxes)
    rows = as_array(embed_regions(encoder, *small, scales=SCALES, resample="bicubic", batch_size=BATCH))
    no_words = np.zeros((len(regions), 0), np.float32)
    return replace(
        regions,
        text=rows,
        image=rows,
        word_scores=no_words if regions.word_scores is None else regions.word_scores,
        bias=None,
        conse=None,
        finetuned=None,
    )


def uncalibrated_notice(name: str) -> str:
    """The notice about scores that were never fitted."""
    return (
        f"scores of {name} are not calibrated on these boxes: they rank boxes but are not "
        "probabilities; fit them with `wordbox calibrate --encoder`"
    )
