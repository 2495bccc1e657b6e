# SPDX-License-Identifier: Apache-2.0
"""Scorers of classes given by crops. Each is a `ovd.inference.scorers.Scorer`; they differ in what they compare.

`CentredCosineScorer` (`RegionModel.example_scorer`'s default: ViLD and the transformers)
    The cosine of the embeddings, centred on the picture, against background words: a region head that was distilled
    from the encoder's embeddings of crops, on drawings.
`WordProfileScorer` (detectors of photographs)
    How alike the distributions over words are, times the centred cosine: the image tower saw words only, and its
    embeddings keep light, size and truncation, which no word says.
`RegionCosineScorer` (Label Studio's smart tool: `similar_regions`)
    The cosine to a region of the same picture, by the same head. Nothing competes, no calibration is needed, and it
    ranks better than a crop's embedding; it cannot search another picture.

Shapes: R regions, E examples, N negatives, B words, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ovd.inference.arrays import Floats, platt_scaled, softmax, unit_rows
from ovd.inference.postprocess import batched_nms, box_ious
from ovd.inference.scorers import PER_CLASS, select_classes
from ovd.inference.scoring import Calibration, RegionSet, score_regions

CENTRE_PRIOR = 10.0
"""Regions' worth of zero in the mean of a picture's regions, see `centred_on_picture`."""

SAME_IOU = 0.5
"""IoU from which two boxes are of the same thing."""

SIMILAR_SCORE = 0.8
"""Least score of `similar_regions`, chosen on 28 drawings (docs/guide/label-studio.md)."""


@dataclass(frozen=True, kw_only=True)
class CentredCosineScorer:
    """Every example alone against background words, negative words and negative examples, as a word is scored.

    Image embeddings share a large common component that carries no class, and they lie apart from the texts. So each
    modality is centred before cosines are taken: images on the mean of the picture's regions, texts on the mean of the
    background words. That nearly doubled the average precision of one crop on Sticker Scenes.

    Attributes:
        rows: (E, D) unit image embeddings.
        background_words: (B, D) unit text embeddings, those of negative words too.
        negatives: (N, D) unit image embeddings of what is not meant.
        calibration: of the checkpoint; its example values are used.
    """

    rows: Floats = field(metadata=PER_CLASS)
    background_words: Floats
    negatives: Floats
    calibration: Calibration

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`; column e depends on the picture and example e alone."""
        if not len(self.rows):
            return np.zeros((len(regions), 0), np.float32)
        centred, (example_ED, negative_ND) = centred_on_picture(regions, self.rows, self.negatives)
        against_BD = np.concatenate([centred_texts(self.background_words), negative_ND])
        return score_regions(
            centred.text, None, centred.objectness, example_ED, against_BD, None, self.calibration.of_examples()
        )

    def select(self, columns: Sequence[int]) -> CentredCosineScorer:
        """See `Scorer`."""
        return select_classes(self, columns)


@dataclass(frozen=True, kw_only=True)
class WordProfileScorer:
    """Every example alone: a sigmoid of ``coefficient · exp(cosine − 1) · objectness^e``.

    A crop and a region are compared by their distributions over words (semantic attributes of an image as its
    representation: classemes, Torresani et al., ECCV 2010), with the Bhattacharyya coefficient ``Σ_b sqrt(p_b q_b)``, 1
    where both are the same. The centred cosine distinguishes objects of one noun.

    Attributes:
        rows: (E, D) unit image embeddings.
        words: (B, D) unit text embeddings.
        calibration: its plain values, see `Calibration.of_examples`.
    """

    rows: Floats = field(metadata=PER_CLASS)
    words: Floats
    calibration: Calibration

    @cached_property
    def _profiles(self) -> Floats:
        return root_profile(self.rows, self.words, scale=self.calibration.logit_scale)

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        if not len(self.rows):
            return np.zeros((len(regions), 0), np.float32)
        c = self.calibration
        centred, (rows_ED,) = centred_on_picture(regions, self.rows)
        score_RE = root_profile(regions.distilled, self.words, scale=c.logit_scale) @ self._profiles.T
        score_RE *= np.exp(centred.text @ rows_ED.T - 1)
        score_RE *= np.power(regions.objectness.clip(0, 1), c.objectness_weight)[:, None]
        if (c.slope, c.offset) == (1.0, 0.0):
            return score_RE.clip(0, 1)
        return platt_scaled(score_RE, slope=c.slope, offset=c.offset)

    def select(self, columns: Sequence[int]) -> WordProfileScorer:
        """See `Scorer`."""
        return select_classes(self, columns)


