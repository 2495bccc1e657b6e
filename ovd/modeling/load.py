# SPDX-License-Identifier: Apache-2.0
"""An exported detector of any kind, ready for pictures."""

from __future__ import annotations

from pathlib import Path

from ovd.modeling.detr.build import load_detr_regions
from ovd.modeling.export import read_card
from ovd.modeling.vild.build import RegionModel, load_model


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
    if read_card(folder).is_transformer:
        return load_detr_regions(folder, top=top, device=device)
    model, card, bank = load_model(folder)
    return RegionModel(model=model.to(device), card=card, bank=bank, top=top, masks=masks)
