# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned classes of a detector of photographs: loading, saving and running its branches.

Each training adds a branch (`ovd.modeling.proposals.classes`) and leaves earlier ones unchanged. A class that several
branches have belongs to the last one.

Shapes: ``R`` boxes of a picture, ``O`` fine-tuned classes of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.inference.finetuned_names import FinetunedNames
from ovd.modeling.export import FinetunedCard
from ovd.modeling.fvlm.network import PROPOSALS
from ovd.modeling.proposals.build import PhotoProposals, architecture_of
from ovd.modeling.proposals.classes import ClassBranch
from ovd.words import name_key
from pretrain.data.lexicon import Lexicon
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import sha256_of
from pretrain.engine.state import load_tensors

FORMAT = "own-classes/1"
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A loaded branch.

    Attributes:
        card: what it is.
        network: in eval mode.
        columns: (classes,) of each of its classes among all fine-tuned classes; -1: a later branch's.
    """

    card: FinetunedCard
    network: ClassBranch
    columns: Tensor


@dataclass(frozen=True, kw_only=True)
class FinetunedClasses:
    """All branches of a detector.

    Attributes:
        branches: oldest first.
        names: the O names.
    """

    branches: tuple[Branch, ...]
    names: FinetunedNames

    def append_to(self, proposals: PhotoProposals, image: NDArray[np.uint8]) -> tuple[PhotoProposals, Tensor]:
        """(proposals and the branches' boxes after them, (R, O) calibrated scores of fine-tuned classes).

        The branches' boxes have objectness 0 and no score of any other word: the answers to other words stay as they
        are without the branches.
        """
        boxes, scores = (
            [proposals.boxes],
            [proposals.boxes.new_zeros(len(proposals.boxes), len(self.names.words.words))],
        )
        for branch in self.branches:
            card = branch.card
            detected = branch.network.detect(image, side=card.side, nms=card.nms, top=card.top)
            column = branch.columns[torch.from_numpy(detected.classes)]
            score = torch.from_numpy(detected.scores).logit(eps=EPS)
            score = (card.slope * score + card.offset).sigmoid()[column >= 0]
            box, column = torch.from_numpy(detected.boxes)[column >= 0], column[column >= 0]
            boxes.append(box.to(proposals.boxes))
            scores.append(
                torch.zeros(len(box), len(self.names.words.words)).scatter_(1, column[:, None], score[:, None])
            )
        added = sum(map(len, boxes[1:]))

        def padded(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_zeros(added, *values.shape[1:])])

        joined = PhotoProposals(
            boxes=torch.cat(boxes),
            objectness=padded(proposals.objectness),
            quality=padded(proposals.quality),
            words=padded(proposals.words),
        )
        return joined, torch.cat(scores)


def remaining_branches(cards: Sequence[FinetunedCard], names: Sequence[str]) -> tuple[FinetunedCard, ...]:
    """The branches that keep a class of their own when a new branch takes over ``names``."""
    replaced = {name_key(name) for name in names}
    remaining: list[FinetunedCard] = []
    for card in reversed(cards):
        names_of_card = {name_key(name) for name in card.names}
        if names_of_card - replaced:
            remaining.insert(0, card)
        replaced |= names_of_card
    return tuple(remaining)


def save_branch(
    folder: Path,
    network: ClassBranch,
    *,
    number: int,
    names: tuple[str, ...],
    side: int,
    nms: float,
    top: int,
) -> FinetunedCard:
    """Write a branch's tensors, in half precision, into a detector's folder; its card, uncalibrated."""
    file = f"classes/{number:02}.safetensors"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in network.state_dict().items()}
    save_weights(folder / file, tensors, {"format": FORMAT})
    return FinetunedCard(names=names, file=file, sha256=sha256_of(folder / file), side=side, nms=nms, top=top)


def load_finetuned(
    folder: Path,
    cards: Sequence[FinetunedCard],
    *,
    lexicon: Lexicon,
    device: str = "cpu",
    precision: torch.dtype = torch.bfloat16,
) -> FinetunedClasses | None:
    """The branches of an exported detector; None where it has none.

    Raises:
        UserError: a file is missing, damaged, or another than the card describes.
    """
    names = FinetunedNames.of(cards, lexicon=lexicon)
    if names is None:
        return None
    branches = []
    architecture = architecture_of(folder / PROPOSALS)
    for card, columns in zip(cards, names.columns(cards), strict=True):
        file = folder / card.file
        if file.is_file() and sha256_of(file) != card.sha256:
            raise UserError(f"{file}: is not the file that {folder / 'model.json'} describes; copy the folder again")
        tensors, facts = load_weights(file)
        if facts.get("format") != FORMAT:
            raise UserError(f"{file}: has format {facts.get('format')!r}, not {FORMAT!r}")
        network = ClassBranch(architecture, classes=len(card.names))
        load_tensors(network, tensors, source=file)
        network.eval().to(memory_format=torch.channels_last)
        network.to(precision).to(device)
        branches.append(Branch(card=card, network=network, columns=torch.tensor(columns)))
    return FinetunedClasses(branches=tuple(branches), names=names)
