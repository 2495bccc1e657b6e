# SPDX-License-Identifier: Apache-2.0
"""Pretrain a backbone on a folder of pictures without labels, and hand it over to Detectron2.

    python examples/pretrain_backbone.py photos/ runs/mine --steps 1500

The default of four steps only shows the way: it takes seconds and teaches the network nothing.
The result is `runs/mine/detectron2`: weights with Detectron2's names and a yaml to merge into your configuration.
"""

from __future__ import annotations

import argparse

from pretrain.engine.errors import run_cli
from pretrain.export import main as export
from pretrain.train import main as train


def main(argv: list[str]) -> int:
    """Run `python -m pretrain.train` and `python -m pretrain.export` in this process."""
    flags = argparse.ArgumentParser(prog="python examples/pretrain_backbone.py", description=__doc__)
    flags.add_argument("pictures", help="folder of pictures, searched with its sub folders")
    flags.add_argument("out", help="run folder, new or empty")
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--batch-size", type=int, default=8, help="at most the number of pictures")
    options = flags.parse_args(argv)
    train(
        [
            *("--config", "pretrain/simsiam.yaml"),
            *("data.kind=folder", f"data.root={options.pictures}", f"out={options.out}"),
            *(f"loop.steps={options.steps}", f"loop.batch_size={options.batch_size}", "loop.workers=0"),
            "watch.probe_every=0",
        ]
    )
    return export([options.out, "--to", "detectron2", "--out", f"{options.out}/detectron2"])


if __name__ == "__main__":
    run_cli(main)
