# SPDX-License-Identifier: Apache-2.0
"""What ``ovd.train`` asks of a region store of photos, and what it hands to the loop."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovd import train
from ovd.config import TrainConfig
from ovd.embed import EmbedConfig
from ovd.embed import run as embed
from ovd.training import rcnn
from pretrain.config import CbowTower, EncoderConfig, ResNetTower
from pretrain.engine.config import free_keys, load_config
from pretrain.engine.errors import UserError
from pretrain.nets.towers import build_encoder


def photos(folder: Path, ids: list[int]) -> None:
    rng = np.random.default_rng(0)
    for i in ids:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "gt.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in ids],
                "annotations": [
                    {"id": n, "image_id": i, "category_id": 1, "bbox": [5, 6, 30, 30], "area": 900, "iscrowd": 0}
                    for n, i in enumerate(ids, 1)
                ],
                "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
            }
        )
    )
    (folder / "split.json").write_text(json.dumps({"base": ["cup"], "novel": ["dog"]}))


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A tiny encoder, four photos, and a region store of three of them."""
    torch.manual_seed(0)
    tower = ResNetTower(image_size=32)
    build_encoder(EncoderConfig(embed_dim=12, image=tower, text=CbowTower(width=8, hidden=8))).save(tmp_path / "clip")
    data = tmp_path / "photos"
    data.mkdir()
    photos(data, [3, 5, 9])
    pictures = [f"pictures.images={data}", f"pictures.annotations={data / 'gt.json'}", "pictures.kind=coco"]
    stored = [f"out={tmp_path / 'regions'}", "proposer=ground-truth", f"encoder={tmp_path / 'clip'}"]
    embed(load_config(EmbedConfig, None, [*stored, *pictures, "proposals_per_image=4"]))
    return [
        f"out={tmp_path / 'run'}", f"encoder={tmp_path / 'clip'}", f"regions={tmp_path / 'regions'}",
        "data.kind=coco", f"data.images={data}", f"data.annotations={data / 'gt.json'}",
        f"data.split={data / 'split.json'}", "data.short_side=64", "model.head.mask=false",
        "loop={steps: 2, batch_size: 2, workers: 0, device: cpu}", "optim.lr=0.001",
    ]  # fmt: skip


def test_training_store__of_other_photos_is_refused_before_training(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(TrainConfig, None, overrides)
    rcnn.build(config)
    photos(tmp_path / "photos", [3, 5, 9, 11])
    with pytest.raises(UserError, match="1 pictures are not among the 3 of this region store, such as 11"):
        rcnn.build(config)


def test_training__free_keys_reach_the_loop_and_every_generator_is_seeded(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Enough(Exception):
        pass

    def fit(task: torch.nn.Module, source: Any, **options: Any) -> None:
        given.append({**options, "drawn": (random.random(), np.random.rand()), "weights": task.state_dict()})
        raise Enough

    monkeypatch.setattr("pretrain.engine.loop.fit", fit)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with pytest.raises(Enough):
            train.main(overrides)
    first, second = given
    assert first["free_keys"] == free_keys(TrainConfig)
    assert first["drawn"] == second["drawn"]
    assert all(torch.equal(a, second["weights"][name]) for name, a in first["weights"].items())
