# SPDX-License-Identifier: Apache-2.0
"""Two processes train the transformer, pretext and labels, as one does on the same global batches; and resume exactly.

``python -m tests.updetr.test_processes both FOLDER`` is the body of one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ovd.modeling.detr.task import DetrTask
from ovd.modeling.detr.updetr import PatchPretext
from pretrain.engine import distributed
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.config import LoopConfig, OptimConfig
from pretrain.engine.loop import fit
from tests.engine.processes import launch
from tests.updetr.small import make, patch_batch, picture, region_tower
from tests.updetr.test_train import Samples

KINDS = ("pretext", "labels")
STEPS = 4


def make_task(kind: str) -> DetrTask:
    """What draws random numbers of its own (masked queries, noise) is off: it differs from process to process."""
    if kind == "pretext":
        model = make("conditional", variant="agnostic", denoising=1, box_noise=0.0, label_noise=0.0)
        return PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0]), mask_queries=0.0)
    quiet: dict[str, Any] = {"denoising": 1, "box_noise": 0.0, "label_noise": 0.0}
    model = make("conditional", variant="text", region_tower=region_tower(), **quiet)
    return DetrTask(model=model, pretrained_lr_scale=1.0)


def source(kind: str) -> Samples:
    """Pictures with one to three things, so that the processes have different numbers of them."""
    if kind == "pretext":
        return Samples(patch_batch(8, 3))
    boxes = [[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0], [1.0, 40.0, 20.0, 60.0]]
    return Samples([picture(64, 64, boxes[: 1 + n % 3], [n % 5, 1, 2][: 1 + n % 3], seed=n) for n in range(8)])


def train(kind: str, out: Path, *, steps: int = STEPS, resume: bool = False) -> None:
    torch.set_num_threads(1)
    fit(
        make_task(kind),
        source(kind),
        loop=LoopConfig(steps=steps, batch_size=4, workers=0, device="cpu", log_every=1, save_every=100, clip_norm=0.1),
        optim=OptimConfig(name="sgd", lr=0.05, schedule="constant"),
        out=out,
        record={},
        resume=resume,
    )


def both(folder: Path) -> None:
    """The body of each of two processes: both trainings in one piece and in two."""
    for kind in KINDS:
        train(kind, folder / f"{kind}_2")
        train(kind, folder / f"{kind}_2_parts", steps=2)
        train(kind, folder / f"{kind}_2_parts", resume=True)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes__train_the_transformer_of_one(tmp_path: Path) -> None:
    for kind in KINDS:
        train(kind, tmp_path / f"{kind}_1")
    launch("both", tmp_path, world=2, module="tests.updetr.test_processes")
    for kind in KINDS:
        one, two = (log_of(tmp_path / f"{kind}_{world}") for world in (1, 2))
        assert len(one) == len(two) == STEPS
        losses = {name for name in one[0] if name.startswith("loss")}
        assert {"loss", "loss_object", "loss_l1", "loss_giou"} < losses
        assert "loss_giou_dn" in losses
        for first, second in zip(one, two, strict=True):
            for name in (*losses, "grad_norm"):
                assert second[name] == pytest.approx(first[name], rel=1e-4), (kind, name)
        tensors = {
            name: load_weights(tmp_path / f"{kind}_{name}" / "last" / "model.safetensors")[0]
            for name in ("1", "2", "2_parts")
        }
        for name, value in tensors["1"].items():
            torch.testing.assert_close(tensors["2"][name], value, rtol=1e-3, atol=1e-5, msg=f"{kind}: {name}")
            assert torch.equal(tensors["2"][name], tensors["2_parts"][name]), (kind, name)


if __name__ == "__main__":
    distributed.setup()
    globals()[sys.argv[1]](Path(sys.argv[2]))
    distributed.teardown()
