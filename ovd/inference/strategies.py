# SPDX-License-Identifier: Apache-2.0
"""Wrappers that give a loaded model other region embeddings or queries, for `ovd.Detector.with_model`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.crop_classifier import CropClassifier
from ovd.inference.region_model import RegionModel
from ovd.inference.scoring import RegionSet
from ovd.regions.crops import embed_regions
from ovd.regions.proposals import large_enough

if TYPE_CHECKING:
    from ovd.inference.detr_regions import OpenVocabularyDetr
    from ovd.regions.crops import RegionEncoder


class CropEmbeddings(RegionModel):
    """A model's boxes with the image encoder's embeddings of their crops: "CLIP on cropped regions" (ViLD §3.2).

    There is no background, so an empty region still scores as something; hence the objectness weight.

    Args:
        model: gives boxes, objectness and masks.
        encoder: embeds the crops, 1x and 1.5x summed as for the distillation.
    """

    objectness_weight = 0.5

    def __init__(self, *, model: RegionModel, encoder: RegionEncoder) -> None:
        self.model, self.encoder, self.card = model, encoder, model.card
        self.background_words, self.calibration = model.background_words, model.calibration

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """The model's regions with the encoder's embeddings; boxes under two pixels cannot be cropped."""
        if isinstance(self.model, CropClassifier):  # it embeds crops itself
            return replace(self.model.regions(image), image=None)
        regions = self.model.regions(image)
        regions = regions.at(large_enough(regions.boxes))
        return replace(regions, text=embed_regions(self.encoder, image, regions.boxes).numpy(), image=None)


class ConditionedQueries(RegionModel):
    """A transformer whose queries are conditioned on the typed classes (OV-DETR's inference).

    Args:
        model: trained with ``model.conditioned``.
        rows: (C, D) embeddings of the words, or of crops.
        classes_per_pass: as in training.
    """

    def __init__(self, *, model: OpenVocabularyDetr, rows: Floats, classes_per_pass: int) -> None:
        self.model, self.rows, self.classes_per_pass, self.card = model, rows, classes_per_pass, model.card
        self.background_words, self.background = model.background_words, model.background
        self.calibration, self.objectness_weight = model.calibration, model.objectness_weight
        self.example_encoder = model.example_encoder

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """Regions that the conditioned queries found."""
        return self.model.conditioned_regions(image, self.rows, classes_per_pass=self.classes_per_pass)
