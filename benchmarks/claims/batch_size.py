# SPDX-License-Identifier: Apache-2.0
"""SimCLR gains from batch size, MoCo holds at small batch, Barlow Twins hardly minds (equal numbers of pictures seen).

arXiv:2002.05709, figure 9; arXiv:1911.05722, §4.1; arXiv:2103.03230, figure 2. The learning rate of SGD is proportional
to the batch; that of AdamW (Barlow Twins) to its root.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from common import VIEW, WIDTH, augment, experiment, lines, network

from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.moco import MoCo, split_batch_norm
from pretrain.methods.simclr import SimCLR
from pretrain.nets.heads import mlp

VIEWS = [VIEW, VIEW]
BATCHES = (16, 64, 256)
SAMPLES = 50_000
NORM_GROUP = 8  # pictures that share MoCo's batch statistics, whatever the batch: as on one GPU (32 in the paper)


def simclr() -> SimCLR:
    return SimCLR(
        backbone=network(), projector=mlp((WIDTH, 256, 64), last_norm="scale"), augment=augment(VIEWS), temperature=0.2
    )


def moco(batch: int) -> MoCo:
    return MoCo(
        backbone=split_batch_norm(network(), batch // NORM_GROUP),
        projector=mlp((WIDTH, 256, 64), norm="none", bias=True, last_bias=True),
        augment=augment(VIEWS),
        dim=64,
        queue=2048,
        momentum=0.99,
        temperature=0.2,
    )


def barlow() -> BarlowTwins:
    return BarlowTwins(
        backbone=network(), projector=mlp((WIDTH, 512, 512)), augment=augment(VIEWS), lambd=0.005, bias_lr_ratio=1.0
    )


def case(make: Any, batch: int, **optim: Any) -> Any:
    return lambda steps: {
        "make": make, "steps": steps or math.ceil(SAMPLES / batch), "batch": batch, "views": VIEWS, "optim": optim,
    }  # fmt: skip


CASES = {
    **{f"simclr_{b}": case(simclr, b, lr=0.3 * b / 128) for b in BATCHES},
    **{f"moco_{b}": case(partial(moco, b), b, lr=0.1 * b / 128) for b in BATCHES},
    **{f"barlow_{b}": case(barlow, b, name="adamw", lr=1e-3 * math.sqrt(b / 128)) for b in BATCHES},
}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    experiment("batch_size", __doc__, CASES, plot=lambda axes, r: lines(axes, r, "batch"), argv=argv)


if __name__ == "__main__":
    main()
