# SPDX-License-Identifier: Apache-2.0
"""A detector trained by two processes is the one that a single process trains on the same global batches.

``python -m tests.modeling.test_processes FOLDER`` is the body of one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ovd.config import ModelConfig
from ovd.data.catalog import StickerImages
from ovd.data.mapper import DetectionSource, TrainingTransform
from ovd.modeling.task import DetectionTask
from ovd.modeling.vild.build import build_model
from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
from ovd.regions.images import ScenePictures
from ovd.regions.layout import Identity, StoreSettings
from ovd.regions.proposals import GroundTruthProposer
from ovd.regions.store import RegionStore
from ovd.regions.writer import write_regions
from pretrain.data.stickers import Stickers
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.config import LoopConfig, OptimConfig
from pretrain.engine.loop import fit
from tests.engine.processes import finish, start_ranks
from tests.regions.fakes import TinyEncoder

D = 16


def scenes() -> StickerImages:
    return StickerImages(stickers=Stickers.load(), split="train", seed=3, length=6, size=96, labels="all")


def make(images: StickerImages) -> OpenVocabularyRCNN:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "variant": "vild",
            "proposals": {"anchor_sizes": ((24.0, 48.0),), "batch_per_image": 32, "post_nms": (40, 40)},
            "head": {"mask_dims": (8, 8), "batch_per_image": 16, "scale": 10.0},
        }
    )
    rows = torch.randn(len(images.names), D)
    everything = torch.ones(len(rows), dtype=torch.bool)
    grey: dict[str, Any] = {"pixel_mean": [127.5] * 3, "pixel_std": [63.75] * 3}
    return build_model(config, embed_dim=D, rows=rows, trainable=everything, **grey)


def train(folder: Path, out: Path) -> None:
    """Two steps of a tiny ViLD."""
    torch.set_num_threads(1)
    images = scenes()
    model = make(images)
    store = RegionStore.open(folder / "store")
    transform = TrainingTransform(short_side=96, long_side=96)
    fit(
        DetectionTask(model=model, pretrained_prefixes=(), pretrained_lr_scale=1.0),
        DetectionSource(images=images, transform=transform, seed=0, store=store, regions_per_image=4),
        loop=LoopConfig(steps=2, batch_size=4, workers=0, device="cpu", log_every=1, save_every=100),
        optim=OptimConfig(name="sgd", lr=1e-5, schedule="constant"),
        out=out,
        record={},
    )


@pytest.mark.slow
def test_two_processes__train_the_detector_of_one(tmp_path: Path) -> None:
    pictures, encoder = ScenePictures(scenes().source), TinyEncoder()
    settings = StoreSettings(proposals_per_image=20, crop_size=16)
    identity = Identity(encoder="e", dim=D, proposals="ground-truth", source="s", settings=settings)
    write_regions(
        tmp_path / "store", source=pictures, proposer=GroundTruthProposer(pictures.boxes), encoder=encoder,
        identity=identity,
    )  # fmt: skip
    processes = start_ranks(["-m", "tests.modeling.test_processes", str(tmp_path)], world=2)
    train(tmp_path, tmp_path / "1")
    finish(processes)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "12"
    ]
    losses = {name for name in logs[0][0] if name.startswith("loss")}
    assert {"loss", "loss_box", "loss_text", "loss_distill", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} <= losses
    for one, two in zip(*logs, strict=True):
        for name in (*losses, "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    first, second = (load_weights(tmp_path / name / "last" / "model.safetensors")[0] for name in "12")
    begin = {name: p.detach() for name, p in make(scenes()).named_parameters()}
    for name, begun in begin.items():
        one, two = first[f"model.{name}"] - begun, second[f"model.{name}"] - begun
        # float32: the sums run in another order, and weights near 1 have lost the last digits of a small update.
        assert float((two - one).norm()) <= 0.01 * float(one.norm()) + 1e-6 * float(begun.norm()), name
    moved = [float((first[f"model.{name}"] - p).norm()) for name, p in begin.items()]
    assert sum(m > 0 for m in moved) > 0.9 * len(moved)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[1]) / "2")
