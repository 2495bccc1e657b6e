# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs: boxes of a proposal network, features of a frozen image tower, a small trained head.

Shapes: ``P`` regions, ``F`` pooled features, ``K`` words of the proposal network, ``D`` joint embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovd.config_fvlm import FvlmConfig
from ovd.modeling.export import DetectorCard, exported_tensors, load_exported
from ovd.modeling.fvlm.conse import RegionConse, load_conse
from ovd.modeling.fvlm.head import FrozenFeatureHead, ImageHead
from ovd.modeling.fvlm.quality import LocalizationQuality, geometry, load_quality
from ovd.modeling.fvlm.tower import FrozenTower, PooledRegions
from ovd.modeling.proposals.build import PROPOSAL_WORDS, PhotoProposals, PhotoProposer, load_proposals
from pretrain.engine.errors import UserError
from pretrain.nets.towers import JointEncoder

PROPOSALS = "proposals"
"""Folder of the proposal network in an exported detector."""


class FvlmDetector(nn.Module):
    """Frozen proposal network and image tower, and the trained heads.

    Args:
        proposer: of boxes.
        tower: of the encoder.
        head: to be trained.
        reads_words: whether the head reads the proposer's scores of words.
        image_head: to be distilled; None: the tower's own embedding is used.
        conse: an ImageNet classifier that is ensembled with the image embedding at inference; None: there is none.
        quality: how well boxes fit objects, to be trained; None: there is none.
    """

    def __init__(
        self,
        *,
        proposer: PhotoProposer,
        tower: FrozenTower,
        head: FrozenFeatureHead,
        reads_words: bool,
        image_head: ImageHead | None = None,
        conse: RegionConse | None = None,
        quality: LocalizationQuality | None = None,
    ) -> None:
        super().__init__()
        self._conse, self._quality = (conse,), (quality,)  # tuples: they are stored in files of their own
        self._proposer = (proposer,)  # likewise: in a folder of its own
        self._tower = (tower,)  # likewise: the encoder's folder has it
        self.head = head
        self.image_head = image_head
        self.reads_words = reads_words

    @property
    def proposer(self) -> PhotoProposer:
        """The proposal network."""
        return self._proposer[0]

    @property
    def tower(self) -> FrozenTower:
        """The frozen image tower."""
        return self._tower[0]

    @property
    def conse(self) -> RegionConse | None:
        """The frozen ImageNet classifier."""
        return self._conse[0]

    @property
    def quality(self) -> LocalizationQuality | None:
        """Localisation quality."""
        return self._quality[0]

    @torch.inference_mode()
    def pooled(self, image: NDArray[np.uint8], proposals: PhotoProposals) -> PooledRegions:
        """Proposals of an (H, W, 3) RGB picture, before the head."""
        words = proposals.words if self.reads_words else proposals.words[:, :0]
        features = self.tower.pooled(image, proposals.boxes)
        return PooledRegions(proposals.boxes, proposals.objectness, words.to(features.device), features)

    @torch.inference_mode()
    def quality_of(self, regions: PooledRegions, size: tuple[int, int]) -> Tensor | None:
        """(P,) how well boxes fit objects, 0…1, in a picture of (height, width); None without such a head."""
        if self.quality is None:
            return None
        shape = geometry(regions.boxes.to(regions.features.device), regions.features.new_tensor(size))
        return self.quality(regions.features, shape).sigmoid()

    def image_embedding(self, features_PF: Tensor) -> Tensor:
        """(P, D) unit rows: the embedding of each region's crop, as the tower or the image head predicts it."""
        # In training the heads may be on a GPU, and the tower, whose features are cached, is not.
        tower_PD = self.tower.embed(features_PF.to(self.tower.device)).to(features_PF.device)
        return tower_PD if self.image_head is None else self.image_head(features_PF, tower_PD)


def proposal_words(config: FvlmConfig) -> tuple[str, ...]:
    """The words that the proposal network scores, where the head reads these scores."""
    return PROPOSAL_WORDS if config.known else ()


def build_fvlm(
    config: FvlmConfig,
    *,
    proposer: PhotoProposer,
    encoder: JointEncoder,
    conse: RegionConse | None = None,
    precision: torch.dtype = torch.bfloat16,
    fold: bool = False,
) -> FvlmDetector:
    """The detector with a head of random weights; `precision` and `fold` are the image tower's.

    Raises:
        UserError: the encoder has no image tower of timm.
    """
    tower = FrozenTower(
        encoder,
        side=config.side,
        pool=config.head.pool,
        context=config.head.context,
        precision=precision,
        fold=fold,
    )
    head = FrozenFeatureHead(
        features=tower.features,
        words=len(proposal_words(config)),
        hidden=config.head.hidden,
        embed_dim=encoder.embed_dim,
        dropout=config.head.dropout,
        scale=config.head.scale,
    )
    image_head = None
    if config.variant == "ensemble":
        image_head = ImageHead(
            features=tower.features,
            hidden=config.head.hidden,
            embed_dim=encoder.embed_dim,
            dropout=config.head.dropout,
        )
    quality = None
    if config.quality is not None:
        quality = LocalizationQuality(maps=tower.map_features, config=config.quality)
    return FvlmDetector(
        proposer=proposer,
        tower=tower,
        head=head,
        reads_words=config.known,
        image_head=image_head,
        conse=conse,
        quality=quality,
    )


def load_fvlm(
    folder: Path,
    card: DetectorCard,
    encoder: JointEncoder,
    *,
    device: str = "cpu",
    precision: torch.dtype = torch.bfloat16,
    fold: bool = False,
) -> tuple[FvlmDetector, Tensor]:
    """(detector in eval mode, (B, D) embeddings of the background words) of an exported folder.

    Args:
        folder: of the detector.
        card: its card.
        encoder: its encoder.
        device: where it runs.
        precision: of proposal network, image tower and hidden layers of the heads, weights too: bfloat16 rounds the
            stored half precision, float32 holds it exactly.
        fold: fold the image tower's and ConSE's batch norms into their convolutions: faster; not for an export, which
            names the stored weights.

    Raises:
        UserError: missing files, or tensors that do not fit the card.
    """
    config = card.architecture
    if not isinstance(config, FvlmConfig):
        raise UserError(f"{folder}: not a detector of model.arch fvlm")
    proposer = load_proposals(folder / PROPOSALS, device=device, precision=precision)
    conse = None
    if config.conse is not None:
        conse = load_conse(folder, config.conse, embed_dim=encoder.embed_dim, precision=precision, fold=fold)
        conse.to(device)
    detector = build_fvlm(config, proposer=proposer, encoder=encoder, conse=conse, precision=precision, fold=fold)
    state, background_words = exported_tensors(folder, card)
    load_exported(detector, state, folder)
    for head in (detector.head, detector.image_head):
        if head is not None:
            head.layers.to(precision)
    detector.tower.to(device)
    if detector.quality is not None:
        load_quality(folder, detector.quality)
        detector.quality.eval().to(device)
    return detector.eval().to(device), background_words
