# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train`` for class-agnostic proposals (``model.arch: picodet``, ``nanodet``).

python scripts/convert_picodet.py ckpt/model.pdmodel --out runs/photos/picodet
python -m ovd.train --config photos/lite_proposals.yaml data.images=photos data.annotations='[photos/boxes.json]'
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.config_proposals import ProposalNetworkConfig, ProposalTrainConfig

if TYPE_CHECKING:
    from ovd.data.boxes import BoxSource
    from ovd.modeling.proposals.network import ProposalDetector
    from ovd.modeling.task import DetectionTask


@dataclass(frozen=True, kw_only=True)
class ProposalParts:
    """Parts of a training of proposals.

    Attributes:
        network: its configuration, with the pixel statistics of its weights.
    """

    network: ProposalNetworkConfig
    model: ProposalDetector
    task: DetectionTask
    source: BoxSource


def build(config: ProposalTrainConfig) -> ProposalParts:
    """Everything a training needs, before the first step."""
    from ovd.data.boxes import BoxedImages, BoxSource
    from ovd.data.mapper import TrainingTransform
    from ovd.modeling.proposals.build import build_from_weights, with_statistics
    from ovd.modeling.task import DetectionTask
    from pretrain.engine.distributed import seed_everything

    seed_everything(config.loop.seed)
    data = config.data
    network = with_statistics(config.model, config.weights)
    model = build_from_weights(config.weights, network)
    model.canvas = (data.side, data.side)
    model.proposal_generator.heads.requires_grad_(False)
    if config.model.frozen:
        model.backbone.freeze()
    images = BoxedImages(
        folder=Path(data.images),
        annotations=[Path(path) for path in data.annotations],
        part=data.part,
        confident=data.confident,
        doubtful=data.doubtful,
        withheld=data.withheld,
    )
    for notice in images.notices:
        print(notice)
    source = BoxSource(
        images=images,
        transform=TrainingTransform(
            short_side=data.side, long_side=data.side, scale=data.scale, crop=data.side, flip=data.flip
        ),
        seed=config.loop.seed,
    )
    task = DetectionTask(model=model, pretrained_prefixes=("backbone.",), pretrained_lr_scale=config.trunk_lr_scale)
    return ProposalParts(network=network, model=model, task=task, source=source)


def export(config: ProposalTrainConfig, parts: ProposalParts, folder: Path) -> None:
    """Write the trained network with its card."""
    from ovd.modeling.proposals.build import ProposalCard, save_proposals
    from pretrain.engine.config import config_hash

    card = ProposalCard(
        model=parts.network.model_dump(mode="json"), sides=config.sides, config_hash=config_hash(config)
    )
    save_proposals(folder, parts.model, card)
