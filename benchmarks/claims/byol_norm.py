# SPDX-License-Identifier: Apache-2.0
"""BYOL learns without batch statistics: group norm and weight standardisation instead of batch norm (arXiv:2010.10241).

`batch_norm`, `gn_ws` (encoder and heads), and `no_norm`: none at all, which in the paper learns nothing (.1 %). The
paper tunes anew without batch norm, and so does this: a slower target (.999, as there) and a quarter of the learning
rate, found with seed 0, for both.
"""

from __future__ import annotations

from typing import Any

import torch
from common import VIEW, WIDTH, augment, bars, experiment, network
from torch import nn

from pretrain.methods.byol import BYOL
from pretrain.nets.heads import mlp
from pretrain.nets.standardised import StandardisedConv2d, group_norm

VIEWS = [VIEW, VIEW]
BACKBONES = {
    "bn": network,
    "gn_ws": lambda: network(StandardisedConv2d, group_norm),
    "none": lambda: network(norm=lambda _: nn.Identity()),
}


def byol(norm: Any, momentum: float) -> BYOL:
    return BYOL(
        backbone=BACKBONES[norm](),
        projector=mlp((WIDTH, 256, 64), norm=norm, bias=True),
        predictor=mlp((64, 256, 64), norm=norm, bias=True),
        augment=augment(VIEWS),
        momentum=momentum,
    )


def case(norm: str, *, momentum: float = 0.999, lr: float = 0.05) -> Any:
    return lambda steps: {
        "make": lambda: byol(norm, momentum), "steps": steps or 1000, "views": VIEWS, "optim": {"lr": lr},
    }  # fmt: skip


CASES = {"batch_norm": case("bn", momentum=0.99, lr=0.2), "gn_ws": case("gn_ws"), "no_norm": case("none")}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    experiment("byol_norm", __doc__, CASES, plot=bars, argv=argv)


if __name__ == "__main__":
    main()
