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
from ovd.modeling.fvlm.network import load_fvlm
from ovd.weights import detector_folder
from pretrain.nets.towers import JointEncoder

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
    model, encoder = detector.model, detector.text.encoder
    assert isinstance(model, FvlmRegionModel) and isinstance(encoder, JointEncoder)
    exact, _ = load_fvlm(detector_folder("default"), model.card, encoder, precision=torch.float32)
    model.network = TorchNetwork(exact)
    return detector
