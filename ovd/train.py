# SPDX-License-Identifier: Apache-2.0
"""``wordbox train --config vild.yaml``: train a detector and export it.

``model.arch`` chooses the architecture: a Mask R-CNN with ViLD's heads, a detection transformer, proposals without
names, a region head on a frozen image tower, or fine-tuned classes beside it.

    wordbox train --config vild.yaml regions=runs/regions              ViLD
    wordbox train --config updetr.yaml                                 UP-DETR's pretext: patches, no labels
    wordbox train --config detr.yaml weights=runs/updetr/exported      fine-tune on labels
    wordbox train --config photos/lite_proposals.yaml data.images=…    class-agnostic proposals for photographs
    wordbox train --config photos/lite_vild.yaml proposals=…           names for them
    wordbox train --config photos/finetune.yaml data.images=…          classes of your own

The run folder ends with ``exported/`` (``model.safetensors`` and ``model.json``), which ``Detector.load``,
``ovd.embed`` and ``weights=`` of another training read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ovd.config import TrainConfig
from ovd.config_detr import TRAIN_CONFIGS, DetrTrainConfig
from ovd.config_finetune import FinetuneConfig
from ovd.config_fvlm import FvlmTrainConfig
from ovd.config_proposals import ProposalTrainConfig
from pretrain.engine.cli import Options, command_line
from pretrain.engine.config import free_keys, keys_at_default, plain
from pretrain.engine.errors import run_cli
from pretrain.engine.files import EXPORTED
from pretrain.engine.stages import require_stages

if TYPE_CHECKING:
    from pretrain.engine.sampling import Source
    from pretrain.engine.task import Task

ConfigT = TypeVar("ConfigT", TrainConfig, DetrTrainConfig, ProposalTrainConfig, FvlmTrainConfig, FinetuneConfig)


class Parts(Protocol):
    """Parts of a training: the task of the loop, and its samples."""

    @property
    def task(self) -> Task: ...

    @property
    def source(self) -> Source: ...


PartsT = TypeVar("PartsT", bound=Parts)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    config, options = command_line(TRAIN_CONFIGS, argv, prog="wordbox train", doc=__doc__ or "")
    require_stages(config)
    from ovd.training import detr, finetune, fvlm, proposals, rcnn

    match config:
        case TrainConfig():
            _train(config, options, build=rcnn.build, export=rcnn.export)
        case DetrTrainConfig():
            _train(config, options, build=partial(detr.build, check=options.check), export=detr.export)
        case ProposalTrainConfig():
            _train(config, options, build=proposals.build, export=proposals.export)
        case FvlmTrainConfig():
            _train(config, options, build=partial(fvlm.build, check=options.check), export=fvlm.export)
        case FinetuneConfig():
            photos = finetune.read_photos(config)
            config = finetune.with_steps(config, photos)
            _train(config, options, build=partial(finetune.build, photos=photos), export=finetune.export)
    return 0


def _train(
    config: ConfigT,
    options: Options,
    *,
    build: Callable[[ConfigT], PartsT],
    export: Callable[[ConfigT, PartsT, Path], None],
) -> None:
    """Build, train, export."""
    from pretrain.engine.distributed import is_main
    from pretrain.engine.loop import fit
    from pretrain.engine.run_folder import exported_folder

    parts = build(config)
    out = Path(config.out)
    report = fit(
        parts.task,
        parts.source,
        loop=config.loop,
        optim=config.optim,
        out=out,
        record=plain(config),
        at_default=keys_at_default(config),
        resume=options.resume,
        overwrite=options.overwrite,
        check=options.check,
        free_keys=free_keys(type(config)),
    )
    if not options.check and is_main():
        with exported_folder(out) as folder:
            export(config, parts, folder)
        print(f"step {report.step}: {config.model.arch} exported to {out / EXPORTED}")


if __name__ == "__main__":
    run_cli(main)
