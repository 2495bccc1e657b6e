# SPDX-License-Identifier: Apache-2.0
"""An exported detector of any kind, ready for pictures.

Each kind imports what it needs: a page starts faster with one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ovd.modeling.export import read_card

if TYPE_CHECKING:
    from ovd.inference.fvlm_regions import FvlmRegionModel
    from ovd.inference.region_model import RegionModel
    from ovd.regions.proposals import Proposer
    from pretrain.nets.towers import JointEncoder


def load_detector_model(
    folder: Path, *, top: int = 150, device: str = "cpu", masks: bool = True, encoder: JointEncoder | None = None
) -> RegionModel:
    """Load an exported detector for inference.

    Args:
        folder: as ``python -m ovd.train`` exports it.
        top: regions kept per picture.
        device: where it runs.
        masks: False leaves the mask head out (a transformer has none).
        encoder: the one that the detector was trained against, where it is loaded already.

    Raises:
        UserError: see :func:`ovd.modeling.vild.build.load_model`.
    """
    folder = Path(folder)
    card = read_card(folder)
    if card.arch == "fvlm":
        return _load_fvlm(folder, encoder, top=top, device=device)
    if card.is_transformer:
        from ovd.inference.detr_regions import detr_region_model
        from ovd.modeling.detr.build import load_detr

        detr, card, bank = load_detr(folder)
        return detr_region_model(detr.to(device), card=card, background_words=bank.numpy(), top=top)
    from ovd.inference.rcnn_regions import RCNNRegionModel
    from ovd.modeling.vild.build import load_model

    model, card, bank = load_model(folder)
    return RCNNRegionModel(model=model.to(device), card=card, background_words=bank.numpy(), top=top, masks=masks)


def _load_fvlm(folder: Path, encoder: JointEncoder | None, *, top: int, device: str) -> FvlmRegionModel:
    from ovd.config_fvlm import FvlmConfig
    from ovd.inference.encoder import load_encoder_of
    from ovd.inference.fvlm_regions import FvlmRegionModel
    from ovd.inference.fvlm_torch import TorchNetwork
    from ovd.inference.known_words import WordList
    from ovd.modeling.fvlm.network import known_words, load_fvlm
    from pretrain.data.lexicon import read_lexicon

    model, card, bank = load_fvlm(folder, encoder or load_encoder_of(folder, read_card(folder)), device=device)
    lexicon = read_lexicon()
    config = card.architecture
    assert isinstance(config, FvlmConfig)
    return FvlmRegionModel(
        network=TorchNetwork(model),
        card=card,
        background_words=bank.numpy(),
        known=WordList(words=known_words(config), lexicon=lexicon),
        trained=WordList(words=card.bank, lexicon=lexicon),
        top=top,
    )


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
