# SPDX-License-Identifier: Apache-2.0
"""The shipped configurations of embedding and training speak of the same pictures, and training moves the regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ovd.config import TrainConfig
from ovd.embed import EmbedConfig
from ovd.regions.layout import Identity, StoreSettings
from ovd.regions.proposals import GroundTruthProposer
from ovd.regions.store import RegionStore
from ovd.regions.writer import write_regions
from pretrain.engine.config import load_config
from tests.regions.fakes import TinyEncoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("name", ["vild.yaml", "vild_image.yaml", "vild_ensemble.yaml"])
def test_embed_configs__fit_the_training_configs(name: str) -> None:
    embed = load_config(EmbedConfig, CONFIGS / "embed.yaml")
    train = load_config(TrainConfig, CONFIGS / name)
    assert train.regions == embed.out and train.weights == embed.proposer and train.encoder == embed.encoder
    assert (train.data.seed, train.data.size) == (embed.pictures.seed, embed.pictures.size)
    assert train.data.length <= embed.pictures.length
    assert train.regions_per_image <= embed.proposals_per_image


@pytest.mark.parametrize("crop", [None, 150])
def test_ground_truth_regions__stay_on_the_objects_through_flip_resize_and_crop(
    tmp_path: Path, crop: int | None
) -> None:
    from ovd.data.catalog import StickerImages
    from ovd.data.mapper import DetectionSource, TrainingTransform
    from ovd.regions.images import ScenePictures
    from pretrain.data.stickers import Stickers

    images = StickerImages(stickers=Stickers.load(), split="train", seed=3, length=2, size=128, labels="all")
    pictures, encoder = ScenePictures(images.source), TinyEncoder()
    settings = StoreSettings(proposals_per_image=20, crop_size=16)
    identity = Identity(encoder="e", dim=16, proposals="ground-truth", source="s", settings=settings)
    proposer = GroundTruthProposer(pictures.boxes)
    write_regions(tmp_path / "s", source=pictures, proposer=proposer, encoder=encoder, identity=identity)
    transform = TrainingTransform(short_side=160, long_side=400, scale=(0.7, 1.6), crop=crop, flip=0.5)
    source = DetectionSource(
        images=images, transform=transform, seed=0, store=RegionStore.open(tmp_path / "s"), regions_per_image=20
    )
    seen = 0
    for draw in range(16):
        sample = source.sample(draw % 2, draw)
        whole = images.load(draw % 2)
        regions = sample["regions"].proposal_boxes.tensor
        truth = sample["instances"].gt_boxes.tensor
        assert len(truth) and len(regions) <= len(whole.boxes)
        for box in truth:
            if crop is None:
                assert iou(box, regions).max() > 0.99
            else:
                # What a crop leaves of an object is measured on its mask; it may be less than what is left of the box.
                inside = (regions[:, :2] <= box[:2] + 2).all(1) & (regions[:, 2:] >= box[2:] - 2).all(1)
                assert inside.any()
            seen += 1
    assert seen > 20


def iou(box: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - overlap
    return (overlap / area).numpy()
