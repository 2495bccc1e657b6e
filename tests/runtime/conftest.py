# SPDX-License-Identifier: Apache-2.0
"""The shipped default detector in both runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ovd.detector import Detector
from ovd.export import export
from ovd.inference.fvlm_regions import FvlmRegionModel
from ovd.inference.fvlm_torch import TorchNetwork

PHOTOS = sorted((Path(__file__).resolve().parents[2] / "ovd/demo/examples/photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the shipped default."""
    return export("default", tmp_path_factory.mktemp("export") / "vild-photo")


@pytest.fixture(scope="session")
def by_onnx(exported: Path) -> Detector:
    return Detector.load(exported, runtime="onnx")


@pytest.fixture(scope="session")
def by_torch() -> Detector:
    """In single precision, as the graphs compute: bfloat16, torch's default here, moves boxes by itself."""
    detector = Detector.load("default", runtime="torch", device="cpu")
    assert isinstance(detector.model, FvlmRegionModel) and isinstance(detector.model.network, TorchNetwork)
    network = detector.model.network.model
    network.tower.float().precision = torch.float32
    network.proposer.model.float()
    return detector
