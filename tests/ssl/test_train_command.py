# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.train` for every self-supervised method, from the config to the exported backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain import train
from pretrain.config import ClipMethod, PretrainConfig
from pretrain.config_views import Normalise
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.config import load_config
from pretrain.methods.clip import Clip
from pretrain.nets.backbones import load_backbone
from pretrain.nets.towers import build_encoder
from pretrain.training.image_text_encoder import build_caption_clip, build_clip_encoder
from pretrain.training.parts import PretrainingParts
from pretrain.training.self_supervised import build_self_supervised
from tests.ssl.ssl_cases import METHODS

SMALL: dict[str, list[str]] = {
    "simclr": ["method.hidden=32", "method.dim=16"],
    "moco_v1": ["method.dim=16", "method.queue=32", "optim.milestones=[1]"],
    "moco_v2": ["method.hidden=32", "method.dim=16", "method.queue=32"],
    "byol": ["method.hidden=32", "method.dim=16"],
    "byol_gn": ["method.hidden=32", "method.dim=16"],
    "swav": ["method.hidden=32", "method.dim=16", "method.prototypes=8"],
    "simsiam": ["method.dim=32", "method.hidden=8"],
    "barlow_twins": ["method.dims=[32, 32]"],
}
LR = {
    "simclr": 1e-3, "moco_v1": 0.06, "moco_v2": 0.06, "byol": 0.2, "byol_gn": 0.2, "swav": 0.1, "simsiam": 0.06,
    "barlow_twins": 1e-3,
}  # fmt: skip
SIDE = 24
CLIP = [
    "method.encoder.embed_dim=8", "method.encoder.image.width=32", "method.encoder.image.layers=1",
    "method.encoder.image.heads=2", "method.encoder.image.image_size=32", "method.encoder.text.width=16",
    "method.encoder.text.layers=1", "method.encoder.text.heads=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


def changes(name: str, pictures: Path, out: Path) -> list[str]:
    normalise = ", normalise: null" if name == "simclr" else ""
    views = f"{{size: {SIDE}, count: 2{normalise}}}" + (", {size: 16, count: 1}" if name == "swav" else "")
    return [
        *SMALL[name], f"method.views=[{views}]", f"data={{kind: folder, root: {pictures}}}", f"out={out}",
        "watch.probe_every=0",
        "loop.steps=2", "loop.batch_size=16", "loop.workers=0", "loop.log_every=1", "loop.device=cpu",
        "optim.warmup_steps=0",
    ]  # fmt: skip


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_pretraining__writes_its_learning_rates_and_the_backbone_it_trained(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    begun: list[dict[str, Tensor]] = []
    trained: list[nn.Module] = []
    build = train.build_parts

    def recorded(cfg: PretrainConfig, **more: Any) -> PretrainingParts:
        parts = build(cfg, **more)
        backbone = cast(nn.Module, parts.task.backbone)
        trained.append(backbone)
        begun.append({key: value.clone() for key, value in backbone.state_dict().items()})
        return parts

    with mock.patch.object(train, "build_parts", recorded):
        argv = ["--config", f"pretrain/{name}.yaml", *changes(name, pictures, tmp_path / "run")]
        assert train.main(argv) == 0
    second = 0.1 if name == "moco_v1" else 0.5  # a milestone; the middle of the cosine
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([LR[name], second * LR[name]])
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)

    info = json.loads((tmp_path / "run" / "exported" / "config.json").read_text())
    assert info["method"] == name and info["size"] == SIDE
    normal = Normalise()
    mean, std = ([0.0] * 3, [1.0] * 3) if name == "simclr" else (list(normal.mean), list(normal.std))
    assert info["mean"] == mean and info["std"] == std
    assert info["backbone"] == {
        "name": "resnet18",
        "stem": "small",
        "norm": "gn_ws" if name == "byol_gn" else "bn",
        "zero_init": name in ("simclr", "simsiam", "barlow_twins"),
    }

    loaded, loaded_info = load_backbone(tmp_path / "run" / "exported")
    assert loaded_info == info
    wanted, found = trained[0].state_dict(), loaded.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    moved = [key for key, value in begun[0].items() if not torch.equal(value, wanted[key])]
    assert "conv1.weight" in moved, "the network that was trained, and not fresh weights"
    with torch.no_grad():
        features = loaded(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 512) and bool(torch.isfinite(features).all()) and float(features.std()) > 0


@pytest.mark.parametrize(("rule", "factor"), [("linear", 16 / 256), ("sqrt", 4.0), ("none", 1.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_learning_rate__simclrs_rule_counts_the_whole_batch(
    rule: str, factor: float, accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    more = [f"method.lr_rule={rule}", f"loop.accumulate={accumulate}"]
    cfg = load_config(PretrainConfig, "pretrain/simclr.yaml", [*changes("simclr", pictures, tmp_path), *more])
    parts = build_self_supervised(cfg)
    assert parts.optim.lr == pytest.approx(1e-3 * factor)
    assert parts.optim.model_copy(update={"lr": cfg.optim.lr}) == cfg.optim, "nothing but lr changes"
    assert parts.source.sample(0, 0) is not None


def test_learning_rate__a_run_in_two_passes_logs_that_of_the_whole_batch(pictures: Path, tmp_path: Path) -> None:
    more = ["method.lr_rule=linear", "loop.accumulate=2"]
    argv = ["--config", "pretrain/simclr.yaml", *changes("simclr", pictures, tmp_path / "run"), *more]
    assert train.main(argv) == 0
    assert [line["lr"] for line in lines_of(tmp_path / "run")] == pytest.approx([1e-3 / 16, 1e-3 / 32])


@pytest.mark.parametrize("name", ["moco_v2", "byol", "simsiam"])
def test_learning_rate__other_methods_take_it_as_it_is(name: str, pictures: Path, tmp_path: Path) -> None:
    cfg = load_config(PretrainConfig, f"pretrain/{name}.yaml", changes(name, pictures, tmp_path))
    assert build_self_supervised(cfg).optim == cfg.optim


# --- CLIP


def clip_of(*more: str) -> tuple[PretrainConfig, Clip]:
    cfg = load_config(PretrainConfig, "paper/clip.yaml", [*CLIP, *more])
    assert isinstance(cfg.method, ClipMethod)
    return cfg, build_caption_clip(cfg, cfg.method, build_clip_encoder(cfg.method))


def test_clip__is_built_as_its_section_says() -> None:
    cfg, task = clip_of()
    assert task.chunk == 1024 and task.same_noun_positive is False and task.names is None
    assert task.augmentation == cfg.method.augment  # type: ignore[union-attr]
    assert task.augmentation.crop_scale == (1.0, 1.0) and task.augmentation.flip == 0.0
    assert all(parameter.requires_grad for parameter in task.parameters()) and task.untracked == ()
    _, other = clip_of(
        "method.chunk=null", "method.same_noun_positive=true", "method.augment.hue=0.25", "data={kind: sticker_pairs}"
    )
    assert other.chunk is None and other.same_noun_positive is True and other.augmentation.hue == 0.25


def test_clip__leaves_a_frozen_text_tower_as_it_was(tmp_path: Path) -> None:
    given = build_encoder(clip_of()[0].method.encoder)  # type: ignore[union-attr]
    given.save(tmp_path / "text")
    _, free = clip_of(f"method.text_weights={tmp_path / 'text'}")
    _, frozen = clip_of(f"method.text_weights={tmp_path / 'text'}", "method.freeze_text=true")
    for task, learns in ((free, True), (frozen, False)):
        text = task.encoder.text
        assert text is not None and {p.requires_grad for p in text.parameters()} == {learns}
        assert all(p.requires_grad for p in task.encoder.visual.parameters())  # type: ignore[union-attr]
    tensors, _ = load_weights(tmp_path / "text" / "model.safetensors")
    theirs = {key: value for key, value in frozen.state_dict().items() if key.startswith("encoder.text.")}
    assert theirs and all(torch.equal(value, tensors[key.removeprefix("encoder.")]) for key, value in theirs.items())
