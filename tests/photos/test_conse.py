# SPDX-License-Identifier: Apache-2.0
"""ImageNet's classifier (ConSE), ensembled with an encoder's projection and with a detector's image embedding."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovd import train as ovd_train
from ovd.config_fvlm import ConseConfig
from ovd.detector import Detector
from ovd.inference.encoder import load_encoder_of
from ovd.inference.scoring import Deferred, RegionSet
from ovd.modeling.export import read_card
from ovd.modeling.fvlm.conse import RegionConse
from ovd.modeling.fvlm.network import load_fvlm
from ovd.modeling.fvlm.tower import FrozenTower
from ovd.runtime.export import export_onnx
from ovd.runtime.files import sources_of
from ovd.weights import read_model_card
from pretrain import train
from pretrain.config import CbowTower, EncoderConfig
from pretrain.config_photos import ConseShare, TimmTower
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.nets import imagenet
from pretrain.nets.batch_norm import fold_batch_norms
from pretrain.nets.conse import ConseProjection, conse_embedding
from pretrain.nets.encoders import load_encoder
from pretrain.nets.timm_tower import TimmImage
from pretrain.nets.towers import JointEncoder, build_encoder
from tests.photos.conftest import arguments
from tests.photos.test_lite_clip import NAME, network, packaged
from tests.photos.test_photo_words import folder

__all__ = ["folder", "network"]


def small_encoder(conse: ConseShare | None) -> JointEncoder:
    torch.manual_seed(0)
    image = TimmTower(kind="timm", name=NAME, image_size=64, conse=conse)
    return build_encoder(EncoderConfig(embed_dim=16, image=image, text=CbowTower(width=16, hidden=16))).eval()


def fill_classifier(projection: ConseProjection) -> None:
    """A random classifier, and random words of its classes."""
    nn.init.normal_(projection.classifier.weight)
    projection.words_KD.copy_(F.normalize(torch.randn(projection.words_KD.shape), dim=1))


def ensemble_encoder() -> tuple[JointEncoder, ConseProjection]:
    encoder = small_encoder(ConseShare(share=0.5, classes=10, top=3))
    projection = cast(ConseProjection, cast(TimmImage, encoder.visual).proj)
    fill_classifier(projection)
    return encoder, projection


def test_conse__embedding_is_a_mean_of_the_top_classes_words() -> None:
    words = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    logits = torch.tensor([[math.log(4), math.log(3), math.log(1)]])
    torch.testing.assert_close(conse_embedding(logits, words, top=2), torch.tensor([[0.8, 0.6]]))
    torch.testing.assert_close(conse_embedding(logits, words, top=1), words[:1])
    both = torch.tensor([[4.0 - 1, 3]]) / math.hypot(3, 3)
    torch.testing.assert_close(conse_embedding(logits, words, top=9), both)


def test_conse__ensemble_is_a_weighted_mean_of_unit_vectors() -> None:
    torch.manual_seed(0)
    projection = ConseProjection(nn.Linear(5, 4), conse=ConseShare(share=0.25, top=2, classes=3))
    fill_classifier(projection)
    features = torch.randn(2, 5)
    learned = F.normalize(features @ projection.learned.weight.T + projection.learned.bias, dim=1)
    conse = conse_embedding(features @ projection.classifier.weight.T, projection.words_KD, top=2)
    torch.testing.assert_close(projection(features), 0.75 * learned + 0.25 * conse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(projection(features), 0.75 * learned + 0.25 * conse)


def test_conse__off_keeps_fingerprint_and_initial_weights() -> None:
    plain, ensemble = small_encoder(None), small_encoder(ConseShare())
    assert "conse" not in str(plain.config)
    visual, both = cast(TimmImage, plain.visual), cast(TimmImage, ensemble.visual)
    assert torch.equal(visual.learned.weight, both.learned.weight)
    text = plain.text, ensemble.text
    assert all(torch.equal(a, b) for a, b in zip(*(cast(nn.Module, t).parameters() for t in text), strict=True))


def test_conse__detector_uses_the_ensemble() -> None:
    encoder, projection = ensemble_encoder()
    tower = FrozenTower(encoder, side=64, pool=1, context=1.5, precision=torch.float32)
    pooled = torch.randn(3, tower.features)
    last = pooled[:, -2 * tower.width : -tower.width]
    torch.testing.assert_close(tower.embed(pooled), F.normalize(projection(last), dim=1))


def test_conse__onnx_export_has_the_ensemble(trained: Path, tmp_path: Path) -> None:
    encoder, _ = ensemble_encoder()
    encoder.save(tmp_path / "encoder")
    for name in ("images", "boxes.json", "labels.json", "proposals"):
        (tmp_path / name).symlink_to(trained / name)
    assert ovd_train.main(arguments(tmp_path)) == 0
    export_onnx(tmp_path / "run/exported", load_encoder(tmp_path / "encoder"), tmp_path / "onnx")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    folders = {"torch": tmp_path / "run/exported", "onnx": tmp_path / "onnx"}
    by_torch, by_onnx = (Detector.load(f, runtime=name).model.regions(image) for name, f in folders.items())
    assert by_torch.image is not None and by_onnx.image is not None
    assert (by_torch.image * by_onnx.image).sum(axis=1).min() > 0.99  # torch computes in bfloat16


def command(folder: Path, root: Path, *more: str) -> list[str]:
    return [
        "--config", "photos/lite_ovcoco_clip.yaml", f"out={root / 'run'}", f"data.images={folder / 'images'}",
        f"data.labels={folder / 'labels.json'}", f"data.annotations=[{folder / 'pseudo.json.gz'}]", "data.novel=[dog]",
        f"method.encoder.image.name={NAME}", "method.encoder.image.image_size=64", "method.encoder.embed_dim=16",
        f"method.text_weights={root / 'text'}", "loop.steps=2", "loop.batch_size=4", "loop.workers=0",
        "loop.precision=fp32", "optim.warmup_steps=1", *more,
    ]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(packaged(network), tmp_path / "net.pth")
    monkeypatch.setattr(imagenet, "package_file", lambda package, key: tmp_path / "net.pth")
    small_encoder(None).save(tmp_path / "whole")
    build_encoder(EncoderConfig(embed_dim=16, text=CbowTower(width=16, hidden=16))).save(tmp_path / "text")
    return tmp_path


def test_conse__training_changes_the_projection_only(folder: Path, root: Path, network: nn.Module) -> None:
    projections = []
    for number, conse in enumerate(("null", "{share: 0.4}")):
        assert train.main(command(folder, root, f"out={root}/{number}", f"method.encoder.image.conse={conse}")) == 0
        projections.append(cast(TimmImage, load_encoder(root / f"{number}/exported").visual))
    plain, ensemble = projections
    assert torch.equal(plain.learned.weight, ensemble.learned.weight)  # the same training, to the bit
    assert isinstance(ensemble.proj, ConseProjection)
    start = imagenet.convert(packaged(network), network, source="package")
    torch.testing.assert_close(ensemble.proj.classifier.weight, start["classifier.weight"])
    torch.testing.assert_close(ensemble.proj.words_KD.norm(dim=1), torch.ones(1000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("method.start.frozen_stages=5", "frozen_stages=99"),
        ("method.words.conse=0", "words.conse above 0"),
        ("method.words=null", "encoder.image.conse needs words"),
        ("method.encoder.image.conse.classes=900", "the network has 1000"),
        ("method.encoder.image.conse={top: 30, classes: 20}", "more than the 20 classes"),
    ],
)
def test_conse__network_must_have_imagenets_classes(folder: Path, root: Path, change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        train.main(command(folder, root, change))


def test_region_conse__pools_logits_by_area() -> None:
    """Against every pixel of the box counted one by one, in a map enlarged to the picture."""
    torch.manual_seed(0)
    conse = RegionConse(ConseConfig(name=NAME, side=96), embed_dim=4)
    conse.words_KD.copy_(F.normalize(torch.randn(conse.words_KD.shape), dim=1))
    pixels = torch.randn(1, 3, 64, 96)
    boxes = torch.tensor([[0.0, 0, 96, 64], [10, 5, 40, 60], [64, 32, 96, 64], [33, 33, 34, 34]])
    enlarged = conse.trunk(pixels)[0].repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)
    for row, box in zip(conse(pixels, boxes), boxes.int().tolist(), strict=True):
        features = enlarged[:, box[1] : box[3], box[0] : box[2]].mean((1, 2))
        torch.testing.assert_close(row, conse.classifier(features).softmax(0) @ conse.words_KD, rtol=1e-4, atol=1e-5)


def test_batch_norms__folded_are_the_same_function(network: nn.Module) -> None:
    network = copy.deepcopy(network).eval()
    for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
        for values, low in ((norm.running_mean, -0.1), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.1)):
            assert values is not None
            nn.init.uniform_(values, low, low + 0.5)
    pixels = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(pixels)
        fold_batch_norms(network)
        torch.testing.assert_close(network(pixels), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_batch_norms__without_a_convolution_before_are_refused() -> None:
    parts = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="2: a batch norm that does not follow a convolution"):
        fold_batch_norms(parts.eval())


def test_folded__tower_and_conse_give_the_same_regions(trained: Path) -> None:
    folder = trained / "run/exported"
    card = read_card(folder)
    encoder, picture = load_encoder_of(folder, card), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 64.0, 48.0]])
    plain, folded = (load_fvlm(folder, card, encoder, precision=torch.float32, fold=fold)[0] for fold in (False, True))
    torch.testing.assert_close(folded.tower.pooled(picture, boxes), plain.tower.pooled(picture, boxes))
    assert any(isinstance(part, nn.BatchNorm2d) for part in plain.tower.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.tower.modules())


def test_open_embedding__follows_a_certain_classifier_only() -> None:
    image = np.eye(3, dtype=np.float32)[:2]
    certain, unsure = np.array([0, 0, 1.0], np.float32), np.zeros(3, np.float32)
    regions = region_set(image, conse=Deferred(lambda: np.stack([certain, unsure])))
    np.testing.assert_allclose(regions.open_embedding(0.5)[0], np.array([1, 0, 1]) / math.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(regions.open_embedding(0.5)[1], image[1])
    np.testing.assert_array_equal(regions.open_embedding(0), image)
    np.testing.assert_array_equal(region_set(image, conse=None).open_embedding(0.5), image)


def region_set(image: np.ndarray, *, conse: Deferred | None) -> RegionSet:
    boxes = np.array([[0, 0, 8, 8]] * len(image), np.float32)
    return RegionSet(
        boxes=boxes, objectness=np.ones(len(image)), text=image, image=image, masks=None, size=(8, 8), conse=conse
    )


def test_deferred__is_computed_once() -> None:
    calls = []
    deferred = Deferred(lambda: np.array(calls.append(1)))
    assert not calls
    assert deferred() is deferred() and len(calls) == 1


def test_deferred__copies_hold_the_array() -> None:
    regions = region_set(np.eye(2, dtype=np.float32), conse=Deferred(lambda: np.eye(2, dtype=np.float32)))
    copied = copy.deepcopy(regions).conse
    assert copied is not None
    np.testing.assert_array_equal(copied(), np.eye(2))


def test_regions__some_of_them_keep_what_is_theirs() -> None:
    count, rng = 4, np.random.default_rng(0)
    columns = {
        "boxes": 4,
        "text": 3,
        "image": 3,
        "word_scores": 2,
        "finetuned": 2,
        "objectness": 0,
        "bias": 0,
        "quality": 0,
    }
    arrays = {name: rng.random((count, width) if width else count) for name, width in columns.items()}
    conse = rng.random((count, 3))
    regions = RegionSet(**arrays, masks=rng.random((count, 5, 5)), size=(8, 8), conse=Deferred(lambda: conse))
    for index in (np.array([True, False, True, True]), np.array([2, 0])):
        some = regions.at(index)
        for name, values in (*arrays.items(), ("masks", regions.masks)):
            np.testing.assert_array_equal(getattr(some, name), values[index], err_msg=name)
        assert some.conse is not None
        np.testing.assert_array_equal(some.conse(), conse[index])


@pytest.fixture
def with_conse(trained: Path, tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The detector of a training with ``model.conse``."""
    torch.save(packaged(network), tmp_path / "net.pth")
    monkeypatch.setattr(imagenet, "package_file", lambda package, key: tmp_path / "net.pth")
    for name in ("encoder", "images", "boxes.json", "labels.json", "proposals"):
        (tmp_path / name).symlink_to(trained / name)
    assert ovd_train.main([*arguments(tmp_path), f"model.conse={{name: {NAME}, side: 64}}"]) == 0
    return tmp_path / "run/exported"


