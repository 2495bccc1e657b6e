# SPDX-License-Identifier: Apache-2.0
"""The probe against brute force in numpy; what it must leave alone; what it says when it cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain import probe
from pretrain.config import CbowTower, EncoderConfig, PretrainConfig, ResNetTower, ViTTower
from pretrain.config_views import InputSpec
from pretrain.engine.config import plain
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.loop import fit
from pretrain.evaluation import probe as measures
from pretrain.evaluation.data import open_data
from pretrain.evaluation.features import centre, features, labels, random_crop
from pretrain.evaluation.knn import KnnProbe, accuracy, knn
from pretrain.evaluation.linear import PROTOCOL_OF, PROTOCOLS, Recipe, few_labels, linear_classifier
from pretrain.health import Monitored
from pretrain.methods.build import build_method
from pretrain.nets.towers import build_encoder
from tests.engine.processes import finish, start_ranks
from tests.ssl.small import Views


class Blobs:
    """Pictures of a class colour with noise; separable, but not by every pixel."""

    def __init__(self, count: int, *, seed: int, classes: int = 4, side: int = 8) -> None:
        self.count, self.seed, self.classes, self.side = count, seed, classes, side
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        self.seen.append(index)
        rng = np.random.default_rng([self.seed, index])
        colour = np.random.default_rng(self.label(index)).integers(40, 216, 3)
        return np.clip(colour + rng.normal(0, 25, (self.side, self.side, 3)), 0, 255).astype(np.uint8)

    def label(self, index: int) -> int:
        return index % self.classes


PLAIN = InputSpec(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.07), (20, 0.5), (500, 0.1)])
def test_knn__is_the_weighted_vote_by_brute_force(k: int, temperature: float) -> None:
    rng = np.random.default_rng(k)
    query, bank, labels = rng.normal(size=(30, 5)), rng.normal(size=(60, 5)), rng.integers(0, 4, 60)
    expected = np.zeros((30, 4))
    for i, q in enumerate(query):
        cosine = np.array([q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank])
        for j in np.argsort(-cosine)[: min(k, 60)]:
            expected[i, labels[j]] += np.exp(cosine[j] / temperature)
    found = knn(
        torch.from_numpy(query),
        torch.from_numpy(bank),
        torch.from_numpy(labels),
        classes=4,
        k=k,
        temperature=temperature,
    ).numpy()
    found, expected = (x / x.sum(1, keepdims=True) for x in (found, expected))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_knn__a_near_neighbour_outvotes_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 5)
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    query = torch.tensor([[1.0, 0.2]])
    assert int(knn(query, bank, labels, classes=2, k=6, temperature=0.1).argmax()) == 0
    assert int(knn(query, bank, labels, classes=2, k=6, temperature=100.0).argmax()) == 1


def test_features__are_those_of_eval_mode_and_the_backbone_stays_as_it_was() -> None:
    net, images = network().train(), Blobs(20, seed=1)
    net[3].eval()  # a mode of its own must survive
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    found = features(net, images, range(20), PLAIN, batch=6)
    assert [m.training for m in net] == [True, True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not found.requires_grad
    pixels = torch.from_numpy(np.stack([images.image(i) for i in range(20)])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(found, net.eval()((pixels - 0.5) / 0.25).detach())


def test_evaluation_view__is_the_centre_of_the_resized_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    found = centre(picture, 56)
    whole = cv2.resize(picture, (91, 64), interpolation=cv2.INTER_AREA)
    assert found.shape == (56, 56, 3) and np.array_equal(found, whole[4:60, 17:73])
    exact = picture[:56, :56]
    assert centre(exact, 56) is exact


def test_low_shot__solves_the_regularised_regression() -> None:
    """At the solution the objective's gradient is zero; computed here by hand in float64."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(12, 3)), np.arange(12) % 3
    rows = torch.from_numpy(x).float()
    eye = torch.eye(3)  # scores of the unit vectors and of zero give the weights back
    args: dict[str, Any] = {"classes": 3, "shots": 4, "seed": 0, "decay": 0.01}
    bias = few_labels(rows, torch.from_numpy(y), torch.zeros(1, 3), **args).double().numpy()
    weight = (few_labels(rows, torch.from_numpy(y), eye, **args).double().numpy() - bias).T
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = unit @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (p - np.eye(3)[y]).T @ unit / 12 + 0.01 * weight
    assert np.abs(gradient).max() < 1e-3 and np.abs(weight).max() > 0.5


