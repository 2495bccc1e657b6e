# SPDX-License-Identifier: Apache-2.0
"""The published constants, written down a second time: a changed number in configs/paper is a failing test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import PretrainConfig
from pretrain.engine.config import load_config, plain

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
IMAGES = 1_281_167  # ImageNet-1k, training

MOCO = {"dim": 128, "queue": 65536, "momentum": 0.999, "bn_splits": 8}
SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
LARS = {"name": "lars", "momentum": 0.9, "schedule": "cosine"}
METHOD: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 2048, "dim": 128, "temperature": 0.1, "lr_rule": "linear"},
    "moco_v1": {**MOCO, "temperature": 0.07},
    "moco_v2": {**MOCO, "temperature": 0.2, "hidden": 2048, "symmetric": False},
    "byol": {"hidden": 4096, "dim": 256, "momentum": 0.996},
    "swav": {
        "hidden": 2048, "dim": 128, "prototypes": 3000, "big_crops": 2, "temperature": 0.1, "epsilon": 0.05,
        "iterations": 3, "freeze_steps": 313, "queue_length": 0,
    },
    "simsiam": {"dim": 2048, "layers": 3, "hidden": 512, "constant_predictor_lr": True},
    "barlow_twins": {"dims": [8192] * 3, "lambd": 0.0051, "bias_lr_ratio": 0.0048 / 0.2, "gradient_scale": 1 / 32},
}  # fmt: skip
OPTIM: dict[str, dict[str, Any]] = {  # lr is the peak; SimCLR's rule multiplies .3 by batch / 256
    "simclr": {**LARS, "lr": 0.3, "weight_decay": 1e-6},
    "moco_v1": {**SGD, "lr": 0.03, "schedule": "step"},
    "moco_v2": {**SGD, "lr": 0.03, "schedule": "cosine"},
    "byol": {**LARS, "lr": 0.2 * 4096 / 256, "weight_decay": 1.5e-6},
    "swav": {**LARS, "lr": 4.8, "weight_decay": 1e-6, "final_lr_ratio": 0.0048 / 4.8},
    "simsiam": {**SGD, "lr": 0.05 * 512 / 256, "schedule": "cosine"},
    "barlow_twins": {**LARS, "lr": 0.2 * 2048 / 256, "weight_decay": 1e-6, "final_lr_ratio": 0.001},
}
LENGTH = {  # epochs, batch, epochs of warm-up
    "simclr": (1000, 4096, 10), "moco_v1": (200, 256, 0), "moco_v2": (200, 256, 0), "byol": (1000, 4096, 10),
    "swav": (800, 4096, 10), "simsiam": (100, 512, 0), "barlow_twins": (1000, 2048, 10),
}  # fmt: skip
ZERO_INIT = {"simclr", "simsiam", "barlow_twins"}  # gammas of the residual branches start at zero

BLUR = {"blur_p": 0.5, "blur_sigma": [0.1, 2.0], "grey_p": 0.2, "jitter_p": 0.8, "flip": 0.5, "size": 224}
MILD = {**BLUR, "crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "count": 2}
BYOL = {**BLUR, "crop_scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1], "interpolation": "bicubic"}
STRONG = {**BLUR, "jitter": [0.8, 0.8, 0.8, 0.2]}
TWO = [{**BYOL, "blur_p": 1.0, "solarise_p": 0.0}, {**BYOL, "blur_p": 0.1, "solarise_p": 0.2}]
VIEWS: dict[str, list[dict[str, Any]]] = {
    "simclr": [{**STRONG, "crop_scale": [0.08, 1.0], "count": 2, "normalise": None}],
    "moco_v1": [{**MILD, "jitter": [0.4] * 4, "jitter_p": 1.0, "blur_p": 0.0, "grey_first": True}],
    "moco_v2": [MILD],
    "simsiam": [MILD],
    "byol": TWO,
    "barlow_twins": TWO,
    "swav": [
        {**STRONG, "crop_scale": [0.14, 1.0], "count": 2},
        {**STRONG, "crop_scale": [0.05, 0.14], "count": 6, "size": 96},
    ],
}


def of(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = plain(load_config(PretrainConfig, CONFIGS / f"{name}.yaml"))
    return raw


def has(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        found = given[key]
        if isinstance(value, list):
            assert [float(x) for x in found] == pytest.approx([float(x) for x in value]), key
        elif isinstance(value, float):
            assert float(found) == pytest.approx(value), key
        else:
            assert found == value, key


@pytest.mark.parametrize("name", METHOD)
def test_paper_recipes__method_views_and_optimiser_are_the_published_ones(name: str) -> None:
    raw = of(name)
    has(raw["method"], METHOD[name])
    has(raw["optim"], OPTIM[name])
    assert raw["method"]["backbone"]["name"] == "resnet50"
    assert raw["method"]["backbone"]["zero_init"] is (name in ZERO_INIT)
    assert len(raw["method"]["views"]) == len(VIEWS[name])
    for given, wanted in zip(raw["method"]["views"], VIEWS[name], strict=True):
        has(given, wanted)


@pytest.mark.parametrize("name", LENGTH)
def test_paper_recipes__steps_are_the_published_epochs(name: str) -> None:
    raw, (epochs, batch, warm_up) = of(name), LENGTH[name]
    assert raw["loop"]["batch_size"] == batch
    assert raw["loop"]["steps"] == pytest.approx(epochs * IMAGES / batch, rel=1e-3)
    assert raw["optim"]["warmup_steps"] == pytest.approx(warm_up * IMAGES / batch, rel=1e-3)
    if name == "moco_v1":
        assert [m / raw["loop"]["steps"] for m in raw["optim"]["milestones"]] == [120 / 200, 160 / 200]


def test_byol_gn_recipe__differs_from_byol_in_the_norm() -> None:
    ours, byol = of("byol_gn"), of("byol")
    assert ours["method"]["backbone"] == {**byol["method"]["backbone"], "norm": "gn_ws"}
    flat = {
        name: {f"{part}.{key}": str(value) for part in ("method", "optim", "loop") for key, value in raw[part].items()}
        for name, raw in (("ours", ours), ("byol", byol))
    }
    differing = {key for key in flat["ours"] if flat["ours"][key] != flat["byol"][key]}
    assert differing == {
        "method.name", "method.backbone", "method.momentum", "optim.lr", "optim.weight_decay",
    }  # fmt: skip
    has(ours["method"], {"momentum": 0.999})
    has(ours["optim"], {"lr": 0.24 * 4096 / 256, "weight_decay": 5e-8})
    assert (CONFIGS / "byol_gn.yaml").read_text().count("UNVERIFIED") == 5, "the remark, and each of the four"


def test_clip__published_constants() -> None:
    """arXiv:2103.00020, tables 18 and 20, and the released ViT-B/32."""
    raw = of("clip")
    encoder = raw["method"]["encoder"]
    has(encoder["image"], {"patch_size": 32, "width": 768, "layers": 12, "heads": 12, "image_size": 224})
    has(encoder["text"], {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "causal": True})
    has(encoder, {"embed_dim": 512, "text_projection": False})
    has(encoder, {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]})
    has(raw["optim"], {"name": "adamw", "lr": 5e-4, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6})
    has(raw["optim"], {"warmup_steps": 2000, "schedule": "cosine", "final_lr_ratio": 0.0})
    assert raw["loop"]["batch_size"] == 32768
    assert raw["loop"]["steps"] == 32 * 400_000_000 / 32768
    has(raw["method"], {"same_noun_positive": False, "noun_negatives": False, "freeze_text": False})
    changes = {key: value for key, value in raw["method"]["augment"].items() if key != "crop_scale"}
    assert raw["method"]["augment"]["crop_scale"] == [1.0, 1.0] and set(changes.values()) == {0.0}


CIFAR: dict[str, dict[str, dict[str, Any]]] = {  # the READMEs and notebook of the authors; SimSiam's appendix D
    "simclr": {
        "method": {"hidden": 512, "dim": 128, "temperature": 0.5, "lr_rule": "linear"},
        "view": {"crop_scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "normalise": None},
        "optim": {**LARS, "lr": 1.0, "weight_decay": 1e-6, "warmup_steps": 10 * 97},
        "loop": {"steps": 1000 * 97},
    },
    "moco": {
        "method": {"dim": 128, "queue": 4096, "momentum": 0.99, "temperature": 0.1, "bn_splits": 8, "symmetric": False},
        "view": {"crop_scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1]},
        "optim": {**SGD, "lr": 0.06, "weight_decay": 5e-4, "schedule": "cosine"},
        "loop": {"steps": 200 * 97},
    },
    "simsiam": {
        "method": {"dim": 2048, "layers": 2, "hidden": 512, "constant_predictor_lr": True},
        "view": {"crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1]},
        "optim": {**SGD, "lr": 0.03 * 512 / 256, "weight_decay": 5e-4, "schedule": "cosine"},
        "loop": {"steps": 800 * 97},
    },
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar__published_recipes(name: str) -> None:
    raw = plain(load_config(PretrainConfig, CONFIGS.parent / "cifar" / f"{name}.yaml"))
    wanted = CIFAR[name]
    has(raw["method"], wanted["method"])
    has(raw["optim"], wanted["optim"])
    has(raw["loop"], {"batch_size": 512, **wanted["loop"]})
    assert 512 * 97 <= 50_000 < 512 * 98, "an epoch, without the last pictures"
    has(raw["method"]["backbone"], {"name": "resnet18", "stem": "cifar", "norm": "bn", "zero_init": name != "moco"})
    (view,) = raw["method"]["views"]
    has(view, {"size": 32, "count": 2, "flip": 0.5, "jitter_p": 0.8, "grey_p": 0.2, "blur_p": 0.0, "solarise_p": 0.0})
    has(view, wanted["view"])
