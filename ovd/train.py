# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train --config vild.yaml``: train a detector and export it.

The run folder ends with ``exported/`` (``model.safetensors`` and ``model.json``), which ``Detector.load``,
``ovd.embed`` and ``weights=`` of another training read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ovd.config import TrainConfig
from ovd.config_detr import DetrTrainConfig
from ovd.config_proposals import ProposalTrainConfig
from pretrain.engine.cli import command_line
from pretrain.engine.config import free_keys, keys_at_default, plain
from pretrain.engine.errors import run_cli
from pretrain.engine.files import EXPORTED

ConfigT = TypeVar("ConfigT", TrainConfig, DetrTrainConfig, ProposalTrainConfig)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    from ovd.training import detr, proposals, rcnn

    arch = detr.arch_of(argv)
    if arch == "nanodet":
        doc = proposals.__doc__ or ""
        return _run(
            ProposalTrainConfig, argv, doc=doc, build=proposals.build, export=proposals.export, kind="proposals"
        )
    if detr.is_transformer(argv):
        doc = detr.__doc__ or ""
        return _run(DetrTrainConfig, argv, doc=doc, build=detr.build, export=detr.export, kind="transformer")
    return _run(TrainConfig, argv, doc=__doc__ or "", build=rcnn.build, export=rcnn.export, kind="detector")


def _run(
    model: type[ConfigT],
    argv: list[str],
    *,
    doc: str,
    build: Callable[[ConfigT], dict[str, Any]],
    export: Callable[[ConfigT, dict[str, Any], Path], None],
    kind: str,
) -> int:
    """Read the configuration, build, train, export; returns the exit status."""
    config, options = command_line(model, argv, prog="python -m ovd.train", doc=doc)
    from pretrain.engine.distributed import is_main
    from pretrain.engine.loop import fit

    parts = build(config)
    out = Path(config.out)
    report = fit(
        parts["task"],
        parts["source"],
        loop=config.loop,
        optim=config.optim,
        out=out,
        record=plain(config),
        at_default=keys_at_default(config),
        resume=options.resume,
        overwrite=options.overwrite,
        check=options.check,
        free_keys=free_keys(model),
    )
    if not options.check and is_main():
        export(config, parts, out / EXPORTED)
        print(f"step {report.step}: {kind} exported to {out / EXPORTED}")
    return 0


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
