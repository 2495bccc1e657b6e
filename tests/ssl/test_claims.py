# SPDX-License-Identifier: Apache-2.0
"""The experiments on the papers' claims: what they compare is what they say, and an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(CLAIMS))
    import barlow_width
    import batch_size
    import byol_norm
    import collapse
    import common
    import simsiam_alternating
    import swav

    found = (common, collapse, swav, byol_norm, simsiam_alternating, barlow_width, batch_size)
    return {module.__name__: module for module in found}


def batch(size: int = 32, views: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"views": [torch.from_numpy(rng.integers(0, 256, (8, 3, size, size), np.uint8)) for _ in range(views)]}


def test_alternation__with_one_step_is_simsiam(claims: dict[str, ModuleType]) -> None:
    """Three steps of both from the same weights: the same losses and the same weights afterwards."""
    losses, weights = [], []
    for make in (
        lambda: claims["simsiam_alternating"].make(1),
        lambda: claims["collapse"].simsiam(stop_gradient=True),
    ):
        torch.manual_seed(0)
        task = make()
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            torch.manual_seed(step)  # of the colours
            loss, _ = task(batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(task, "after_step"):
                task.after_step(step, 3)
            losses.append(loss.item())
        weights.append(task.backbone[0].weight.detach())
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-6)
    torch.testing.assert_close(*weights)


def test_alternation__keeps_its_targets_for_the_given_steps(claims: dict[str, ModuleType]) -> None:
    task = claims["simsiam_alternating"].make(3)
    first = task.fixed_projector[0].weight.clone()
    moved = []
    for step in range(6):
        task.projector[0].weight.data.add_(1.0)
        task.after_step(step, 6)
        moved.append(not torch.equal(task.fixed_projector[0].weight, first))
    assert moved == [False, False, True, True, True, True]
    torch.testing.assert_close(task.fixed_projector[0].weight, first + 6)


def test_batch_size_runs__see_the_same_number_of_pictures(claims: dict[str, ModuleType]) -> None:
    for case in claims["batch_size"].CASES.values():
        given = case(None)
        assert given["steps"] * given["batch"] == pytest.approx(claims["batch_size"].SAMPLES, rel=0.01)


def test_ablations__lack_one_part_each(claims: dict[str, ModuleType]) -> None:
    collapse = claims["collapse"]
    assert isinstance(collapse.byol(predictor=False).predictor, torch.nn.Identity)
    assert collapse.simsiam(stop_gradient=False).stop_gradient is False
    assert collapse.barlow(lambd=0.0).lambd == 0
    none = claims["byol_norm"].byol("none", momentum=0.999)
    assert not [m for m in none.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm | torch.nn.GroupNorm)]


def test_experiment__resumes(claims: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, done = claims["common"], []

    def run(**arguments: Any) -> dict[str, Any]:
        done.append((arguments["folder"].name, arguments["seed"]))
        if len(done) == 2:
            raise KeyboardInterrupt
        return {"knn": 0.5, "knn_start": 0.25, "seconds": 1.0, "health/rank": 3.0, "health/spread": 1.0, "alarms": []}

    monkeypatch.setattr(common, "run", run)
    monkeypatch.setattr(common, "stickers", lambda folder: None)
    cases = {name: lambda steps: {"steps": steps or 7} for name in ("good_1", "good_2")}
    arguments: dict[str, Any] = {"plot": lambda axes, results: common.lines(axes, results, "x")}
    with pytest.raises(KeyboardInterrupt):
        common.experiment("toy", "", cases, argv=["--out", str(tmp_path), "--seeds", "0"], **arguments)
    results = common.experiment("toy", "", cases, argv=["--out", str(tmp_path), "--seeds", "0"], **arguments)
    assert done == [("good_1_0", 0), ("good_2_0", 0), ("good_2_0", 0)]
    assert json.loads((tmp_path / "toy.json").read_text())["results"] == results
    assert (tmp_path / "toy.svg").read_text().count("<svg") == 1


def test_claims__spread_over_seeds(claims: dict[str, ModuleType]) -> None:
    mean, spread = claims["common"].mean_and_spread([{"knn": 0.2}, {"knn": 0.4}, {"knn": 0.6}])
    assert (mean, spread) == pytest.approx((0.4, 0.2))
