# SPDX-License-Identifier: Apache-2.0
"""Every method at the smallest size. ``python -m tests.ssl.ssl_cases run FOLDER``: what one of two processes does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pydantic import TypeAdapter
from torch import nn

from pretrain.config import CbowTower, EncoderConfig, Method, ViTTower
from pretrain.config_ssl import BackboneConfig, SslMethod
from pretrain.engine import distributed
from pretrain.health import Monitored
from pretrain.methods.build import build_method
from pretrain.methods.clip import Clip
from pretrain.nets.standardised import without_batch_norm
from pretrain.nets.towers import build_encoder
from tests.engine.toy import train
from tests.ssl.small import WIDTH, Views, backbone

VIEWS = Views((8, 8))
NET = {"name": "resnet18", "stem": "small", "zero_init": False}
CASES: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 16, "dim": 8},
    "moco_v1": {"dim": 8, "queue": 20, "bn_splits": 2, "momentum": 0.9, "temperature": 0.07},
    "moco_v2": {
        "dim": 8,
        "hidden": 16,
        "queue": 20,
        "bn_splits": 2,
        "momentum": 0.9,
        "temperature": 0.2,
        "symmetric": True,
    },
    "byol": {"hidden": 16, "dim": 8},
    "byol_gn": {"hidden": 16, "dim": 8, "backbone": {**NET, "norm": "gn_ws"}},
    "swav": {"hidden": 16, "dim": 8, "prototypes": 5, "freeze_steps": 1, "queue_length": 12},
    "simsiam": {"dim": 16, "hidden": 8},
    "barlow_twins": {"dims": (16, 16)},
}
METHODS = sorted(CASES)


CLIP_RUNS: dict[str, dict[str, Any]] = {
    "clip": {"names": ["dog", "cat", "mug"]},
    "clip_own_caption": {"same_noun_positive": False},
    "clip_chunks": {"chunk": 3},
}
RUNS = [*METHODS, *CLIP_RUNS]
"""What must go on exactly after an interruption: every method, and CLIP in its three forms."""


class Pairs(Views):
    """The same pictures with captions."""

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        image = super().collate(samples)["views"][0]
        labels = image.flatten(1).long().sum(1) % 3
        return {"image": image, "caption": [f"a {'dog cat mug'.split()[i]}" for i in labels], "class_id": labels}


PAIRS = Pairs((16,))


def run_of(name: str) -> tuple[nn.Module, Views]:
    """(task, its samples) of a run."""
    if name not in CLIP_RUNS:
        return small_method(name), VIEWS
    torch.manual_seed(0)
    encoder = build_encoder(
        EncoderConfig(
            embed_dim=8,
            image=ViTTower(kind="vit", patch_size=8, width=32, layers=1, heads=2, image_size=16),
            text=CbowTower(width=16, hidden=16, context_length=8),
        )
    )
    return Clip(encoder=encoder, **CLIP_RUNS[name]), PAIRS


def section(name: str, **changes: Any) -> SslMethod:
    """The section of a method, small unless said otherwise."""
    common = {"name": name, "backbone": NET, "views": [{"size": 8, "count": 2}]}
    return TypeAdapter(Method).validate_python({**common, **CASES[name], **changes})


def small_method(name: str) -> nn.Module:
    """The assembled method, with a network of one convolution in place of a ResNet."""
    torch.manual_seed(0)
    with mock.patch("pretrain.methods.build.build_backbone", _net):
        return build_method(section(name), batch_size=8, device=torch.device("cpu"))


def _net(config: BackboneConfig, **_: Any) -> nn.Module:
    made = backbone()
    made.width = WIDTH  # type: ignore[assignment]
    return without_batch_norm(made) if config.norm == "gn_ws" else made


def main() -> None:
    """Each method in one piece; then again from the checkpoint in its middle, in a folder of its own."""
    distributed.setup()
    folder = Path(sys.argv[2])
    options: dict[str, Any] = {
        "steps": 4, "batch_size": 8, "log_every": 3, "save_every": 2, "name": "sgd", "warmup_steps": 0,
    }  # fmt: skip
    for name in RUNS:
        whole, pieces = folder / f"{name}_whole", folder / f"{name}_pieces"
        task, source = run_of(name)
        train(Monitored(task), whole, source, **options)
        if distributed.is_main():
            shutil.copytree(whole / "checkpoints" / "step_2", pieces / "checkpoints" / "step_2")
        distributed.barrier()
        distributed.seed_everything(999)
        task, source = run_of(name)
        train(Monitored(task), pieces, source, resume=True, **options)
    distributed.teardown()


if __name__ == "__main__":
    main()
