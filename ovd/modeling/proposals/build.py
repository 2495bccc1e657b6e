# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic proposal networks: building, storing and running them.

A folder holds ``model.safetensors`` (half precision) and ``model.json``, the card.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from ovd.config_proposals import ProposalNetworkConfig
from ovd.data.splits import COCO_NAMES
from ovd.modeling.proposals.architecture import ARCHITECTURES, Arch, Architecture
from ovd.modeling.proposals.nanodet import NanoDet
from ovd.modeling.proposals.network import ProposalDetector, build_proposal_detector, init_from_converted
from ovd.modeling.proposals.picodet import PicoDet
from ovd.modeling.proposals.pyramid import FrozenPyramid, init_from_library, pixel_statistics
from ovd.pictures import resized
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED, read_json
from pretrain.engine.state import load_tensors
from pretrain.engine.stored import require_types, stored_section

FORMAT = "proposals/1"
MAX_ENLARGEMENT = 4 / 3
"""Of a small picture. On 714 photos of at most 384 px, 100 boxes cover .978 of the pseudo-labels at a longest side of
416, .981 at 512 and .946 at 640: enlarged further, whole things are lost."""

PROPOSAL_WORDS: tuple[str, ...] = tuple(COCO_NAMES[i] for i in sorted(COCO_NAMES))
"""The 80 that the dense detectors were trained on with labels, in the order of ``words``."""


@dataclass(frozen=True, kw_only=True)
class ProposalCard:
    """Content of ``model.json``.

    Attributes:
        model: a plain dict of :class:`ProposalNetworkConfig`.
        sides: longest sides of a picture in the network, pixels; boxes of all are joined.
        config_hash: of the training configuration; empty where nothing was trained.
    """

    model: dict[str, object]
    sides: tuple[int, ...]
    config_hash: str = ""
    format: str = FORMAT


def build_model(config: ProposalNetworkConfig) -> ProposalDetector:
    """The network with random weights; pixels of a library's network are normalised as `config` says.

    Raises:
        UserError: unknown backbone.
    """
    build = partial(
        build_proposal_detector,
        ranking=config.ranking,
        nms=config.nms,
        pre_nms=config.pre_nms,
        post_nms=config.post_nms,
    )
    pyramid, architecture = config.backbone, ARCHITECTURES[config.arch]
    if pyramid is None:
        return build(architecture=architecture)
    if pyramid.pixel_mean is None or pyramid.pixel_std is None:
        raise ValueError("model.backbone: pixel_mean and pixel_std are unknown; see with_statistics")
    return build(
        architecture=architecture,
        backbone=FrozenPyramid(pyramid.name, channels=architecture.channels),
        pixel_mean=pyramid.pixel_mean,
        pixel_std=pyramid.pixel_std,
    )


def with_statistics(config: ProposalNetworkConfig, weights: str) -> ProposalNetworkConfig:
    """The configuration with the pixel statistics that a backbone's weights were trained with, where it has none.

    Args:
        config: of the network.
        weights: as :func:`build_from_weights` takes them; an export has its statistics in its card.

    Raises:
        UserError: no such weights.
    """
    pyramid = config.backbone
    if pyramid is None or pyramid.pixel_mean is not None:
        return config
    if has_proposals(Path(weights)):
        trained = ProposalNetworkConfig.model_validate(read_card(Path(weights)).model).backbone
        if trained is None:
            raise UserError(f"weights={weights}: has no {pyramid.name}; set model.backbone=null")
        mean, std = trained.pixel_mean, trained.pixel_std
    else:
        mean, std = pixel_statistics(pyramid.name, weights)
    return config.model_copy(update={"backbone": pyramid.model_copy(update={"pixel_mean": mean, "pixel_std": std})})


def build_from_weights(weights: str | Path, config: ProposalNetworkConfig) -> ProposalDetector:
    """The network with the tensors of an exported folder, of a converted file, or of a library's network.

    Raises:
        UserError: none of them, or tensors that do not fit.
    """
    model = build_model(config)
    path = Path(weights)
    exported = has_proposals(path)
    if config.backbone is not None and not exported:
        init_from_library(model.backbone, str(weights), name=config.backbone.name)
        return model
    tensors, facts = load_weights(path / "model.safetensors" if exported or path.is_dir() else path)
    required = FORMAT if exported else f"{config.arch}/1"
    if facts.get("format") != required:
        raise UserError(
            f"weights={weights}: has format {facts.get('format')!r}, not {required!r}; give {config.arch}.safetensors "
            f"of {ARCHITECTURES[config.arch].converter}, or the exported/ folder of a training with model.arch "
            f"{config.arch}"
        )
    if exported:
        load_tensors(model, tensors, source=f"weights={weights}")
    else:
        init_from_converted(model, tensors, source=f"weights={weights}")
    return model


def save_proposals(folder: Path, model: ProposalDetector, card: ProposalCard) -> None:
    """Write ``model.safetensors`` and ``model.json``."""
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_weights(folder / "model.safetensors", tensors, {"format": FORMAT})
    (folder / "model.json").write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")


