# SPDX-License-Identifier: Apache-2.0
"""The experiment on what UP-DETR's pretraining is worth: its measure, what it holds out, and that it goes on."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from ovd.config_detr import DetrTrainConfig
from ovd.data.samples import PictureSample
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.structures import QueryOutputs
from pretrain.engine.config import load_config
from tests.updetr.small import picture

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
BOXES, LABELS = [[8.0, 8.0, 40.0, 40.0], [50.0, 20.0, 90.0, 60.0]], [0, 2]


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module("updetr")


class Detects(nn.Module):
    """A transformer that predicts the boxes of `picture` exactly, and takes them for the classes given."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        self.classifier = EmbeddingClassifier(rows=torch.eye(4), trainable=torch.tensor([True, True, True, False]))
        self.classes = classes

    def memory(self, batch: list[PictureSample]) -> int:
        return len(batch)

    def predict(self, memory: int) -> QueryOutputs:
        corners = torch.tensor([BOXES] * memory) / torch.tensor([96.0, 64.0, 96.0, 64.0])
        boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], dim=-1)
        embeddings = torch.eye(4)[self.classes].expand(memory, -1, -1)
        return QueryOutputs(boxes, torch.full(boxes.shape[:2], 4.0), embeddings, None, [(64, 96)] * memory)


@pytest.mark.parametrize(("classes", "right"), [(LABELS, True), ([0, 1], False), ([2, 0], False)])
def test_class_agnostic_ap__forgives_a_wrong_name(claim: ModuleType, classes: list[int], right: bool) -> None:
    batch = [{**picture(64, 96, BOXES, LABELS), "size": (64, 96)}]
    found = claim.average_precision(Detects(classes), [batch, batch])
    assert found["ap50_any_class"] == pytest.approx(1.0)
    assert (found["ap50"] == pytest.approx(1.0)) == right


def test_steps_to_a_value__are_the_first_that_reach_it(claim: ModuleType) -> None:
    curve = [{"step": 100, "ap50": 0.1}, {"step": 200, "ap50": 0.3}, {"step": 300, "ap50": 0.2}]
    assert [claim.steps_to(curve, value, "ap50") for value in (0.05, 0.2, 0.4)] == [100, 200, None]


def test_photos__last_fifth_is_held_out(claim: ModuleType, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in range(10)]
    boxes = [{"id": i + 1, "image_id": i, "category_id": 3, "bbox": [1, 1, 5, 5], "area": 25} for i in range(10)]
    for image in images:
        (tmp_path / str(image["file_name"])).touch()
    file = tmp_path / "gt.json"
    file.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "cell"}]}), "utf-8"
    )
    given = ["data.kind=coco", f"data.images={tmp_path}", f"data.annotations={file}", "data.split=all"]
    config = load_config(DetrTrainConfig, "detr.yaml", [*given, "data.labels=all"])
    assert claim.pictures_of(config, argparse.Namespace(coco=[str(tmp_path), str(file)])) == (8, [8, 9])
    assert claim.pictures_of(config, argparse.Namespace(coco=None, pictures=50)) == (50, [])


def test_claim__a_finished_training_is_not_repeated(claim: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "random_0.1_0.json").write_text('{"curve": [{"step": 1}]}', "utf-8")
    assert claim.fine_tune("random", None, 0.1, 0, SimpleNamespace(out=tmp_path)) == {"curve": [{"step": 1}]}
