# SPDX-License-Identifier: Apache-2.0
"""Localisation quality: what it learns, how it ranks words, and its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from ovd import train as ovd_train
from ovd.config_fvlm import QualityConfig
from ovd.data.photo_words import localization_quality
from ovd.data.pooled import BoxBatch, RegionBatch
from ovd.detector import Detector
from ovd.modeling.fvlm.criterion import WordCriterion
from ovd.modeling.fvlm.head import FrozenFeatureHead
from ovd.modeling.fvlm.network import FvlmDetector
from ovd.modeling.fvlm.quality import LocalizationQuality, geometry
from ovd.modeling.fvlm.tower import FrozenTower
from ovd.modeling.proposals.build import PhotoProposer
from ovd.runtime.export import export_onnx
from ovd.runtime.files import sources_of
from ovd.weights import read_model_card
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.nets.encoders import load_encoder
from tests.photos.conftest import arguments
from tests.photos.test_fvlm import BOXES, TABLE, photo


def test_geometry__is_relative_to_the_picture() -> None:
    boxes = torch.tensor([[0.0, 10, 50, 60], [20, 0, 100, 200]])
    rows = geometry(boxes, torch.tensor([200.0, 100.0]))
    expected = [
        [math.log(0.5), math.log(0.25), 0, 1, 0, 0, 0],
        [math.log(0.8), 0, math.log(0.4), 0, 1, 1, 1],
    ]
    torch.testing.assert_close(rows, torch.tensor(expected))
    torch.testing.assert_close(geometry(3 * boxes, torch.tensor([600.0, 300.0])), rows)
    sizes = torch.tensor([[200.0, 100.0], [400.0, 200.0]])
    torch.testing.assert_close(geometry(boxes * torch.tensor([[1.0], [2.0]]), sizes), rows)


def test_localization_quality__is_the_iou_with_a_confident_label_of_any_word() -> None:
    labelled = photo([0, 1], [0.8, 0.29])
    labels = torch.from_numpy(labelled.boxes)
    expected = [float(_iou(box, labels[0])) for box in torch.from_numpy(BOXES)]
    assert localization_quality(labelled, BOXES, TABLE).tolist() == pytest.approx(expected, abs=1e-6)
    assert not localization_quality(photo([], []), BOXES, TABLE).any()
    assert localization_quality(labelled, BOXES[:0], TABLE).shape == (0,)
    # A photo of one thing: its largest proposal.
    assert localization_quality(photo([], [], noun=4), BOXES, TABLE)[3] == pytest.approx(1)


def _iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    inside = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside)


def criterion_of(quality: LocalizationQuality) -> WordCriterion:
    head = FrozenFeatureHead(features=6, words=0, hidden=16, embed_dim=4, dropout=0.0, scale=5.0)
    model = FvlmDetector(
        proposer=cast(PhotoProposer, None), tower=cast(FrozenTower, None), head=head, reads_words=False, quality=quality
    )
    return WordCriterion(model=model, rows=torch.eye(3, 4), always_labelled=3, noun_weight=1.0).eval()


def batch_of(features: torch.Tensor, quality: list[float]) -> RegionBatch:
    count = len(features)
    boxes = BoxBatch(
        boxes=torch.tensor([[0.0, 0, 8, 8]]).expand(count, 4),
        sizes=torch.tensor([[16.0, 16.0]]).expand(count, 2),
        quality=torch.tensor(quality),
    )
    none = torch.zeros(count, 3)
    return RegionBatch(features=features, word_scores=torch.zeros(count, 0), target=none, mask=none.bool(), boxes=boxes)


def test_quality_loss__is_of_overlapping_boxes_alone() -> None:
    """OLN: what no label overlaps is no background."""
    torch.manual_seed(0)
    quality = LocalizationQuality(maps=4, config=QualityConfig(hidden=8, dropout=0))
    criterion = criterion_of(quality)
    features = torch.randn(4, 6, requires_grad=True)
    batch = batch_of(features, [0.9, 0.1, 0.5, 0.0])
    loss = criterion(batch)["loss_quality"]
    assert batch.boxes is not None
    logits = quality(features, geometry(batch.boxes.boxes, batch.boxes.sizes)).tolist()
    pairs = zip(logits, (0.9, 0.1, 0.5, 0.0), strict=True)
    expected = [t * math.log1p(math.exp(-z)) + (1 - t) * math.log1p(math.exp(z)) for z, t in pairs]
    assert float(loss.detach()) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)
    loss.backward()
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == [True, False, True, False]
    assert not features.grad[:, 4:].any()  # the last map names a region


def test_quality_loss__is_zero_without_any_label() -> None:
    quality = LocalizationQuality(maps=4, config=QualityConfig(hidden=8, dropout=0))
    loss = criterion_of(quality)(batch_of(torch.randn(2, 6), [0.0, 0.1]))["loss_quality"]
    assert float(loss.detach()) == 0


@pytest.fixture(scope="module")
def with_quality(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector of a training with ``model.quality``."""
    root = tmp_path_factory.mktemp("quality")
    for name in ("encoder", "images", "boxes.json", "labels.json", "proposals"):
        (root / name).symlink_to(trained / name)
    assert ovd_train.main([*arguments(root), "model.quality={hidden: 8}"]) == 0
    return root / "run/exported"