def test_low_shot__uses_the_given_number_of_labels_per_class() -> None:
    x, y = torch.eye(40), torch.arange(40) % 4
    scores = few_labels(x, y, x, classes=4, shots=2, seed=5)
    told = (scores - scores.mean(0)).abs().max(1).values > 1e-2
    assert int(told.sum()) == 8


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(
    "recipe", [Recipe(0.5, 12), Recipe(200.0, 30, optimizer="lars"), Recipe(3.0, 10, milestones=(0.6,))]
)
def test_linear_probe__separates_separable_features(recipe: Recipe, augment: bool) -> None:
    train, test = Blobs(96, seed=1), Blobs(48, seed=2)
    net = network()
    head = linear_classifier(
        net, train, PLAIN, classes=4, protocol=recipe, batch_size=32, augment=augment, log=lambda text: None
    )
    found = features(net, test, range(48), PLAIN)
    got = accuracy(head(found), labels(test, range(48)))
    untrained = accuracy(nn.Linear(16, 4)(found), labels(test, range(48)))
    assert got > max(0.6, untrained + 0.2)
    assert all(p.grad is None for p in net.parameters()), "the backbone is frozen"


PUBLISHED: dict[str, dict[str, Any]] = {  # lr is that of a batch of 256; no milestones: cosine
    # arXiv:2002.05709, appendix B.6: Nesterov momentum .9, .1 · batch / 256 at 4,096, no decay
    "simclr": {
        "optimizer": "sgd", "nesterov": True, "lr": 0.1, "batch": 4096, "epochs": 90, "weight_decay": 0.0,
        "milestones": (),
    },
    # arXiv:1911.05722, section 4.1, and the released main_lincls.py: a tenth at epochs 60 and 80
    "moco": {
        "optimizer": "sgd", "nesterov": False, "lr": 30.0, "batch": 256, "epochs": 100, "weight_decay": 0.0,
        "milestones": (60 / 100, 80 / 100),
    },
    # arXiv:2006.07733, appendix: Nesterov, 80 epochs at 1,024, no decay; its rate is the best of five, .2 one of them
    "byol": {
        "optimizer": "sgd", "nesterov": True, "lr": 0.2, "batch": 1024, "epochs": 80, "weight_decay": 0.0,
        "milestones": (),
    },
    # the released eval_linear.py of arXiv:2006.09882: 8 processes of 32
    "swav": {
        "optimizer": "sgd", "nesterov": False, "lr": 0.3, "batch": 8 * 32, "epochs": 100, "weight_decay": 1e-6,
        "milestones": (),
    },
    # README of facebookresearch/simsiam: LARS at 4,096 (arXiv:2011.10566, appendix A, has .02)
    "simsiam": {
        "optimizer": "lars", "nesterov": False, "lr": 0.1, "batch": 4096, "epochs": 90, "weight_decay": 0.0,
        "milestones": (),
    },
    # arXiv:2103.03230, section 4.1
    "barlow_twins": {
        "optimizer": "sgd", "nesterov": False, "lr": 0.3, "batch": 256, "epochs": 100, "weight_decay": 1e-6,
        "milestones": (),
    },
}  # fmt: skip


