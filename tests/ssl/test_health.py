# SPDX-License-Identifier: Apache-2.0
"""The health panel measures what it says, and its alarms fire on broken runs and stay silent on healthy ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain import health
from pretrain.config import PretrainConfig
from pretrain.config_ssl import WatchConfig
from pretrain.config_views import DataSection, FolderData, InputSpec, StickerSingles
from pretrain.engine.checkpoint import load_model
from pretrain.engine.config import free_keys, load_config
from pretrain.engine.errors import UserError
from pretrain.engine.task import Task
from pretrain.evaluation.knn import KnnProbe
from pretrain.health import Monitored, effective_rank, panel
from pretrain.monitor import monitored
from tests.engine.toy import Everything, content, differences, train
from tests.ssl.ssl_cases import METHODS, run_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_effective_rank__of_known_spectra() -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 5)))
    assert float(health.effective_rank(torch.from_numpy(q))) == pytest.approx(5, rel=1e-4)
    x = np.random.default_rng(1).normal(size=(30, 12))
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert float(health.effective_rank(torch.from_numpy(x))) == pytest.approx(
        np.exp(-(share * np.log(share)).sum()), rel=1e-4
    )
    assert float(health.effective_rank(torch.zeros(4, 3))) == pytest.approx(1)


def test_effective_rank__of_a_constant_projection_is_one_although_its_noise_has_full_rank() -> None:
    constant = 100 + normal(64, 16) * 1e-3
    assert float(health.effective_rank(constant)) < 1.1
    assert float(health.effective_rank(constant - constant.mean(0))) > 14


def test_spread_and_cosine__equal_brute_force() -> None:
    x = normal(50, 8) + 0.5
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(50) for j in range(50) if i != j]
    assert float(health.mean_cosine(x)) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert float(health.channel_spread(x)) == pytest.approx(unit.std(0).mean() * math.sqrt(8), rel=1e-5)
    assert float(health.channel_spread(normal(5000, 64))) == pytest.approx(1, abs=0.02)
    assert float(health.channel_spread(torch.ones(10, 4))) == pytest.approx(0, abs=1e-6)


def test_panel__prototype_use() -> None:
    assert float(health.prototype_use(torch.eye(6))) == pytest.approx(1)
    same = torch.zeros(12, 6)
    same[:, 2] = 1
    assert float(health.prototype_use(same)) == pytest.approx(1 / 6)
    assert float(health.prototype_use(torch.eye(100)[:8])) == pytest.approx(1), "eight samples can choose eight at most"


def test_diagonal__equals_numpy() -> None:
    a, b = normal(200, 5), normal(200, 5, seed=1)
    b[:, :2] = a[:, :2]
    c = np.corrcoef(a.T.numpy(), b.T.numpy())[:5, 5:]
    on, off = health.diagonal(a, b)
    assert float(on) == pytest.approx(np.diag(c).mean(), abs=1e-5)
    assert float(off) == pytest.approx(np.sqrt((c**2).sum() - (np.diag(c) ** 2).sum()) / np.sqrt(20), abs=1e-5)


def test_panel__margin_and_distance() -> None:
    assert float(health.margin(torch.tensor([0.9, 0.7]), torch.tensor([0.1, 0.3]))) == pytest.approx(0.6)
    assert float(health.ema_distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))) == pytest.approx(0.2)


class Scripted(Task):
    """A task whose health at each step is written down beforehand."""

    def __init__(self, script: list[dict[str, Tensor]], loss: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.script, self.loss, self.step = script, loss, -1

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.step += 1
        return self.weight * 0 + self.loss[self.step], {}

    def health(self) -> dict[str, Tensor]:
        return self.script[self.step]


def alarms(script: list[dict[str, Tensor]], *, loss: list[float] | None = None) -> list[str]:
    """Every alarm of a run of that many steps, one measurement a step."""
    monitored = Monitored(Scripted(script, loss or [1.0] * len(script)))
    found = []
    for step in range(len(script)):
        monitored(None)
        monitored.after_step(step, len(script))
        found += monitored.report()[1]
    return found


def spread(rank: int, count: int = 64, width: int = 64) -> Tensor:
    """Vectors in `rank` directions, each channel with the spread that batch norm would give it."""
    x = normal(count, rank) @ normal(rank, width, seed=7)
    return x / x.std(0)


def test_rank_alarm__fires_on_a_falling_rank_although_the_spread_stays() -> None:
    healthy, fallen = spread(60), spread(4)
    assert float(health.channel_spread(fallen)) > 0.8
    found = alarms([{"projection": healthy}] * 3 + [{"projection": fallen}] * 6)
    assert len(found) == 1, "once, not at every measurement"
    assert "health/rank" in found[0] and "stop-gradient" in found[0] and "What to do" in found[0]


def test_rank_alarm__not_on_a_rank_low_from_the_beginning() -> None:
    assert alarms([{"projection": spread(9)}] * 20) == []


def test_alarms__not_on_one_bad_batch() -> None:
    assert alarms(([{"projection": spread(60)}] * 4 + [{"projection": spread(3)}]) * 4) == []


def test_alarms__fire_on_a_constant_projection() -> None:
    found = alarms([{"projection": 5 + 0.01 * normal(32, 8)}] * 20)
    assert any("health/spread" in text and "same for every picture" in text for text in found)


@pytest.mark.parametrize(
    ("name", "broken", "healthy"),
    [
        ("off_diagonal", {"projection_b": normal(64, 1).expand(64, 64)}, {"projection_b": spread(60)}),
        ("prototype_use", {"scores": torch.eye(30)[:1].expand(64, 30)}, {"scores": normal(64, 30)}),
        (
            "queue_margin",
            {"positive": torch.zeros(4), "negative": torch.zeros(4)},
            {"positive": torch.ones(4), "negative": torch.zeros(4)},
        ),
        (
            "ema_distance",
            {"online_parameters": torch.ones(3), "target_parameters": torch.ones(3)},
            {"online_parameters": torch.ones(3), "target_parameters": torch.zeros(3)},
        ),
    ],
)
def test_alarms__each_fires_on_its_own_fault_only(
    name: str, broken: dict[str, Tensor], healthy: dict[str, Tensor]
) -> None:
    flat = normal(64, 1).expand(64, 64) if name == "off_diagonal" else spread(60)
    found = alarms([{"projection": flat, **broken}] * 20)
    assert [text for text in found if f"health/{name} " in text], found
    assert alarms([{"projection": spread(60), **healthy}] * 20) == []


def test_loss_alarm__fires_on_a_loss_stuck_at_ln_k_after_the_beginning() -> None:
    script = [{"projection": spread(60), "scores": normal(64, 50)}] * 40
    found = alarms(script, loss=[0.97 * math.log(50)] * 40)
    assert len(found) == 1 and "stuck at ln K" in found[0]
    assert alarms(script, loss=[math.log(50)] * 5 + [0.6 * math.log(50)] * 35) == [], "every run begins like that"


class WithHealth(Everything):
    """The loop tests' task of every kind of state, with a panel."""

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, metrics = super().forward(batch)
        self.seen = batch.detach() @ torch.eye(6)[:, :3]
        return loss, metrics

    @property
    def backbone(self) -> nn.Module:
        return self.net

    def health(self) -> dict[str, Tensor]:
        return {"projection": self.seen}


