# SPDX-License-Identifier: Apache-2.0
"""Prediction and embedding on a Ray cluster: the worker without Ray, both commands with it where it is installed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd import scale
from ovd.detector import Detector
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture

REPOSITORY = Path(__file__).resolve().parents[2]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_worker__gives_a_row_per_detection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = make_detector()
    monkeypatch.setattr(Detector, "load", lambda weights, **options: detector)
    worker = scale.PredictPictures(weights="x", classes="red, blue", masks=True)
    pixels = picture()
    batch: dict[str, Any] = {"path": ["a.png", "b.txt"], "bytes": [png(pixels), b"no picture"]}
    rows = worker(batch)
    expected = detector.embed(pixels).classify(worker.query, threshold=worker.threshold)
    assert tuple(rows) == scale.COLUMNS and len(expected) > 0
    assert rows["path"] == ["a.png"] * len(expected) + ["b.txt"]
    assert rows["class_name"][:-1] == list(expected.class_name) and rows["class_name"][-1] == ""
    assert rows["score"][:-1] == pytest.approx(list(expected.confidence))
    assert rows["x"][:-1] == pytest.approx([box[0] for box in expected.xyxy])
    assert rows["width"][:-1] == pytest.approx([box[2] - box[0] for box in expected.xyxy])
    assert all(rows["mask"][:-1]) and rows["error"][-1] != "" and not any(rows["error"][:-1])


def test_ray__missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'wordbox\[scale\]'; on one machine use ovd\.predict"):
        scale.main(["predict", str(tmp_path), "--classes", "dog", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("arguments", [["predict", ".", "--workers", "0"], ["predict", ".", "--nonsense"]])
def test_scale__wrong_arguments_are_explained(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"--workers must be at least 1|unknown argument '--nonsense'"):
        scale.main([*arguments, "--classes", "dog", "--out", "out"])


@pytest.fixture
def cluster() -> Any:
    ray = pytest.importorskip("ray", reason="pip install 'wordbox[scale]'")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray__equals_one_machine(cluster: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    from ovd.embed import EmbedConfig
    from ovd.embed import run as embed_here
    from ovd.regions.store import RegionStore
    from pretrain.engine.config import load_config

    examples = REPOSITORY / "ovd" / "demo" / "examples" / "photos"
    files = sorted(examples.glob("*.jpg"))[:2]
    words = "dog, cat, cup, car, tree"
    scale.main(
        ["predict", *map(str, files), "--classes", words, "--out", str(tmp_path / "found"), "--threshold", "0.01",
         "--workers", "2"]  # as many as CPUs: something must be left to read the files with
    )  # fmt: skip
    table = pyarrow.parquet.read_table(tmp_path / "found").to_pylist()
    worker = scale.PredictPictures(weights="default", classes=words, threshold=0.01, device="cpu")
    for file in files:
        here = worker({"path": [file.name], "bytes": [file.read_bytes()]})
        there = [row for row in table if row["path"].endswith(file.name)]
        assert sorted(row["class_name"] for row in there) == sorted(here["class_name"])
        assert sorted(row["score"] for row in there) == pytest.approx(sorted(here["score"]), rel=1e-4)

    settings = ["proposer=ground-truth", "pictures={kind: stickers, length: 4, size: 96}", "proposals_per_image=4",
                "images_per_shard=1", "threads=1"]  # fmt: skip
    scale.main(["embed", "--workers", "2", f"out={tmp_path / 'shared'}", *settings])
    embed_here(load_config(EmbedConfig, None, [f"out={tmp_path / 'alone'}", *settings]))
    stores = [RegionStore.open(tmp_path / name) for name in ("shared", "alone")]
    for image_id in stores[1]:
        for there, here in zip(*(store[image_id] for store in stores), strict=True):
            np.testing.assert_allclose(there.numpy(), here.numpy(), atol=2e-3)