def test_protocols__are_the_published_ones() -> None:
    assert {name: recipe._asdict() for name, recipe in PROTOCOLS.items()} == PUBLISHED
    assert PROTOCOL_OF == {name: name for name in PUBLISHED} | {
        "moco_v1": "moco", "moco_v2": "moco", "byol_gn": "byol",
    }  # fmt: skip


def _steps_by_hand(
    x: np.ndarray, y: np.ndarray, start: np.ndarray, rates: list[float], decay: float, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias after steps on one whole batch, in float64; momentum .9 as torch and LARS define it."""
    values = [start, np.zeros(len(start))]
    velocity = [np.zeros_like(value) for value in values]
    for rate in rates:
        logits = x @ values[0].T + values[1]
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(len(start))[y]) / len(x)
        for i, gradient in enumerate((error.T @ x, error.sum(0))):
            g = gradient + decay * values[i]
            size, length = np.linalg.norm(values[i]), np.linalg.norm(g)
            if kind == "lars" and size > 0 and length > 0:
                g = g * 0.001 * size / length
            velocity[i] = 0.9 * velocity[i] + g
            values[i] = values[i] - rate * (g + 0.9 * velocity[i] if kind == "nesterov" else velocity[i])
    return values[0], values[1]


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "lars"])
@pytest.mark.parametrize("batch", [16, 32])
@pytest.mark.parametrize("epochs", [1, 2])
def test_linear_probe__its_steps_are_those_computed_by_hand(kind: str, batch: int, epochs: int) -> None:
    """The rate is the recipe's times batch / 256 and falls by a cosine; momentum is .9; decay is on both tensors."""
    images, net, decay = Blobs(batch, seed=1), network(), 0.3
    recipe = Recipe(
        8.0, 50, weight_decay=decay, optimizer="lars" if kind == "lars" else "sgd", nesterov=kind == "nesterov"
    )
    options: dict[str, Any] = {"classes": 4, "batch_size": batch, "augment": False, "seed": 3}
    head = linear_classifier(net, images, PLAIN, protocol=recipe, epochs=epochs, log=lambda text: None, **options)
    x = features(net, images, range(batch), PLAIN).double().numpy()
    start = 0.01 * torch.randn(4, 16, generator=torch.Generator().manual_seed(3)).double().numpy()
    rates = [8.0 * batch / 256, 8.0 * batch / 256 / 2][:epochs]  # half way through the cosine: half
    weight, bias = _steps_by_hand(x, np.arange(batch) % 4, start, rates, decay, kind)
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-6)


def test_linear_probe__the_rate_of_a_recipe_with_milestones_falls_to_a_tenth() -> None:
    images, net = Blobs(16, seed=1), network()
    head = linear_classifier(
        net, images, PLAIN, classes=4, protocol=Recipe(8.0, 5, milestones=(0.6, 0.8)), augment=False, log=lambda _: None
    )
    x = features(net, images, range(16), PLAIN).double().numpy()
    start = 0.01 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).double().numpy()
    rates = [0.5, 0.5, 0.5, 0.05, 0.005]
    weight, bias = _steps_by_hand(x, np.arange(16) % 4, start, rates, 0.0, "sgd")
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-6)


def test_linear_probe__training_crops_differ_between_epochs_and_repeat_by_seed() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    crops = [random_crop(picture, 16, 0, epoch, 7) for epoch in (0, 1, 0)]
    assert np.array_equal(crops[0], crops[2]) and not np.array_equal(crops[0], crops[1])


def test_online_probe__decodes_once_and_agrees_with_the_whole_measure() -> None:
    train, test, net = Blobs(60, seed=1), Blobs(24, seed=2), network()
    watch = KnnProbe(train, test, PLAIN, seconds=60, bank=60, queries=24, k=5, batch=16)
    first, second = watch(net), watch(net)
    assert sorted(train.seen) == list(range(60)) and sorted(test.seen) == list(range(24))
    assert (first["bank"], first["queries"]) == (60, 24) and first["knn"] == second["knn"]
    scores = knn(
        features(net, test, range(24), PLAIN), features(net, train, range(60), PLAIN),
        labels(train, range(60)), classes=4, k=5,
    )  # fmt: skip
    assert first["knn"] == pytest.approx(accuracy(scores, labels(test, range(24))))


