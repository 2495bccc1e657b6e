# SPDX-License-Identifier: Apache-2.0
"""From configs to networks: the heads of each paper layer by layer, every constant, optimiser groups by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.config import PretrainConfig
from pretrain.engine.config import OptimConfig, load_config
from pretrain.engine.optim import build_optimizer
from pretrain.methods import build as methods_build
from pretrain.methods import head_memory
from pretrain.methods.build import build_method
from pretrain.nets.heads import mlp
from pretrain.nets.standardised import StandardisedConv2d, StandardisedLinear, standardised
from pretrain.train import smaller_comparison
from tests.ssl.small import Views
from tests.ssl.ssl_cases import METHODS, section, small_method

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"
RELU = ("relu",)
HEADS: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    # arXiv:2002.05709 and its code: no biases, batch norm after both layers, the last one without a shift
    "simclr": {
        "projector": [
            ("linear", 2048, 2048, False), ("bn", 2048, True, True), RELU, ("linear", 2048, 128, False),
            ("bn", 128, True, False),
        ],
    },
    "moco_v1": {"projector": [("linear", 2048, 128, True)]},  # arXiv:1911.05722, the classifier's layer
    "moco_v2": {"projector": [("linear", 2048, 2048, True), RELU, ("linear", 2048, 128, True)]},  # arXiv:2003.04297
    "byol": {  # arXiv:2006.07733, §3.3, and its code: a bias before the norm, none at the end
        "projector": [("linear", 2048, 4096, True), ("bn", 4096, True, True), RELU, ("linear", 4096, 256, False)],
        "predictor": [("linear", 256, 4096, True), ("bn", 4096, True, True), RELU, ("linear", 4096, 256, False)],
    },
    "byol_gn": {  # arXiv:2010.10241: group norm and standardised weights in their place
        "projector": [("standardised", 2048, 4096, True), ("gn", 16, 4096), RELU, ("linear", 4096, 256, False)],
        "predictor": [("standardised", 256, 4096, True), ("gn", 16, 4096), RELU, ("linear", 4096, 256, False)],
    },
    "swav": {  # arXiv:2006.09882 and its code
        "projector": [("linear", 2048, 2048, True), ("bn", 2048, True, True), RELU, ("linear", 2048, 128, True)],
    },
    "simsiam": {  # arXiv:2011.10566, §3: batch norm after every layer of the projector, the last without affine
        "projector": [
            *[("linear", 2048, 2048, False), ("bn", 2048, True, True), RELU] * 2, ("linear", 2048, 2048, False),
            ("bn", 2048, False, False),
        ],
        "predictor": [("linear", 2048, 512, False), ("bn", 512, True, True), RELU, ("linear", 512, 2048, True)],
    },
    "barlow_twins": {  # arXiv:2103.03230 and its code; the norm at the end is in the loss
        "projector": [
            ("linear", 2048, 8192, False), ("bn", 8192, True, True), RELU, ("linear", 8192, 8192, False),
            ("bn", 8192, True, True), RELU, ("linear", 8192, 8192, False),
        ],
    },
}  # fmt: skip


def described(head: nn.Module) -> list[tuple[Any, ...]]:
    """Kind and sizes of each layer; of a batch norm whether gain and shift are trained."""
    found: list[tuple[Any, ...]] = []
    for layer in head.children():
        if isinstance(layer, nn.Linear):
            kind = "standardised" if isinstance(layer, StandardisedLinear) else "linear"
            found.append((kind, layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm1d):
            trained = [p is not None and p.requires_grad for p in (layer.weight, layer.bias)]
            found.append(("bn", layer.num_features, *trained))
        elif isinstance(layer, nn.GroupNorm):
            found.append(("gn", layer.num_groups, layer.num_channels))
        else:
            found.append((type(layer).__name__.lower(),))
    return found


@pytest.mark.parametrize("name", HEADS)
def test_heads__are_the_papers_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_memory, "free_memory", lambda device: 1e15)
    cfg = load_config(PretrainConfig, PAPER / f"{name}.yaml")
    with torch.device("meta"):
        task = build_method(cfg.method, batch_size=cfg.loop.batch_size, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert {part: described(getattr(task, part)) for part in HEADS[name]} == HEADS[name]
    assert hasattr(task, "predictor") == ("predictor" in HEADS[name])
    assert any(isinstance(m, StandardisedConv2d) for m in task.modules()) == (name == "byol_gn")


GIVEN: dict[str, dict[str, Any]] = {  # no default among them
    "simclr": {"temperature": 0.37},
    "moco_v1": {"temperature": 0.37, "momentum": 0.91, "symmetric": True},
    "moco_v2": {"temperature": 0.37, "momentum": 0.91, "symmetric": False},
    "byol": {"momentum": 0.91},
    "byol_gn": {"momentum": 0.91},
    "swav": {
        "temperature": 0.37, "epsilon": 0.021, "iterations": 5, "freeze_steps": 7, "queue_length": 14, "queue_start": 3,
        "big_crops": 2,
    },
    "simsiam": {"constant_predictor_lr": False},
    "barlow_twins": {"lambd": 0.013, "bias_lr_ratio": 0.3, "gradient_scale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_method_config__every_constant_reaches_its_method(name: str) -> None:
    task = build_method(section(name, **GIVEN[name]), batch_size=8, device=torch.device("cpu"))
    assert {key: getattr(task, key) for key in GIVEN[name]} == GIVEN[name]
    if name == "swav":
        assert task.prototypes.shape == (5, 8)  # type: ignore[union-attr]
    if name.startswith("moco"):
        assert len(task.queue) == 20  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["simclr", "byol", "byol_gn"])
def test_param_groups__norms_and_biases_have_no_decay_and_no_layer_wise_rate(name: str) -> None:
    """arXiv:2002.05709, §2.1 and code; arXiv:2006.07733, §3.3."""
    task = small_method(name)
    optim = OptimConfig(name="lars", lr=1.0, weight_decay=1e-6)
    optimiser = build_optimizer(task.param_groups(optim), optim)
    names = {id(p): key for key, p in task.named_parameters()}
    groups = {
        bool(g["lars_exclude"]): (g["weight_decay"], {names[id(p)] for p in g["params"]})
        for g in optimiser.param_groups
    }
    trained = {key for key, p in task.named_parameters() if p.requires_grad}
    matrices = {
        f"{key}.weight"
        for key, m in task.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not key.startswith("target")
    }
    assert groups[False] == (1e-6, matrices)
    assert groups[True] == (0.0, trained - matrices)
    assert not any(key.startswith("target") for key in trained)
    assert any("bias" in key for key in groups[True][1])


def test_weight_standardisation__mean_0_and_variance_1_per_output_unit() -> None:
    """arXiv:1903.10520, eq. 2, in numpy; the variance over the inputs is the biased one."""
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2
    flat = weight.numpy().reshape(5, -1)
    wanted = (flat - flat.mean(1, keepdims=True)) / np.sqrt(
        ((flat - flat.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(standardised(weight).numpy().reshape(5, -1), wanted, rtol=1e-10)
    conv = StandardisedConv2d(3, 5, 2, bias=False).double()
    conv.weight.data = weight
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    np.testing.assert_allclose(conv(x).flatten().detach().numpy(), wanted @ x.flatten().numpy(), rtol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_sync_batch_norm__is_used_on_several_gpus_but_not_by_moco(name: str) -> None:
    with (
        mock.patch.object(methods_build, "world_size", lambda: 2),
        mock.patch.object(head_memory, "free_memory", lambda device: 1e15),
    ):
        task = build_method(section(name), batch_size=8, device=torch.device("cuda"))
    norms = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    shared = [isinstance(m, nn.SyncBatchNorm) for m in norms]
    if name.startswith("moco"):
        assert norms and not any(shared)
    else:
        assert all(shared) and bool(norms) == (name != "byol_gn")


def test_moco__a_symmetric_one_sums_the_losses_of_both_directions() -> None:
    """As the authors' CIFAR notebook does."""
    views = Views((8, 8)).batch(8)["views"]
    plain = [{"size": 8, "count": 2, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0}]

    def loss(symmetric: bool, pair: list[torch.Tensor]) -> torch.Tensor:
        options = {"symmetric": symmetric, "bn_splits": 1, "queue": 40, "views": plain}
        torch.manual_seed(0)
        task = build_method(section("moco_v2", **options), batch_size=8, device=torch.device("cpu"))
        return task({"views": pair})[0].detach()

    there, back = loss(False, views), loss(False, views[::-1])
    assert not torch.isclose(there, back, rtol=1e-4)
    torch.testing.assert_close(loss(True, views), there + back, rtol=1e-4, atol=1e-5)


