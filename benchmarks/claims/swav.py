# SPDX-License-Identifier: Apache-2.0
"""SwAV: small extra crops gain at small extra cost (arXiv:2006.09882, table 3); a stuck run has the loss ln K.

`small_crops`: two crops of 32 pixels and four of 16; `two_crops`: the two of 32 alone, for as many steps. Compare
`seconds_per_step` as well. `stuck`: codes as soft as can be (epsilon 1), so that every code is nearly uniform.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import VIEW, WIDTH, augment, bars, experiment, network
from torch import nn

from pretrain.config_views import ViewConfig
from pretrain.methods.swav import SwAV

PROTOTYPES, DIM = 60, 64
BIG = VIEW.model_copy(update={"count": 2})
SMALL = VIEW.model_copy(update={"size": 16, "crop_scale": (0.1, 0.4), "count": 4})


def swav(views: list[ViewConfig], epsilon: float) -> SwAV:
    projector = nn.Sequential(nn.Linear(WIDTH, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIM))
    return SwAV(
        backbone=network(), projector=projector, augment=augment(views), dim=DIM, prototypes=PROTOTYPES,
        epsilon=epsilon, freeze_steps=20,
    )  # fmt: skip


def case(views: list[ViewConfig], epsilon: float) -> Any:
    return lambda steps: {
        "make": lambda: swav(views, epsilon), "steps": steps or 600, "views": views, "optim": {"lr": 0.1},
    }  # fmt: skip


CASES = {
    "two_crops": case([BIG], 0.03),
    "small_crops": case([BIG, SMALL], 0.03),
    "stuck": case([BIG], 1.0),
}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    results = experiment("swav", __doc__, CASES, plot=bars, argv=argv)
    for name, rows in results.items():
        loss = sum(row["loss"] for row in rows) / len(rows)
        seconds = sum(row["seconds_per_step"] for row in rows) / len(rows)
        print(f"{name}: loss {loss:.3f} (ln K = {math.log(PROTOTYPES):.3f}), {seconds * 1000:.0f} ms a step")


if __name__ == "__main__":
    main()
