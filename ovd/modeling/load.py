# SPDX-License-Identifier: Apache-2.0
"""An exported detector of any kind, ready for pictures.

Each kind imports what it needs: a page starts faster with one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ovd.modeling.export import DetectorCard, read_card

if TYPE_CHECKING:
    from ovd.inference.fvlm_regions import FvlmRegionModel
    from ovd.inference.region_model import RegionModel
    from ovd.regions.proposals import Proposer
    from pretrain.nets.towers import JointEncoder


def load_detector_model(
    folder: Path,
    *,
    top: int = 150,
    device: str = "cpu",
    masks: bool = True,
    card: DetectorCard | None = None,
    encoder: JointEncoder | None = None,
) -> RegionModel:
    """Load an exported detector for inference.

    Args:
        folder: as ``python -m ovd.train`` exports it.
        top: regions kept per picture.
        device: where it runs.
        masks: False leaves the mask head out (a transformer has none).
        card: of the folder, where it is read already.
        encoder: the one that the detector was trained against, where it is loaded already.

    Raises:
        UserError: see :func:`ovd.modeling.vild.build.load_model`.
    """
    folder = Path(folder)
    card = card or read_card(folder)
    if card.arch == "fvlm":
        return _load_fvlm(folder, card, encoder, top=top, device=device)
    if card.is_transformer:
        from ovd.inference.detr_regions import detr_region_model
        from ovd.modeling.detr.build import load_detr

        detr, background_words = load_detr(folder, card)
        return detr_region_model(detr.to(device), card=card, background_words=background_words.numpy(), top=top)
    from ovd.inference.rcnn_regions import RCNNRegionModel
    from ovd.modeling.vild.build import load_model

    model, background_words = load_model(folder, card)
    return RCNNRegionModel(
        model=model.to(device), card=card, background_words=background_words.numpy(), top=top, masks=masks
    )


def _load_fvlm(
    folder: Path, card: DetectorCard, encoder: JointEncoder | None, *, top: int, device: str
) -> FvlmRegionModel:
    from ovd.config_fvlm import FvlmConfig
    from ovd.inference.encoder import load_encoder_of
    from ovd.inference.fvlm_regions import FvlmRegionModel
    from ovd.inference.fvlm_torch import TorchNetwork
    from ovd.inference.known_words import WordList
    from ovd.modeling.fvlm.finetuned import load_finetuned
    from ovd.modeling.fvlm.network import load_fvlm, proposal_words
    from pretrain.data.lexicon import read_lexicon

    encoder = encoder or load_encoder_of(folder, card)
    model, background_words = load_fvlm(folder, card, encoder, device=device, fold=True)
    lexicon = read_lexicon()
    finetuned = load_finetuned(folder, card.finetuned, lexicon=lexicon, device=device)
    config = card.architecture
    assert isinstance(config, FvlmConfig)
    return FvlmRegionModel(
        network=TorchNetwork(model, finetuned=finetuned),
        card=card,
        background_words=background_words.numpy(),
        proposal_words=WordList(words=proposal_words(config), lexicon=lexicon),
        training_words=WordList(words=card.background_words, lexicon=lexicon),
        finetuned=None if finetuned is None else finetuned.names,
        top=top,
    )


def load_proposer(folder: Path, *, device: str = "cpu") -> Proposer:
    """Whatever proposes boxes: an exported detector of any kind, or proposals without words.

    Raises:
        UserError: see :func:`load_detector_model` and :func:`ovd.modeling.proposals.build.load_proposals`.
    """
    from ovd.modeling.proposals.build import has_proposals, load_proposals

    folder = Path(folder)
    if has_proposals(folder):
        return load_proposals(folder, device=device)
    if read_card(folder).arch == "fvlm":
        from ovd.modeling.fvlm.network import PROPOSALS

        return load_proposals(folder / PROPOSALS, device=device)
    return load_detector_model(folder, device=device)