def test_online_probe__out_of_time_is_smaller_and_still_has_both_halves() -> None:
    watch = KnnProbe(Blobs(60, seed=1), Blobs(24, seed=2), PLAIN, seconds=0, bank=60, queries=24, k=5, batch=10)
    found = watch(network())
    assert (found["bank"], found["queries"]) == (10, 4)


def test_probe__an_unreadable_picture_is_replaced_and_reported_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(Blobs):
        def image(self, index: int) -> np.ndarray:
            if index == 2:
                raise BadImageError("broken.png", "is damaged")
            return super().image(index)

    found = KnnProbe(Broken(40, seed=0), Blobs(20, seed=1), PLAIN, seconds=60, k=3)
    for _ in range(2):
        result = found(network())
        assert (result["bank"], result["queries"]) == (40, 20)
    assert capsys.readouterr().err.count("a grey picture stands for broken.png") == 1


def test_probe__pictures_without_labels_are_refused() -> None:
    class Unlabelled(Blobs):
        def label(self, index: int) -> int:
            return -1

    with pytest.raises(UserError, match="labelled pictures"):
        labels(Unlabelled(4, seed=0, side=8), range(4))


def folder_of(root: Path, splits: dict[str, tuple[str, ...]]) -> Path:
    images = Blobs(100, seed=4)
    for split, names in splits.items():
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                cv2.imwrite(str(root / split / name / f"{i}.png"), images.image(number + 4 * i))
    return root


def test_probe__folders_with_other_classes_in_val_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"train": ("a", "b"), "val": ("a", "c")})
    with pytest.raises(UserError, match="different classes, for example 'b'"):
        open_data(str(root), size=None)
    with pytest.raises(UserError, match=r"train.*is not a folder; give sticker_singles"):
        open_data(str(tmp_path / "nowhere"), size=None)


def test_probe__the_command_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path, {"train": ("a", "b"), "val": ("a", "b")})
    net = network()
    monkeypatch.setattr(measures, "open_backbone", lambda run, folder: (net, measures.BackboneOrigin("byol", PLAIN)))
    command = ["--backbone", "x", "--data", str(root), "--size", "8", "--k", "3", "--epochs", "2", "--shots", "1"]
    assert probe.main([*command, "--measures", "knn", "linear", "few", "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["knn"]["k"] == 3 and report["knn"]["temperature"] == 0.1 and report["classes"] == 2
    assert report["linear"]["protocol"] == "swav" and report["few"][0]["shots"] == 1
    assert probe.main([*command, "7", "--measures", "few"]) == 0
    assert "--shots 7: a class has 3 training pictures only" in capsys.readouterr().err
    one = folder_of(tmp_path / "one", {"train": ("a",), "val": ("a",)})
    for more in (["--data", str(one)], ["--limit", "1"]):
        with pytest.raises(UserError, match="training pictures are of one class; a probe needs two"):
            probe.main([*command, *more])


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "x"])
def test_probe__a_temperature_is_above_zero(given: str) -> None:
    with pytest.raises(UserError, match=f"--temperature: '{given}' must be above 0"):
        probe.main(["--backbone", "x", "--temperature", given])


def test_probe__a_size_that_the_backbone_cannot_take_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.config_ssl import BackboneConfig
    from pretrain.nets.backbones import build_backbone

    root = folder_of(tmp_path, {"train": ("a", "b"), "val": ("a", "b")})
    net = build_backbone(BackboneConfig(name="timm:vit_tiny_patch16_224"), sizes=[32])
    origin = measures.BackboneOrigin("byol", PLAIN._replace(size=32))
    monkeypatch.setattr(measures, "open_backbone", lambda run, folder: (net, origin))
    with pytest.raises(UserError, match=r"--size 48: the backbone of x cannot take .* it was trained on 32 pixels"):
        probe.main(["--backbone", "x", "--data", str(root), "--size", "48"])