def test_group_norm__no_unit_of_a_head_is_normalised_alone() -> None:
    """A group of one unit would always give 0, and no gradient."""
    for hidden, groups in ((4096, 16), (128, 16), (68, 4), (16, 2), (6, 1)):
        norm = mlp([5, hidden, 3], norm="gn_ws")[1]
        assert isinstance(norm, nn.GroupNorm) and (norm.num_groups, norm.num_channels) == (groups, hidden)


@pytest.mark.parametrize(
    ("config", "accumulate", "said"),
    [
        ("pretrain/simclr.yaml", 4, "the negatives of simclr are the 32 samples of a pass, not the 128 of a step"),
        ("pretrain/simclr.yaml", 1, None),
        ("pretrain/barlow_twins.yaml", 2, "samples of the cross-correlation of barlow_twins"),
        ("pretrain/simsiam.yaml", 2, None),
        ("paper/clip.yaml", 2, "set method.chunk in place of it"),
    ],
)
def test_accumulation__is_reported_where_it_changes_what_is_compared(
    config: str, accumulate: int, said: str | None
) -> None:
    warning = smaller_comparison(load_config(PretrainConfig, config, [f"loop.accumulate={accumulate}"]))
    assert (warning is None) == (said is None) and (said or "") in (warning or "")
