# SPDX-License-Identifier: Apache-2.0
"""A method and a set of pictures that somebody writes in a file of their own train like ours."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import PretrainConfig, extended
from pretrain.engine.errors import UserError
from pretrain.nets.backbones import load_backbone
from pretrain.train import main
from tests.ssl import extending_images, extending_method
from tests.ssl.extending_images import ArrayData, ArraySet
from tests.ssl.extending_method import VICReg, VICRegMethod


def arguments(folder: Path) -> list[str]:
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), np.uint8))
    method = "{name: vicreg, dim: 8, backbone: {name: resnet18, stem: small}, views: [{size: 16, count: 2}]}"
    (folder / "my.yaml").write_text(
        f"out: {folder / 'run'}\nmethod: {method}\ndata: {{kind: array, path: {folder / 'pictures.npy'}}}\n"
        "loop: {steps: 4, batch_size: 8, workers: 0, device: cpu, log_every: 1, save_every: 2}\n"
        "optim: {name: sgd, lr: 0.05}\n"
    )
    return ["--config", str(folder / "my.yaml")]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_extending__an_own_method_and_pictures_train_resume_and_export(tmp_path: Path) -> None:
    argv = arguments(tmp_path)
    more = {"methods": {VICRegMethod: VICReg}, "data": {ArrayData: ArraySet}}
    assert main(argv, **more) == 0  # type: ignore[arg-type]
    whole = losses(tmp_path / "run")
    shutil.rmtree(next((tmp_path / "run/checkpoints").glob("step_*4")))
    assert main([*argv, "--resume"], **more) == 0  # type: ignore[arg-type]
    assert losses(tmp_path / "run") == whole and list(whole) == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "invariance", "health/rank", "health/on_diagonal"} <= set(line) for line in lines)
    backbone, info = load_backbone(tmp_path / "run/exported")
    assert info["method"] == "vicreg" and sum(p.numel() for p in backbone.parameters()) > 10**7


def test_extending__the_shipped_commands_do_not_know_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.name.*vicreg"):
        main(arguments(tmp_path))
    assert extended() is PretrainConfig


@pytest.mark.parametrize("module", [extending_method, extending_images])
def test_extending__an_example_has_at_most_forty_lines_of_code(module: object) -> None:
    lines = inspect.getsource(module).splitlines()  # type: ignore[arg-type]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 40
