# SPDX-License-Identifier: Apache-2.0
"""An encoder's projection ensembled with ImageNet's classifier (ConSE)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovd import train as ovd_train
from ovd.detector import Detector
from ovd.modeling.fvlm.tower import FrozenTower
from ovd.runtime.export import export_onnx
from pretrain import train
from pretrain.config import CbowTower, EncoderConfig
from pretrain.config_photos import ConseShare, TimmTower
from pretrain.engine.errors import UserError
from pretrain.nets import imagenet
from pretrain.nets.encoders import load_encoder
from pretrain.nets.timm_tower import ConseProjection, TimmImage, conse_embedding
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
    monkeypatch.setattr(imagenet, "package_file", lambda package: tmp_path / "net.pth")
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
