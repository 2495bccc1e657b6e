# SPDX-License-Identifier: Apache-2.0
"""Several processes do what one does: losses, gradients, updates, resume and faults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.engine import distributed
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from tests.engine.processes import EXACT, REPOSITORY, launch
from tests.engine.toy import Contrastive, Everything, Mean, Numbers, content, differences, lines, train


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("pair")
    launch("everything", folder, world=2)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    launch("gradients", folder, world=4)
    return folder


@pytest.mark.parametrize("form", ["whole", "local"])
@pytest.mark.parametrize("world", [2, 4])
def test_gather__averaged_gradient_is_the_global_losss(request: pytest.FixtureRequest, form: str, world: int) -> None:
    folder: Path = request.getfixturevalue({2: "pair", 4: "four"}[world])
    task = Contrastive(form)
    source = Numbers(dtype=torch.float64)
    loss, _ = task(source.collate([source.sample(n, n) for n in range(8)]))
    loss.backward()
    for rank in range(world):
        found = torch.load(folder / f"gradients_{world}_{rank}.pt", weights_only=True)
        assert found[f"{form} loss"] == pytest.approx(float(loss), rel=1e-12)
        ours = torch.cat([found[form][name].flatten() for name, _ in task.named_parameters()])
        true = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
        assert float(torch.nn.functional.cosine_similarity(ours, true, dim=0)) > 1 - 1e-6
        assert float(ours.norm() / true.norm()) == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_gather__is_in_rank_order_and_sums_gradients(request: pytest.FixtureRequest, world: int) -> None:
    folder: Path = request.getfixturevalue({2: "pair", 4: "four"}[world])
    expected = torch.arange(world).repeat_interleave(2)[:, None].expand(-1, 3).float()
    weights = torch.arange(world * 6).float().view(world, 2, 3) * sum(range(1, world + 1))
    for rank in range(world):
        found = torch.load(folder / f"gradients_{world}_{rank}.pt", weights_only=True)
        assert torch.equal(found["gathered"], expected)
        assert torch.equal(found["bf16"], expected.bfloat16())
        assert torch.equal(found["gathered gradient"], weights[rank])


def test_gather__one_process_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert distributed.gather_with_grad(x) is x


@pytest.mark.parametrize("task", [Mean(), Contrastive("whole"), Contrastive("local")], ids=["mean", "whole", "local"])
def test_two_processes__train_like_one(pair: Path, tmp_path: Path, task: torch.nn.Module) -> None:
    name = f"{type(task).__name__}-{getattr(task, 'form', 'mean')}"
    train(task, tmp_path / "run", Numbers(30, dtype=torch.float64), **EXACT)
    one, two = (load_weights(folder / "last" / "model.safetensors")[0] for folder in (tmp_path / "run", pair / name))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-10, atol=1e-12)
    for a, b in zip(*(lines(folder / "metrics.jsonl") for folder in (tmp_path / "run", pair / name)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-10)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)


def test_two_processes__accumulation_equals_the_whole_batch(pair: Path, tmp_path: Path) -> None:
    train(Mean(), tmp_path / "run", Numbers(30, dtype=torch.float64), **EXACT)
    one = load_weights(tmp_path / "run" / "last" / "model.safetensors")[0]
    two = load_weights(pair / "accumulated" / "last" / "model.safetensors")[0]
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-10, atol=1e-12)


def test_two_processes__resume_is_exact(pair: Path) -> None:
    whole, pieces = (content(pair / name / "checkpoints" / "step_7") for name in ("one_piece", "two_pieces"))
    assert differences(whole, pieces) == []
    ranks = whole["state"]["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["rng"]["torch"], ranks[1]["rng"]["torch"])


def test_two_processes__signal_to_one_saves_one_checkpoint(pair: Path) -> None:
    assert {path.name for path in (pair / "two_pieces" / "checkpoints").iterdir()} == {"step_4", "step_7"}


def test_two_processes__nan_in_one_is_skipped_by_all(pair: Path) -> None:
    (event,) = lines(pair / "nonfinite" / "events.jsonl")
    assert (event["event"], event["step"]) == ("non_finite", 2)
    assert [one["loss"] == "nan" for one in event["processes"]] == [False, True]
    assert event["processes"][1]["draws"] == [6, 7]
    assert (
        "draws [6, 7]: non-finite step skipped (1 consecutive, at most 3)" in (pair / "nonfinite/train.log").read_text()
    )
    states = [torch.load(pair / f"nonfinite_{rank}.pt", weights_only=True) for rank in range(2)]
    assert differences(states[0], states[1]) == []
    assert all(tensor.isfinite().all() for tensor in states[0].values())


def test_two_processes__bad_images_are_in_one_list(pair: Path) -> None:
    assert {entry["index"] for entry in lines(pair / "unreadable" / "bad_images.jsonl")} == {1, 5}


def test_deadlock__each_process_reports_its_position(pair: Path) -> None:
    for rank in range(2):
        said = (pair / f"hanging_{rank}.txt").read_text()
        reports = re.findall(rf"warning: process {rank} \(pid \d+\) has been in (step \d+ \([a-z ]+\)) for", said)
        assert reports.count("step 3 (forward and backward)") == 1, said  # a busy machine adds other parts


def test_lost_process__others_end_with_rank_and_step(pair: Path) -> None:
    assert re.match(
        r"process 0 lost the others after step 2 \(.*continue with --resume", (pair / "lost.txt").read_text()
    )


def test_resume__other_number_of_processes_warns(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pair / "two_pieces", tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_7")
    options = {"steps": 7, "save_every": 100, "resume": True}
    report = train(Everything(), tmp_path / "run", Numbers(noisy=True), **options)
    assert report.step == 7
    assert "the checkpoint is of another number of processes" in capsys.readouterr().out


def test_device__missing_one_is_refused() -> None:
    assert distributed.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'gpu' is not a device name"):
        distributed.pick_device("gpu")
    if not torch.cuda.is_available():
        assert distributed.pick_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="torch finds no CUDA device"):
            distributed.pick_device("cuda")


@pytest.mark.slow
def test_torchrun__trains_like_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.engine.processes", "gradients", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gradients_2_1.pt").is_file()
