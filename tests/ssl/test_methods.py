# SPDX-License-Identifier: Apache-2.0
"""The methods_build as they are assembled: heads, groups, learning rates, configs; and exact resume of every method."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pretrain.config import PretrainConfig
from pretrain.config_ssl import BackboneConfig
from pretrain.engine.config import OptimConfig, load_config
from pretrain.engine.distributed import seed_everything
from pretrain.engine.errors import UserError
from pretrain.engine.loop import Stopped
from pretrain.engine.optim import build_optimizer, set_lr
from pretrain.health import Monitored
from pretrain.methods import head_memory
from pretrain.methods.barlow_twins import BarlowTwins
from pretrain.methods.build import build_method, method_optim
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.nets.backbones import build_backbone, load_backbone, save_backbone
from pretrain.train import main as train_main
from tests.engine.processes import launch
from tests.engine.toy import content, differences, train
from tests.ssl.small import DIM, WIDTH, as_float, backbone, head
from tests.ssl.ssl_cases import METHODS, RUNS, VIEWS, run_of, section

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU = torch.device("cpu")


def built(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_method(section(name, **changes), batch_size=8, device=CPU)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


# --- methods_build


@pytest.mark.parametrize("name", ["byol", "moco_v2", "swav"])
def test_compile__gives_the_same_loss_and_keeps_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    compile_in_place = nn.Module.compile

    def traced(module: nn.Module) -> None:  # traced as ever, but run by torch: the test needs no C++ compiler
        compiled.append(module)
        compile_in_place(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    plain, quick = built(name), built(name, compile=True)
    assert len(compiled) == (1 if name == "swav" else 2)  # the momentum copy too
    assert list(plain.state_dict()) == list(quick.state_dict())
    losses = []
    for task in (plain, quick):
        torch.manual_seed(1)
        loss, _ = task(VIEWS.batch(8))
        loss.backward()
        losses.append((loss.item(), task.backbone.conv1.weight.grad))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-3, atol=1e-6)


def test_simclr__its_head_ends_with_a_gain_without_shift_and_has_no_biases() -> None:
    task = built("simclr", hidden=2048, dim=128)
    first, norm, relu, second, last = task.projector
    assert [type(x) for x in (norm, relu, last)] == [nn.BatchNorm1d, nn.ReLU, nn.BatchNorm1d]
    assert first.bias is None and second.bias is None
    assert last.weight.requires_grad and not last.bias.requires_grad and not last.bias.any()
    assert second.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_simclr__passes_both_views_together() -> None:
    sizes: list[int] = []
    task = SimCLR(backbone=backbone(), projector=head(WIDTH), augment=(as_float, as_float))
    task.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    task(VIEWS.batch(8))
    assert sizes == [16]


@pytest.mark.parametrize(
    "task",
    [
        SimSiam(backbone=backbone(), projector=head(WIDTH), predictor=head(DIM, seed=2), augment=(as_float, as_float)),
        BarlowTwins(backbone=backbone(), projector=head(WIDTH), augment=(as_float, as_float)),
    ],
    ids=["simsiam", "barlow_twins"],
)
def test_simsiam_and_barlow_twins__pass_the_views_one_by_one(task: nn.Module) -> None:
    sizes: list[int] = []
    handle = task.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    task(VIEWS.batch(8))
    handle.remove()
    assert sizes == [8, 8]


@pytest.mark.parametrize(("rule", "lr", "expected"), [("linear", 0.3, 4.8), ("sqrt", 0.075, 4.8), ("none", 0.5, 0.5)])
def test_simclr__its_learning_rate_rules_agree_at_4096(rule: str, lr: float, expected: float) -> None:
    optim = method_optim(section("simclr", lr_rule=rule), OptimConfig(lr=lr), batch_size=4096)
    assert optim.lr == pytest.approx(expected)


def test_simsiam__its_heads_are_the_papers() -> None:
    task = built("simsiam", dim=64, hidden=16, layers=3)
    assert len(linears(task.projector)) == 3 and all(layer.bias is None for layer in linears(task.projector))
    last = task.projector[-1]
    assert isinstance(last, nn.BatchNorm1d) and last.weight is None and last.bias is None
    inner, outer = linears(task.predictor)
    assert (inner.in_features, inner.out_features, outer.out_features) == (64, 16, 64)
    assert inner.bias is None and outer.bias is not None and isinstance(task.predictor[-1], nn.Linear)


def test_simsiam__its_targets_are_constants() -> None:
    """The gradient is that of the loss with the projections given as numbers."""
    task = SimSiam(
        backbone=backbone(), projector=head(WIDTH), predictor=head(DIM, seed=2), augment=(as_float, as_float)
    )
    batch = VIEWS.batch(8)
    a, b = (as_float(view) for view in batch["views"])
    z_a, z_b = (task.projector(task.backbone(v)) for v in (a, b))
    fixed = [z.clone().detach() for z in (z_a, z_b)]
    parameters = list(task.parameters())
    expected = -sum(F.cosine_similarity(task.predictor(z), t).mean() for z, t in ((z_a, fixed[1]), (z_b, fixed[0]))) / 2
    loss, _ = task(batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_simsiam__without_the_stop_gradient_the_gradient_is_another() -> None:
    found = []
    for stop in (True, False):
        task = SimSiam(
            backbone=backbone(), projector=head(WIDTH), predictor=head(DIM, seed=2), augment=(as_float, as_float),
            stop_gradient=stop,
        )  # fmt: skip
        task(VIEWS.batch(8))[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]))
    assert F.cosine_similarity(found[0], found[1], dim=0) < 0.99


def rates(task: nn.Module, optim: OptimConfig, step: int) -> dict[str, float]:
    """Learning rate of each parameter by name."""
    optimizer = build_optimizer(task.param_groups(optim), optim)
    set_lr(optimizer, step, optim, total=100)
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in task.named_parameters() if id(p) in of}


def test_simsiam__the_predictor_keeps_its_learning_rate_and_everything_is_decayed() -> None:
    task = built("simsiam")
    optim = OptimConfig(name="sgd", lr=0.05, weight_decay=1e-4, schedule="cosine")
    for step in (0, 50, 99):
        found = rates(task, optim, step)
        assert found.keys() == {name for name, _ in task.named_parameters()}
        predictor = {rate for name, rate in found.items() if name.startswith("predictor.")}
        others = {rate for name, rate in found.items() if not name.startswith("predictor.")}
        assert predictor == {0.05} and len(others) == 1
        assert (others == {0.05}) == (step == 0)
    assert {group["weight_decay"] for group in task.param_groups(optim)} == {1e-4}


def test_barlow_twins__param_groups() -> None:
    task = built("barlow_twins")
    optim = OptimConfig(name="lars", lr=0.2, weight_decay=1e-6, schedule="cosine")
    found = rates(task, optim, 0)
    for name, p in task.named_parameters():
        assert found[name] == pytest.approx(0.2 if p.ndim > 1 else 0.0048), name
    matrices, vectors = build_optimizer(task.param_groups(optim), optim).param_groups
    assert (matrices["lars_exclude"], vectors["lars_exclude"]) == (False, True)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-6, 0.0)


def test_barlow_twins__the_gradient_scale_changes_the_gradient_alone() -> None:
    losses, gradients = [], []
    for scale in (1.0, 0.25):
        task = BarlowTwins(
            backbone=backbone(), projector=head(WIDTH), augment=(as_float, as_float), gradient_scale=scale
        )
        loss, _ = task(VIEWS.batch(8))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1])
    torch.testing.assert_close(gradients[0] * 0.25, gradients[1])


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("zero", [True, False])
def test_zero_init__residual_blocks_begin_as_the_identity(depth: int, zero: bool) -> None:
    net = build_backbone(BackboneConfig(name=f"resnet{depth}", stem="small", zero_init=zero))
    gains = [p for name, p in net.named_parameters() if name.endswith(f"bn{2 if depth == 18 else 3}.weight")]
    assert len(gains) == {18: 8, 50: 16}[depth]
    assert all(bool((gain == (0 if zero else 1)).all()) for gain in gains)


# --- errors


def test_method_config__mistakes_in_sizes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"method\.queue: 4 is less than the 16 keys"):
        built("moco_v2", queue=4)
    with pytest.raises(UserError, match=r"set method\.bn_splits=2"):
        built("moco_v2", bn_splits=3)
    with pytest.raises(UserError, match=r"method\.prototypes: 21 cannot be used alike by 20 samples.*queue_length"):
        built("swav", prototypes=21)
    with pytest.raises(UserError, match="batch norm needs two"):
        build_method(section("simclr"), batch_size=1, device=CPU)
    with pytest.raises(ValueError, match="two are compared, not 3"):
        section("simclr", views=[{"size": 8, "count": 3}])
    monkeypatch.setattr(head_memory, "free_memory", lambda device: 1e6)
    with pytest.raises(UserError, match=r"\(8192, 8192, 8192\) need about 1\.\d GiB .* 0\.8 GiB for the correlation"):
        built("barlow_twins", dims=(8192, 8192, 8192))


@pytest.mark.parametrize(("groups", "samples"), [(1, 16), (2, 16), (3, 18), (8, 16), (16, 32)])
def test_moco__check_samples_make_equal_groups_of_two_or_more(groups: int, samples: int) -> None:
    config = section("moco_v2", bn_splits=groups, queue=200)
    assert build_method(config, batch_size=96, device=CPU).check_samples == samples


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("simclr", {"hidden": 65536}, "method.hidden: .* hidden 65536"),
        ("moco_v1", {"queue": 60_000, "dim": 4096}, "queue 60000"),
        ("moco_v2", {"hidden": 65536}, "hidden 65536"),
        ("byol", {"hidden": 65536}, "hidden 65536"),
        ("byol_gn", {"hidden": 65536}, "hidden 65536"),
        ("swav", {"hidden": 65536}, "hidden 65536"),
        ("simsiam", {"dim": 65536}, "dim 65536"),
    ],
)
def test_memory_check__heads_and_queues_too_large_are_refused_with_their_size(
    name: str, sizes: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_memory, "free_memory", lambda device: 1e8)
    with pytest.raises(UserError, match=rf"{said}.* need about \d+\.\d GiB .* 0\.1 GiB are free"):
        built(name, **sizes)


def test_pretraining__fewer_pictures_than_a_batch_are_refused(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(tmp_path / f"{number}.png")
    given = [f"data={{kind: folder, root: {tmp_path}}}", f"out={tmp_path / 'run'}", "loop.batch_size=16"]
    with pytest.raises(UserError, match=r"loop\.batch_size: 16 is more than the 6 pictures of data"):
        train_main(["--config", "pretrain/simsiam.yaml", *given, "--check"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "near"), [("timm:resnet5O", "resnet50"), ("torchvision:resnet5", "resnet50")], ids=["timm", "torchvision"]
)
def test_backbone_name__an_unknown_one_is_named_with_the_closest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean .*{near}"):
        build_backbone(BackboneConfig(name=name))


@pytest.mark.parametrize("name", ["fcn_resnet50", "r3d_18", "fasterrcnn_resnet50_fpn"])
def test_backbone_name__one_that_is_no_image_classifier_is_refused_before_it_is_built(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: pytest.fail("was built; some fetch weights"))
    with pytest.raises(UserError, match=f"no image classifier '{name}'"):
        build_backbone(BackboneConfig(name=f"torchvision:{name}"))


# --- configs


@pytest.mark.parametrize(
    "path",
    sorted(p for folder in ("pretrain", "cifar") for p in (CONFIGS / folder).glob("*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_small_configs__all_load(path: Path) -> None:
    assert load_config(PretrainConfig, path).loop.batch_size >= 2


@pytest.mark.parametrize("name", METHODS)
def test_methods__each_has_a_small_config_and_the_papers(name: str) -> None:
    small, paper = (load_config(PretrainConfig, CONFIGS / folder / f"{name}.yaml") for folder in ("pretrain", "paper"))
    assert small.method.name == paper.method.name == name
    assert paper.method.backbone.name == "resnet50"  # type: ignore[union-attr]


# --- folder


def test_saved_backbone__comes_back_in_eval_mode_as_it_was(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet18", stem="small", norm="gn_ws")
    net = build_backbone(config).eval()
    save_backbone(tmp_path, net, config=config, method="byol_gn", size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded, info = load_backbone(tmp_path)
    assert not loaded.training and (info["method"], info["mean"]) == ("byol_gn", [0.1, 0.2, 0.3])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), loaded(x))


# --- exact resume


class Interrupted(Monitored):
    """Asks for a stop in its fourth forward pass, as a SIGTERM would."""

    calls = 0

    def forward(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(batch)


@pytest.mark.parametrize("name", RUNS)
def test_resume__six_steps_equal_four_and_two_bit_for_bit(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 8, "save_every": 50, "log_every": 4, "name": "sgd"}
    source = run_of(name)[1]
    train(Monitored(run_of(name)[0]), tmp_path / "whole", source, **options)
    with pytest.raises(Stopped):
        train(Interrupted(run_of(name)[0]), tmp_path / "pieces", source, **options)
    seed_everything(777)
    train(Monitored(run_of(name)[0]), tmp_path / "pieces", source, resume=True, **options)
    whole, pieces = (content(tmp_path / run / "checkpoints" / "step_6") for run in ("whole", "pieces"))
    assert differences(whole, pieces) == []


def test_resume__of_two_processes_is_bit_exact_for_every_method(tmp_path: Path) -> None:
    launch("run", tmp_path, world=2, module="tests.ssl.ssl_cases")
    for name in RUNS:
        whole, pieces = (content(tmp_path / f"{name}_{run}" / "checkpoints" / "step_4") for run in ("whole", "pieces"))
        assert differences(whole, pieces) == [], name
