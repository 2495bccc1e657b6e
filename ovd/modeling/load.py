# SPDX-License-Identifier: Apache-2.0
"""An exported detector of any kind, ready for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ovd.inference.region_model import RCNNRegionModel, RegionModel
from ovd.modeling.export import read_card

if TYPE_CHECKING:
    from ovd.regions.proposals import Proposer


def load_detector_model(folder: Path, *, top: int = 150, device: str = "cpu", masks: bool = True) -> RegionModel:
    """Load an exported detector for inference.

    Args:
        folder: as ``python -m ovd.train`` exports it.
        top: regions kept per picture.
        device: where it runs.
        masks: False leaves the mask head out (a transformer has none).

    Raises:
        UserError: see :func:`ovd.modeling.vild.build.load_model`.
    """
    folder = Path(folder)
    if read_card(folder).is_transformer:  # each kind imports what it needs: a page starts faster with one of them
        from ovd.inference.detr_regions import detr_region_model
        from ovd.modeling.detr.build import load_detr

        detr, card, bank = load_detr(folder)
        return detr_region_model(detr.to(device), card=card, background_words=bank, top=top)
    from ovd.modeling.vild.build import load_model

    model, card, bank = load_model(folder)
    return RCNNRegionModel(model=model.to(device), card=card, background_words=bank, top=top, masks=masks)


def load_proposer(folder: Path, *, device: str = "cpu") -> Proposer:
    """Whatever proposes boxes: an exported detector of any kind, or proposals without words (``model.arch: nanodet``).

    Raises:
        UserError: see :func:`load_detector_model` and :func:`ovd.modeling.proposals.build.load_proposals`.
    """
    from ovd.modeling.proposals.build import holds_proposals, load_proposals

    folder = Path(folder)
    if holds_proposals(folder):
        return load_proposals(folder, device=device)
    return load_detector_model(folder, device=device)