@dataclass(frozen=True, kw_only=True)
class RegionCosineScorer:
    """Every example alone: ``cosine · sqrt(objectness / the example's objectness)``, both at most 1.

    Attributes:
        rows: (E, D) unit embeddings of the example regions by the text head.
        objectness: (E,) of the example regions.
    """

    rows: Floats = field(metadata=PER_CLASS)
    objectness: Floats = field(metadata=PER_CLASS)

    @classmethod
    def of(cls, regions: RegionSet, index: Sequence[int]) -> RegionCosineScorer:
        """Some of a picture's regions as examples."""
        rows = unit_rows(regions.text)[list(index)]
        return cls(rows=rows, objectness=regions.objectness[list(index)])

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        ratio_RE = regions.objectness[:, None] / np.maximum(self.objectness, 1e-6)
        cosine_RE = unit_rows(regions.text) @ self.rows.T
        return (np.clip(cosine_RE, 0, 1) * np.sqrt(np.clip(ratio_RE, 0, 1))).astype(np.float32)

    def select(self, columns: Sequence[int]) -> RegionCosineScorer:
        """See `Scorer`."""
        return select_classes(self, columns)


class SimilarRegions(NamedTuple):
    """(n, 4) boxes in pixels and (n,) scores 0…1 of what resembles an example."""

    boxes: Floats
    scores: Floats


def similar_regions(regions: RegionSet, box: Floats) -> SimilarRegions | None:
    """Regions that resemble the one in a box of the same picture; None: no region fits the box.

    Args:
        regions: of one picture.
        box: (4,) corners in pixels.
    """
    overlap = box_ious(regions.boxes, box[None])[:, 0]
    if not len(overlap) or overlap.max() < SAME_IOU:
        return None
    score_R = RegionCosineScorer.of(regions, [int(overlap.argmax())])(regions)[:, 0]
    keep = batched_nms(regions.boxes, score_R, np.zeros(len(score_R), np.int64), SAME_IOU)
    keep = keep[score_R[keep] >= SIMILAR_SCORE]
    return SimilarRegions(regions.boxes[keep], score_R[keep])


def centred_on_picture(regions: RegionSet, *images_ED: Floats) -> tuple[RegionSet, list[Floats]]:
    """The regions with one head, minus what the picture's regions share, and other image embeddings likewise.

    The head is the image head where there is one, else the one head that was distilled from image embeddings.
    """
    region_RD = regions.distilled
    # The mean of few regions is mostly those regions: it is drawn towards zero, by ten regions' worth.
    shared_RD = region_RD[~regions.is_finetuned]
    common_D = shared_RD.sum(axis=0) / (len(shared_RD) + CENTRE_PRIOR)
    centred = [unit_rows(x - common_D) for x in (region_RD, *images_ED)]
    return replace(regions, text=centred[0], image=None), centred[1:]


def centred_texts(words_BD: Floats) -> Floats:
    """Unit rows minus their mean, normalised again; a single word stays as it is."""
    return unit_rows(words_BD - words_BD.mean(axis=0)) if len(words_BD) > 1 else words_BD


def root_profile(rows_ND: Floats, words_BD: Floats, *, scale: float) -> Floats:
    """(N, B) square roots of the softmax over words; the dot product of two rows is their Bhattacharyya coefficient.

    Args:
        rows_ND: unit image embeddings.
        words_BD: unit text embeddings.
        scale: inverse temperature.
    """
    return np.sqrt(softmax(scale * (rows_ND @ words_BD.T)))
