# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train`` for fine-tuned classes (``model.arch: finetune``).

    python -m ovd.train --config photos/finetune.yaml data.images=photos data.annotations=photos/labels.json

Only the branch is trained. Part of the photos is held out: the weights with the best AP50 on them are exported, and the
scores are calibrated on them.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ovd.config_finetune import FinetuneConfig
from ovd.modeling.task import DetectionTask
from ovd.training.inputs import require_exists
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ovd.data.finetune_photos import FinetunePhotos
    from ovd.data.mosaic import MosaicSource
    from ovd.evaluation.finetuned import BranchScores
    from ovd.modeling.export import DetectorCard, FinetunedCard
    from ovd.modeling.proposals.classes import ClassBranch

MIN_STEPS = 150
AP50_TOLERANCE = 0.005
"""Of two sets of weights whose AP50 differs by less the later one is kept: its scores were trained for longer."""


class FinetuneTask(DetectionTask):
    """Trains a branch and keeps the weights that were best on held-out photos.

    Args:
        branch: is trained.
        photos: with labels.
        held_out: numbers of the held-out ones.
        side, nms, top: of the exported branch.
        trunk_lr_scale: learning-rate factor of the trunk.
    """

    def __init__(
        self,
        *,
        branch: ClassBranch,
        photos: FinetunePhotos,
        held_out: list[int],
        side: int,
        nms: float,
        top: int,
        trunk_lr_scale: float,
    ) -> None:
        trunk = tuple(f"{name}." for name, _ in branch.trunk.named_children())
        super().__init__(model=branch, pretrained_prefixes=trunk, pretrained_lr_scale=trunk_lr_scale)
        self.branch, self.photos, self.held_out = branch, photos, held_out
        self.side, self.nms, self.top = side, nms, top
        self.best = copy.deepcopy(branch).requires_grad_(False)
        self.best_ap50: Tensor
        self.register_buffer("best_ap50", torch.tensor(-1.0))

    def report(self) -> tuple[dict[str, float], list[str]]:
        """AP50 on the held-out photos; the same in every process."""
        if not self.held_out:
            self.best.load_state_dict(self.branch.state_dict())
            return {}, []
        measured = self.measure(self.branch)
        is_worse = measured.ap50 < float(self.best_ap50) - AP50_TOLERANCE
        if not is_worse:  # also where it is NaN, as there is no object: the newest weights are kept
            self.best.load_state_dict(self.branch.state_dict())
            self.best_ap50.fill_(max(float(self.best_ap50), measured.ap50))
        return {"held_out_ap50": measured.ap50, "best_ap50": float(self.best_ap50)}, []

    def measure(self, branch: ClassBranch) -> BranchScores:
        """Score a branch on the held-out photos."""
        from ovd.evaluation.finetuned import score_branch

        with torch.autocast(next(branch.parameters()).device.type, torch.bfloat16):
            return score_branch(
                branch, self.photos, self.held_out, names=self.photos.names, side=self.side, nms=self.nms, top=self.top
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneParts:
    """Parts of a fine-tuning."""

    folder: Path
    photos: FinetunePhotos
    task: FinetuneTask
    source: MosaicSource


def with_steps(config: FinetuneConfig, photos: FinetunePhotos) -> FinetuneConfig:
    """The configuration with the number of steps that fits its photos, at most ``loop.steps``.

    Raises:
        UserError: so few that the warm-up would not end.
    """
    used = min(len(photos), config.data.images_limit or len(photos))
    steps = min(config.loop.steps, max(MIN_STEPS, config.steps_per_photo * used))
    if steps <= config.optim.warmup_steps:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps}: {used} photos are learned in {steps} steps; take fewer, "
            "or raise steps_per_photo"
        )
    return config.model_copy(update={"loop": config.loop.model_copy(update={"steps": steps})})


def build(config: FinetuneConfig, *, photos: FinetunePhotos) -> FinetuneParts:
    """Everything a training needs, before the first step.

    Raises:
        UserError: the weights are not a detector of photographs, or lie in the folder that is written.
    """
    from ovd.config_proposals import ProposalNetworkConfig
    from ovd.data.mosaic import MosaicSource
    from ovd.modeling.fvlm.network import PROPOSALS
    from ovd.modeling.proposals.architecture import ARCHITECTURES
    from ovd.modeling.proposals.build import build_from_weights
    from ovd.modeling.proposals.build import read_card as read_proposals
    from ovd.modeling.proposals.classes import ClassBranch
    from ovd.training.negatives import negatives_of
    from pretrain.engine.distributed import is_main, seed_everything

    seed_everything(config.loop.seed)
    folder = _detector_folder(config)
    chosen, held_out = photos.divided(config.data.held_out, limit=config.data.images_limit, seed=config.loop.seed)
    if is_main():
        _print_split(config, photos, chosen, held_out)
    proposals = ProposalNetworkConfig.model_validate(read_proposals(folder / PROPOSALS).model)
    branch = ClassBranch(ARCHITECTURES[proposals.arch], classes=len(photos.names))
    branch.init_from(build_from_weights(folder / PROPOSALS, proposals))
    data = config.data
    negatives = negatives_of(data, photos, chosen, detector=folder)
    if is_main() and negatives is not None:
        for notice in negatives.notices:
            print(notice)
    return FinetuneParts(
        folder=folder,
        photos=photos,
        task=FinetuneTask(
            branch=branch,
            photos=photos,
            held_out=held_out,
            side=data.side,
            nms=config.model.nms,
            top=config.model.top,
            trunk_lr_scale=config.trunk_lr_scale,
        ),
        source=MosaicSource(
            photos=photos,
            chosen=chosen,
            augment=data,
            seed=config.loop.seed,
            negatives=negatives,
            detector=folder,
        ),
    )


