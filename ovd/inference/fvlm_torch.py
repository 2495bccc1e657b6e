# SPDX-License-Identifier: Apache-2.0
"""The networks of a detector of photographs, run by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.scoring import RegionSet

if TYPE_CHECKING:
    from ovd.modeling.fvlm.finetuned import FinetunedClasses
    from ovd.modeling.fvlm.network import FvlmDetector


class TorchNetwork:
    """`ovd.inference.fvlm_regions.FvlmNetwork` of a loaded detector.

    Args:
        model: in eval mode.
        finetuned: branches of classes that were added by fine-tuning; None: there are none.
    """

    def __init__(self, model: FvlmDetector, *, finetuned: FinetunedClasses | None = None) -> None:
        self.model, self.finetuned = model, finetuned

    @property
    def sides(self) -> tuple[int, ...]:
        """See `FvlmNetwork`."""
        return self.model.proposer.sides

    @sides.setter
    def sides(self, sides: tuple[int, ...]) -> None:
        self.model.proposer.sides = sides

    @property
    def scale(self) -> float:
        """See `FvlmNetwork`."""
        return float(self.model.head.scale.detach())

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8], *, top: int) -> RegionSet:
        """See `FvlmNetwork`."""
        proposals = self.model.proposer.regions(image, top=top)
        finetuned_RO = None
        if self.finetuned is not None:
            proposals, finetuned_RO = self.finetuned.append_to(proposals, image)
        pooled = self.model.pooled(image, proposals)
        out = self.model.head(pooled.features, pooled.word_scores)
        quality = self.model.quality_of(pooled, image.shape[:2])
        return RegionSet(
            boxes=pooled.boxes.cpu().numpy(),
            objectness=pooled.objectness.cpu().numpy(),
            text=out.embedding.cpu().numpy(),
            image=self.model.image_embedding(pooled.features).cpu().numpy(),
            masks=None,
            size=(image.shape[0], image.shape[1]),
            word_scores=pooled.word_scores.cpu().numpy(),
            bias=out.bias.cpu().numpy(),
            conse=None if self.model.conse is None else self.model.conse.deferred(image, pooled.boxes),
            quality=None if quality is None else quality.cpu().numpy(),
            finetuned=finetuned_RO if finetuned_RO is None else finetuned_RO.numpy(),
        )

    @torch.inference_mode()
    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """See `FvlmNetwork`."""
        boxes, scores = self.model.proposer.propose(image, top=top)
        return boxes.numpy(), scores.numpy()