def test_quality__is_a_file_of_its_own_and_the_heads_stay_the_same(with_quality: Path, trained: Path) -> None:
    stored, _ = load_weights(with_quality / "quality.safetensors")
    assert {name.split(".")[0] for name in stored} == {"norm", "layers"}
    heads, before = (
        load_weights(folder / "model.safetensors")[0] for folder in (with_quality, trained / "run/exported")
    )
    assert heads.keys() == before.keys()


def test_quality__same_in_both_runtimes(with_quality: Path, trained: Path, tmp_path: Path) -> None:
    export_onnx(with_quality, load_encoder(trained / "encoder"), tmp_path / "onnx")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    by_torch, by_onnx = (
        Detector.load(folder, runtime=runtime).model.regions(image).quality
        for folder, runtime in ((with_quality, "torch"), (tmp_path / "onnx", "onnx"))
    )
    assert by_torch is not None and by_onnx is not None
    assert by_torch.std() > 0
    np.testing.assert_allclose(by_torch, by_onnx, atol=0.02)  # torch computes in bfloat16


def test_quality__ranks_words_that_the_proposal_network_does_not_know(with_quality: Path) -> None:
    detector = Detector.load(with_quality, runtime="torch")
    assert detector.model.calibration.open_quality > 0
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    regions = detector.embed(image)
    before = regions.scores(detector.query(["dog", "saxophone"])).score_RC
    assert regions.regions.quality is not None
    regions.regions.quality[0] = 0
    after = regions.scores(detector.query(["dog", "saxophone"])).score_RC
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_array_equal(after[1:], before[1:])
    assert after[0, 1] < before[0, 1]


def test_quality__missing_file_is_named(with_quality: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in with_quality.iterdir():
        if file.name != "quality.safetensors":
            (copied / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"quality\.safetensors: no such weight file; fetch or export it again"):
        Detector.load(copied, runtime="torch")


def test_quality__needs_known_words(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quality scores words that the proposal network does not know"):
        ovd_train.main([*arguments(trained), f"out={tmp_path}/run", "model.quality={}", "model.known=false"])


def test_settings__cover_the_quality_of_a_detector(with_quality: Path) -> None:
    """What `predict` keeps is of these weights only, and so is an export beside them."""
    before, sources = read_model_card(with_quality), sources_of(with_quality, ())
    content = (with_quality / "quality.safetensors").read_bytes()
    try:
        (with_quality / "quality.safetensors").write_bytes(content + b" ")
        assert read_model_card(with_quality)["settings"] != before["settings"]
        assert sources_of(with_quality, ()) != sources
    finally:
        (with_quality / "quality.safetensors").write_bytes(content)