def _print_split(config: FinetuneConfig, photos: FinetunePhotos, chosen: list[int], held_out: list[int]) -> None:
    """Print the notices on the photos, and how many are trained on and held out."""
    for notice in photos.notices:
        print(notice)
    if small := photos.small_boxes_notice(config.data.side):
        print(small)
    photo = "photo" if len(chosen) == 1 else "photos"
    print(f"{len(chosen)} {photo} to learn from, {len(held_out)} held out; classes: {', '.join(photos.names)}")
    if not held_out:
        print("no photo with an object is held out: the last weights are exported, their scores uncalibrated")


def read_photos(config: FinetuneConfig) -> FinetunePhotos:
    """The photos and labels of a data section.

    Raises:
        UserError: labels that cannot be read, or nothing to learn from.
    """
    from ovd.data.finetune_photos import FinetunePhotos
    from ovd.formats.join import join_labels
    from ovd.formats.read import read_labels

    data = config.data
    files = (data.annotations,) if isinstance(data.annotations, str) else data.annotations
    if not files:
        raise UserError("data.annotations: an empty list; name one or several files of labels")
    for file in files:
        require_exists(
            file,
            named=f"data.annotations: {file}",
            give="a COCO .json, a YOLO data.yaml, or a folder of Pascal VOC's XML files",
        )
    several = [
        read_labels(
            file,
            kind=None if data.kind == "auto" else data.kind,
            images=Path(data.images) if data.images else None,
            part=data.part,
            prefer=("train",),
        )
        for file in files
    ]
    labels = join_labels(several)
    return FinetunePhotos(folder=labels.root, truth=labels.truth(), confident=data.confident, doubtful=data.doubtful)


def _detector_folder(config: FinetuneConfig) -> Path:
    """The folder of the detector of photographs that ``weights`` names.

    Raises:
        UserError: it is another detector, an export, lacks a file, or lies in the run's own folder: its files are
            copied after the training.
    """
    from ovd.modeling.export import read_card
    from ovd.weights import detector_folder

    weights, out = config.weights, Path(config.out)
    folder = detector_folder(weights)
    if folder.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"weights={weights}: lies in out={out}, which this training writes; give it another folder, as in "
            f"out={out}_more"
        )
    card = read_card(folder)
    if card.arch != "fvlm":
        raise UserError(
            f"weights={weights}: classes are added to a detector of photographs (vild-photo, or what was made from "
            "it); others are fine-tuned with their own configuration, such as vild.yaml or detr.yaml"
        )
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"weights={weights}: {folder} is an export to ONNX, as an installed package has it, and cannot be trained; "
            "give the weights that it was made of: weights=CHECKOUT/weights/vild-photo, or a run's exported/ folder"
        )
    for file in _files_of(card, card.finetuned):
        if not (folder / file).is_file():
            raise UserError(f"weights={weights}: {folder / file}: no such file; copy the folder again")
    return folder


def _files_of(card: DetectorCard, branches: Sequence[FinetunedCard]) -> list[str]:
    """Files of a detector of photographs that are copied as they are, beside its proposal network."""
    from ovd.config_fvlm import FvlmConfig
    from ovd.modeling.fvlm import conse, quality

    config = card.architecture
    assert isinstance(config, FvlmConfig)
    parts = [conse.FILE] * (config.conse is not None) + [quality.FILE] * (config.quality is not None)
    return ["model.safetensors", *parts, *(branch.file for branch in branches)]


def export(config: FinetuneConfig, parts: FinetuneParts, folder: Path) -> None:
    """Write the detector with the new branch added; its scores are calibrated on the held-out photos.

    An earlier branch is left out when the new one names all that is left of it.
    """
    from ovd.modeling.export import read_card, write_card
    from ovd.modeling.fvlm.finetuned import remaining_branches, save_branch
    from ovd.modeling.fvlm.network import PROPOSALS
    from pretrain.engine.config import config_hash

    card, task = read_card(parts.folder), parts.task
    slope, offset, metrics = 1.0, 0.0, {"held_out_photos": float(len(task.held_out))}
    if task.held_out:
        measured = task.measure(task.best)
        slope, offset = measured.fitted()
        metrics |= {} if math.isnan(measured.ap50) else {"held_out_ap50": measured.ap50}
    shutil.copytree(parts.folder / PROPOSALS, folder / PROPOSALS)
    earlier = remaining_branches(card.finetuned, parts.photos.names)
    for file in _files_of(card, earlier):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(parts.folder / file, folder / file)
    branch = save_branch(
        folder,
        task.best,
        number=1 + max((int(Path(branch.file).stem) for branch in earlier), default=0),
        names=parts.photos.names,
        side=task.side,
        nms=task.nms,
        top=task.top,
    )
    branch = replace(branch, slope=slope, offset=offset, metrics=metrics, config_hash=config_hash(config))
    added = (*earlier, branch)
    write_card(folder, replace(card, finetuned=added))
    names = ", ".join(name for branch in added for name in branch.names)
    start = config.weights if "/" not in config.weights else "what it started from"
    purpose = f"Finds {names}; answers all other words as {start} does."
    (folder / "card.json").write_text(json.dumps({"purpose": purpose}, ensure_ascii=False) + "\n", encoding="utf-8")
