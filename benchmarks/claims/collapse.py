# SPDX-License-Identifier: Apache-2.0
"""What keeps from collapse: BYOL's predictor, SimSiam's stop-gradient, Barlow Twins' off-diagonal term.

Each method as it is and without that part. The claim holds when the broken one ends with a lower kNN and rank, and the
health panel has raised an alarm on the broken one only. arXiv:2006.07733, table 5b; arXiv:2011.10566, table 1;
arXiv:2103.03230, table 6.
"""

from __future__ import annotations

from typing import Any

import torch
from common import VIEW, WIDTH, augment, bars, experiment, network
from torch import nn

from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.byol import BYOL
from pretrain.methods.simsiam import SimSiam
from pretrain.nets.heads import mlp

VIEWS = [VIEW, VIEW]


def byol(*, predictor: bool, momentum: float = 0.99) -> BYOL:
    return BYOL(
        backbone=network(),
        projector=mlp((WIDTH, 256, 64), bias=True),
        predictor=mlp((64, 256, 64), bias=True) if predictor else nn.Identity(),
        augment=augment(VIEWS),
        momentum=momentum,
    )


def simsiam(*, stop_gradient: bool) -> SimSiam:
    return SimSiam(
        backbone=network(),
        projector=mlp((WIDTH, 256, 256), last_norm="plain"),
        predictor=mlp((256, 64, 256), last_bias=True),
        augment=augment(VIEWS),
        stop_gradient=stop_gradient,
    )


def barlow(*, lambd: float) -> BarlowTwins:
    return BarlowTwins(
        backbone=network(), projector=mlp((WIDTH, 512, 512)), augment=augment(VIEWS), lambd=lambd, bias_lr_ratio=1.0
    )


def case(make: Any, steps: int, **optim: Any) -> Any:
    return lambda given: {"make": make, "steps": given or steps, "views": VIEWS, "optim": optim}


ADAM = {"name": "adamw", "lr": 1e-3}  # Barlow's loss grows with the width; AdamW does not see its scale
CASES = {
    "byol": case(lambda: byol(predictor=True), 1000, lr=0.2),
    "byol_no_predictor": case(lambda: byol(predictor=False), 1000, lr=0.2),
    # a target that follows sooner: what a slow one only begins, it has finished after as many steps
    "byol_fast_target": case(lambda: byol(predictor=True, momentum=0.9), 1000, lr=0.2),
    "byol_fast_target_no_predictor": case(lambda: byol(predictor=False, momentum=0.9), 1000, lr=0.2),
    "simsiam": case(lambda: simsiam(stop_gradient=True), 600, lr=0.1),
    "simsiam_no_stop_gradient": case(lambda: simsiam(stop_gradient=False), 600, lr=0.1),
    "barlow": case(lambda: barlow(lambd=0.005), 500, **ADAM),
    "barlow_no_off_diagonal": case(lambda: barlow(lambd=0.0), 500, **ADAM),
}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    experiment("collapse", __doc__, CASES, plot=bars, argv=argv)


if __name__ == "__main__":
    main()