def test_panel__logged_every_time_without_effect_on_training(tmp_path: Path) -> None:
    bare = train(WithHealth(), tmp_path / "bare", steps=6, log_every=2)
    train(Monitored(WithHealth()), tmp_path / "watched", steps=6, log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({"health/rank", "health/spread", "health/cosine"} <= set(line) for line in lines)
    assert lines[-1]["loss"] == bare.metrics["loss"]


def test_alarms__reach_log_and_events(tmp_path: Path) -> None:
    class Constant(WithHealth):
        def health(self) -> dict[str, Tensor]:
            return {"projection": torch.ones(4, 3)}

    train(Monitored(Constant()), tmp_path, steps=8, log_every=1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["alarm"]
    assert "health/spread" in (tmp_path / "train.log").read_text()


def test_monitor__a_watched_run_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "log_every": 2, "save_every": 3, "keep": 10}

    def task() -> Monitored:
        return Monitored(WithHealth(), probe=lambda backbone: {"knn": 0.5, "seconds": 0.0}, probe_every=3)

    train(task(), tmp_path / "whole", **options)
    train(task(), tmp_path / "parts", **options)
    for folder in (tmp_path / "parts/checkpoints").glob("step_*"):
        if not folder.name.endswith("3"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    train(task(), tmp_path / "parts", resume=True, **options)
    found = [content(next((tmp_path / name / "checkpoints").glob("step_*8"))) for name in ("whole", "parts")]
    assert differences(*found) == []
    whole, parts = untimed(tmp_path / "whole"), untimed(tmp_path / "parts")
    assert whole == parts
    assert [line["step"] for line in whole if "probe/knn" in line] == [4, 6]


def test_monitor__a_run_begun_before_an_alarm_was_added_resumes(tmp_path: Path) -> None:
    old, new = Monitored(WithHealth()), Monitored(WithHealth())
    old.best.copy_(torch.arange(len(old.best)))
    state = {name: value for name, value in old.state_dict().items() if name != "probed_on"}
    state |= {name: state[name][:-1] for name in ("best", "ill_for")}
    load_model(new, state, untracked=(), where=tmp_path)
    assert new.best.tolist() == [*range(len(old.best) - 1), -math.inf] and new.ill_for.tolist() == [0] * len(old.best)
    with pytest.raises(UserError, match="1 of another shape, such as best"):
        load_model(new, {**state, "best": torch.zeros(99)}, untracked=(), where=tmp_path)


@pytest.mark.parametrize(("name", "alarmed"), [("stickers", True), ("other pictures", False)])
def test_probe__change_of_settings_is_not_an_alarm(name: str, alarmed: bool) -> None:
    def measured(task: Monitored) -> list[str]:
        task.after_step(5, 10)
        return [text for text in task.report()[1] if text.startswith("probe/knn")]

    def watched_by(knn: float, name: str) -> Monitored:
        task = WithHealth()
        task.seen = normal(4, 3)
        return Monitored(task, probe=lambda _: {"knn": knn, "seconds": 0.0}, probe_every=1, probe_name=name)

    before, after = watched_by(0.9, "stickers"), watched_by(0.1, name)
    assert measured(before) == []
    after.load_state_dict(before.state_dict())
    assert bool(measured(after)) is alarmed
    assert measured(after) == [], "said once"


def test_clip_panel__is_of_its_last_embeddings() -> None:
    clip = run_of("clip")[0]
    image, text = normal(6, 8), normal(6, 8, seed=1)
    clip._last = {"image": image, "text": text}  # type: ignore[assignment]
    found = panel(clip.health())  # type: ignore[operator]
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (image, text))
    cosine = a @ b.T
    margin = [cosine[n, n] - np.delete(cosine[n], n).mean() for n in range(6)]
    assert found["health/caption_margin"] == pytest.approx(np.mean(margin), rel=1e-4)
    assert found["health/rank"] == pytest.approx(float(effective_rank(image)), rel=1e-4)


@pytest.mark.parametrize(("shift", "alarmed"), [(0, False), (1, True)])
def test_clip__shifted_captions_raise_an_alarm(tmp_path: Path, shift: int, alarmed: bool) -> None:
    class Captioned(WithHealth):
        def health(self) -> dict[str, Tensor]:
            image = normal(16, 8)
            cosine = nn.functional.normalize(image) @ nn.functional.normalize(image.roll(shift, 0)).T
            own = cosine.diagonal()
            return {"projection": image, "own_caption": own, "other_captions": (cosine.sum(1) - own) / 15}

    train(Monitored(Captioned()), tmp_path, steps=12, log_every=1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["health/caption_margin"] < 0.005) is alarmed
    events = tmp_path / "events.jsonl"
    assert ("health/caption_margin" in (events.read_text() if events.is_file() else "")) is alarmed


# --- which labelled pictures the kNN probe of a run has


def labelled(root: Path) -> Path:
    for half in ("train", "val"):
        for name in ("a", "b"):
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(3):
                cv2.imwrite(str(folder / f"{number}.png"), np.full((8, 8, 3), 90 * (name == "b") + number, np.uint8))
    return root


def probed(watch: dict[str, Any], data: DataSection) -> KnnProbe | None:
    task = monitored(WithHealth(), WatchConfig(**watch), data, InputSpec(8, (0.5,) * 3, (0.25,) * 3))
    assert task.probe is None or isinstance(task.probe, KnnProbe)
    assert task.probe_every == (watch["probe_every"] if task.probe else 0)
    return task.probe


def test_probe_data__default_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stickers, photos = StickerSingles(kind="sticker_singles"), FolderData(root=tmp_path)
    assert probed({"probe_every": 0}, stickers) is None
    own = probed({"probe_every": 5, "probe_pictures": 50}, stickers)
    assert own is not None
    assert [sum(len(rows) for bank, _, rows in own.parts if bank is half) for half in (True, False)] == [50, 25]
    assert capsys.readouterr().out == ""
    assert probed({"probe_every": 5}, photos) is None
    assert "watch.probe_data names no labelled pictures" in capsys.readouterr().out
    named = probed({"probe_every": 5, "probe_data": str(labelled(tmp_path))}, photos)
    assert named is not None and {len(source) for _, source, _ in named.parts} == {6}
    with pytest.raises(UserError, match=r"watch\.probe_data .*/nowhere/train is not a folder"):
        probed({"probe_every": 5, "probe_data": str(tmp_path / "nowhere")}, photos)


def test_resume__watch_settings_may_change() -> None:
    assert {key for key in free_keys(PretrainConfig) if key.startswith("watch.")} == {
        f"watch.{name}" for name in WatchConfig.model_fields
    }


def test_online_probe__runs_in_the_small_configurations() -> None:
    configs = Path(__file__).resolve().parents[2] / "configs"
    for name in METHODS:
        assert load_config(PretrainConfig, configs / "pretrain" / f"{name}.yaml").watch.probe_every > 0, name


def untimed(run: Path) -> list[dict[str, Any]]:
    """The log lines without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("data_time", "step_time", "per_second", "eta")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_effective_rank__of_a_projection_that_is_not_finite_is_nan() -> None:
    assert math.isnan(float(effective_rank(torch.full((4, 3), math.nan))))
    assert float(effective_rank(torch.eye(3))) == pytest.approx(3.0)
