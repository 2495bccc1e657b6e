# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins gains from a wide projector (arXiv:2103.03230, figure 4)."""

from __future__ import annotations

from typing import Any

import torch
from common import VIEW, WIDTH, augment, experiment, lines, network

from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.nets.heads import mlp

VIEWS = [VIEW, VIEW]


def make(width: int) -> BarlowTwins:
    # lambda falls with the width: the sum has width² off-diagonal terms and width on the diagonal; .005 at 512
    return BarlowTwins(
        backbone=network(),
        projector=mlp((WIDTH, width, width)),
        augment=augment(VIEWS),
        lambd=0.005 * 512 / width,
        bias_lr_ratio=1.0,
    )


def case(width: int) -> Any:
    return lambda steps: {
        "make": lambda: make(width), "steps": steps or 500, "views": VIEWS, "optim": {"name": "adamw", "lr": 1e-3},
    }  # fmt: skip


CASES = {f"barlow_{width}": case(width) for width in (16, 64, 256, 1024)}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    experiment("barlow_width", __doc__, CASES, plot=lambda axes, r: lines(axes, r, "width of the projector"), argv=argv)


if __name__ == "__main__":
    main()