def test_probe__reads_the_backbone_of_an_unfinished_run_from_its_checkpoint(tmp_path: Path) -> None:
    cfg = PretrainConfig.model_validate(
        {
            "out": tmp_path / "run",
            "method": {
                "name": "byol",
                "backbone": {"name": "resnet18", "stem": "small"},
                "views": [{"size": 16, "count": 2}],
                "hidden": 8,
                "dim": 4,
            },
            "data": {"kind": "folder", "root": tmp_path},
            "loop": {"steps": 2, "batch_size": 4, "workers": 0, "device": "cpu"},
            "optim": {"name": "sgd", "lr": 0.5},
        }
    )
    task = Monitored(build_method(cfg.method, batch_size=4, device=torch.device("cpu")))  # type: ignore[arg-type]
    fit(task, Views((16, 16)), loop=cfg.loop, optim=cfg.optim, out=cfg.out, record=plain(cfg))
    found, origin = measures.open_backbone(cfg.out, None)
    assert origin.method == "byol" and origin.inputs.size == 16 and origin.step == 2
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(found.eval()(pixels), task.backbone.eval()(pixels))
    target = task.task.target_backbone.eval()(pixels)  # type: ignore[operator,union-attr]
    assert not torch.allclose(found(pixels), target, atol=1e-4), "the online network, not its momentum copy"


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_probe__takes_the_image_tower_of_an_encoder(tmp_path: Path, kind: str) -> None:
    vit = ViTTower(kind="vit", patch_size=8, width=32, layers=1, heads=2, image_size=32)
    tower = ResNetTower(image_size=32) if kind == "resnet" else vit
    encoder = build_encoder(EncoderConfig(embed_dim=8, image=tower)).eval()
    encoder.save(tmp_path / "exported")
    for found, origin in (measures.open_backbone(tmp_path, None), measures.open_backbone(None, tmp_path / "exported")):
        assert origin.method == "clip" and origin.inputs.size == 32 and origin.inputs.mean == encoder.image_mean
        pixels = torch.rand(2, 3, 32, 32)
        features = found(pixels)
        assert features.shape == (2, 512 if kind == "resnet" else 8)
        if kind == "resnet":
            features = encoder.visual.proj(features)  # type: ignore[union-attr,operator]
        torch.testing.assert_close(features, encoder.encode_image(pixels))
    texts = build_encoder(EncoderConfig(embed_dim=8, text=CbowTower(width=16, hidden=16))).save(tmp_path / "texts")
    with pytest.raises(UserError, match="texts only"):
        measures.open_backbone(None, texts)


def test_probe__a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported backbone and no checkpoint"):
        measures.open_backbone(tmp_path, None)


def test_features__every_process_gets_those_of_all(tmp_path: Path) -> None:
    """Two processes, each computing half."""
    finish(start_ranks(["-m", "tests.ssl.test_probe", str(tmp_path)], world=2))
    expected = features(network(), Blobs(13, seed=1), range(13), PLAIN)
    for n in range(2):
        found = torch.load(tmp_path / f"{n}.pt", weights_only=True)
        torch.testing.assert_close(found["features"], expected)
        assert found["seen"] == list(range(n, 13, 2)) + ([0] if n else [])


def _one_process(folder: Path) -> None:
    from pretrain.engine import distributed

    distributed.setup()
    images = Blobs(13, seed=1)
    found: Tensor = features(network(), images, range(13), PLAIN)
    torch.save({"features": found, "seen": images.seen}, folder / f"{distributed.rank()}.pt")
    distributed.teardown()


if __name__ == "__main__":
    import sys

    _one_process(Path(sys.argv[1]))
