# SPDX-License-Identifier: Apache-2.0
"""A small encoder, and a detector of photographs trained on six small photos, for all tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from ovd import train as ovd_train
from ovd.config_proposals import ProposalNetworkConfig
from ovd.modeling.proposals.build import ProposalCard, save_proposals
from ovd.modeling.proposals.network import build_proposal_detector
from pretrain.config import CbowTower, EncoderConfig
from pretrain.config_photos import TimmTower
from pretrain.nets.towers import JointEncoder, build_encoder


@pytest.fixture(scope="session")
def encoder() -> JointEncoder:
    torch.manual_seed(0)
    return build_encoder(
        EncoderConfig(
            embed_dim=16,
            image=TimmTower(kind="timm", name="tf_efficientnet_lite0", image_size=64),
            text=CbowTower(kind="cbow", width=16, hidden=32, context_length=16),
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        )
    ).eval()


def arguments(root: Path) -> list[str]:
    """Of the command that trains on the photos of a folder."""
    return [
        "--config", "photos/lite_vild.yaml", f"out={root}/run", f"encoder={root}/encoder",
        f"proposals={root}/proposals", f"cache={root}/cache", f"data.images={root}/images",
        f"data.annotations=[{root}/boxes.json]", f"data.labels={root}/labels.json", "data.regions=6", "model.side=64",
        "model.head.hidden=16", "loop.steps=2", "loop.batch_size=2", "optim.warmup_steps=0",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, encoder: JointEncoder) -> Path:
    """The run folder of a training of two steps on six small photos."""
    root = tmp_path_factory.mktemp("fvlm")
    encoder.save(root / "encoder")
    torch.manual_seed(0)
    network = build_proposal_detector(ranking="words", nms=0.6, pre_nms=100, post_nms=20)
    for head in network.proposal_generator.heads:
        nn.init.normal_(head.output.weight, std=0.3)  # type: ignore[union-attr,arg-type]
    config = ProposalNetworkConfig(arch="nanodet", pre_nms=100, post_nms=20)
    (root / "proposals").mkdir()
    save_proposals(root / "proposals", network, ProposalCard(model=config.model_dump(mode="json"), sides=(64,)))
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        cv2.imwrite(str(root / f"images/{number}.png"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    images = [
        {"id": n, "file_name": f"{n}.png", "width": 64, "height": 48, "split": "train" if n else "val"}
        | ({"content": "scene"} if n < 4 else {})
        for n in range(6)
    ]
    boxes = [
        {"id": n + 1, "image_id": n, "category_id": 1 + n % 2, "bbox": [4, 4, 40, 30], "score": 0.9} for n in range(4)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "car"}]
    (root / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    (root / "labels.json").write_text(json.dumps({"4.png": ["saxophone"], "5.png": ["lamp"]}))
    assert ovd_train.main(arguments(root)) == 0
    return root