def save_converted(folder: Path, model: NanoDet | PicoDet, *, arch: Arch, source: str, sides: Sequence[int]) -> Path:
    """Write a converted network, from which trainings start, and ``exported/``: the network as it is, ready to propose.

    Args:
        folder: is made.
        model: with the tensors of its files.
        arch: which network it is.
        source: the files, with their hashes.
        sides: of the export, see `ProposalCard`.

    Returns:
        the file of the converted network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{arch}.safetensors"
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_weights(file, tensors, {"format": f"{arch}/1", "source": source})
    config = ProposalNetworkConfig(arch=arch)
    card = ProposalCard(model=config.model_dump(mode="json"), sides=tuple(sides))
    save_proposals(folder / EXPORTED, build_from_weights(file, config), card)
    return file


@dataclass(frozen=True, kw_only=True)
class PhotoProposals:
    """Boxes of one picture, best first.

    Attributes:
        boxes: (P, 4) x1, y1, x2, y2 in pixels of the picture.
        objectness: (P,) 0…1, the score that orders them.
        quality: (P,) 0…1, expected IoU with its object.
        words: (P, K) 0…1, the network's independent scores of `PROPOSAL_WORDS`; K is 0 on a library's backbone.
    """

    boxes: Tensor
    objectness: Tensor
    quality: Tensor
    words: Tensor

    def __getitem__(self, index: Tensor) -> PhotoProposals:
        """Some of them, in the order of ``index``."""
        return PhotoProposals(
            boxes=self.boxes[index],
            objectness=self.objectness[index],
            quality=self.quality[index],
            words=self.words[index],
        )


class PhotoProposer:
    """A loaded proposal network; implements ``ovd.regions.proposals.Proposer``.

    Args:
        model: put into eval mode and `precision` here.
        sides: longest sides of a picture in the network, pixels. Small things are found in the large picture, whole
            ones in the small.
        precision: bfloat16 takes half the time of float32 on a CPU that has it.
    """

    def __init__(
        self, *, model: ProposalDetector, sides: Sequence[int], precision: torch.dtype = torch.bfloat16
    ) -> None:
        self.model = model.eval().to(memory_format=torch.channels_last)
        for part in (model.backbone, model.proposal_generator):  # once, not at every picture as autocast would
            part.to(precision)
        self.sides = tuple(sides)

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8], *, top: int = 100) -> PhotoProposals:
        """The best ``top`` boxes of an (H, W, 3) RGB picture; at most the network's ``post_nms`` at each size."""
        limit = round(MAX_ENLARGEMENT * max(image.shape[:2]))
        parts = [self._at_side(image, side) for side in dict.fromkeys(min(side, limit) for side in self.sides)]
        boxes, objectness, quality, words = (torch.cat(values) for values in zip(*parts, strict=True))
        best = nms(boxes, objectness, self.model.proposal_generator.nms)[:top]
        return PhotoProposals(
            boxes=boxes[best].cpu(),
            objectness=objectness[best].cpu(),
            quality=quality[best].cpu(),
            words=words[best].cpu(),
        )

    def _at_side(self, image: NDArray[np.uint8], side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(boxes in pixels of the picture, objectness, quality, words) with its longest side at ``side`` pixels."""
        height, width = image.shape[:2]
        image = resized(image, side / max(height, width))
        size = image.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        (proposals,) = self.model([{"image": pixels}])
        back = torch.tensor([width / size[1], height / size[0]], device=self.model.device).repeat(2)
        score = proposals.objectness_logits.sigmoid()
        return proposals.proposal_boxes.tensor * back, score, proposals.quality, proposals.words

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Tensor, Tensor]:
        """((P, 4) boxes in original pixels, (P,) scores), best first."""
        proposals = self.regions(image, top=top)
        return proposals.boxes, proposals.objectness


def has_proposals(folder: Path) -> bool:
    """Whether a folder is an export of this kind; False too for what is no export at all."""
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("format") == FORMAT


def read_card(folder: Path) -> ProposalCard:
    """The card of an exported folder.

    Raises:
        UserError: no proposals there.
    """
    raw = read_json(folder / "model.json", hint="proposals are a folder with model.json and model.safetensors")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{folder / 'model.json'}: not a card of format {FORMAT}")
    try:
        values = {**raw, "sides": tuple(raw["sides"])}
        require_types(ProposalCard, values)
        card = ProposalCard(**values)
        if not card.sides or min(card.sides) < 1:
            raise TypeError(f"sides: {card.sides} are no sides of pictures")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'model.json'}: {error}; export it again with this version") from error
    stored_section(ProposalNetworkConfig, card.model, where=f"{folder / 'model.json'}: model")
    return card


def architecture_of(folder: Path) -> Architecture:
    """The dense detector of an exported folder.

    Raises:
        UserError: see :func:`read_card`.
    """
    return ARCHITECTURES[ProposalNetworkConfig.model_validate(read_card(folder).model).arch]


def load_proposals(folder: Path, *, device: str = "cpu", precision: torch.dtype = torch.bfloat16) -> PhotoProposer:
    """An exported network, ready for pictures.

    Raises:
        UserError: see :func:`read_card` and :func:`build_from_weights`.
    """
    card = read_card(folder)
    model = build_from_weights(folder, ProposalNetworkConfig.model_validate(card.model))
    return PhotoProposer(model=model.to(device), sides=card.sides, precision=precision)