def test_region_conse__same_in_both_runtimes(with_conse: Path, trained: Path, tmp_path: Path) -> None:
    export_onnx(with_conse, load_encoder(trained / "encoder"), tmp_path / "onnx")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    by_torch, by_onnx = (
        Detector.load(folder, runtime=runtime).model.regions(image)
        for folder, runtime in ((with_conse, "torch"), (tmp_path / "onnx", "onnx"))
    )
    assert by_torch.conse is not None and by_onnx.conse is not None
    rows, others = by_torch.conse(), by_onnx.conse()
    assert rows.shape == others.shape == (len(by_torch), 16) and np.linalg.norm(rows, axis=1).max() > 0
    np.testing.assert_allclose(rows, others, atol=0.02)  # torch computes in bfloat16


def test_region_conse__runs_for_words_that_the_proposal_network_does_not_know(
    with_conse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    embed = RegionConse.embed
    monkeypatch.setattr(RegionConse, "embed", lambda *arguments: calls.append(1) or embed(*arguments))
    detector = Detector.load(with_conse, runtime="torch")
    image = np.zeros((48, 64, 3), np.uint8)
    detector.find(image, ["dog", "animal"], threshold=0)
    assert not calls
    detector.find(image, ["dog", "saxophone"], threshold=0)
    detector.find(image, ["lamp"], threshold=0)
    assert len(calls) == 1


@pytest.mark.parametrize("longest", [64, 200])
def test_region_conse__keeps_a_small_copy_of_the_picture(with_conse: Path, longest: int) -> None:
    """Who draws on a picture after it was searched gets the same answers, and a large one is not kept."""
    model = Detector.load(with_conse, runtime="torch").model
    image = np.random.default_rng(0).integers(0, 256, (48, longest, 3), dtype=np.uint8)
    before = model.regions(image.copy()).conse
    after = model.regions(image).conse
    image[:] = 0
    assert before is not None and after is not None
    np.testing.assert_array_equal(before(), after())


def test_region_conse__is_stored_unrounded(with_conse: Path, network: nn.Module) -> None:
    """In half precision, that is: not by way of bfloat16."""
    stored, _ = load_weights(with_conse / "conse.safetensors")
    start = imagenet.convert(packaged(network), network, source="package")
    assert torch.equal(stored["trunk.0.weight"], start["conv_stem.weight"].half())


def test_region_conse__missing_file_is_named(with_conse: Path) -> None:
    (with_conse / "conse.safetensors").unlink()
    with pytest.raises(UserError, match=r"conse\.safetensors: no such weight file; fetch or export it again"):
        Detector.load(with_conse, runtime="torch")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.conse={package: no-such-network}", r"model\.conse\.package: no-such-network is not installed"),
        ("model.conse={name: resnet18, side: 64}", "EfficientNet family"),
        ("model.conse={name: no_such_net}", "timm has no model"),
    ],
)
def test_region_conse__wrong_network_is_named(trained: Path, tmp_path: Path, change: str, says: str) -> None:
    command = [*arguments(trained), f"out={tmp_path}/run", change]
    with pytest.raises(UserError, match=says):
        ovd_train.main(command)


def test_region_conse__needs_known_words(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="conse scores words that the proposal network does not know"):
        ovd_train.main([*arguments(trained), f"out={tmp_path}/run", "model.conse={}", "model.known=false"])


@pytest.mark.parametrize("file", ["conse.safetensors", "proposals/model.safetensors", "proposals/model.json"])
def test_settings__cover_every_file_of_a_detector(with_conse: Path, file: str) -> None:
    """What `predict` and Label Studio's backend keep is of these weights only, and so is an export beside them."""
    before, sources = read_model_card(with_conse), sources_of(with_conse, ())
    with open(with_conse / file, "ab") as stream:
        stream.write(b" ")
    after = read_model_card(with_conse)
    assert before["sha256"] == after["sha256"] and before["settings"] != after["settings"]
    assert sources != sources_of(with_conse, ())
