# SPDX-License-Identifier: Apache-2.0
"""``make weights``: skips what is done, resumes what was begun, stops at a failure, keeps book."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ovd.weights import weights_folder
from pretrain.config import CbowTower, EncoderConfig
from pretrain.engine.errors import UserError
from pretrain.nets.encoders import load_encoder
from pretrain.nets.towers import build_encoder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_weights.py"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("make_weights", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return module


def writer(text: str) -> list[str]:
    return ["-c", f"open('log.txt', 'a').write({text!r})"]


def test_stages__run_in_order_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [script.Stage(name=n, result=Path(f"runs/{n}/done"), commands=[writer(n)]) for n in ("a", "b")]
    monkeypatch.setattr(script, "stages", lambda: stages)
    assert script.main([]) == 0 and script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "ab"
    book = json.loads((tmp_path / "runs/weights.json").read_text())
    assert book["a"]["attempts"] == 1 and book["a"]["cpu_seconds"] > 0


def test_stages__a_failure_stops_there_and_the_next_call_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = ["-c", "import os, sys; sys.exit(0 if os.path.exists('mended') else 7)"]
    stages = [
        script.Stage(name="a", result=Path("runs/a"), commands=[writer("a")]),
        script.Stage(name="b", result=Path("runs/b"), commands=[fails]),
        script.Stage(name="c", result=Path("runs/c"), commands=[writer("c")]),
    ]
    monkeypatch.setattr(script, "stages", lambda: stages)
    assert script.main([]) == 7
    assert "stage b ended with status 7" in capsys.readouterr().err
    (tmp_path / "mended").touch()
    assert script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "ac"
    assert json.loads((tmp_path / "runs/weights.json").read_text())["b"]["attempts"] == 2


def test_stages__a_training_with_a_checkpoint_is_resumed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = ["-c", "import sys; open('log.txt', 'w').write(' '.join(sys.argv[1:]))"]
    stage = script.Stage(name="t", result=Path("runs/t/done"), commands=[show], run=Path("runs/t"))
    (tmp_path / "runs/t").mkdir(parents=True)
    monkeypatch.setattr(script, "stages", lambda: [stage])
    (tmp_path / "runs/t/last").write_text("step_5")
    assert script.main([]) == 0
    assert (tmp_path / "log.txt").read_text() == "--resume"


def test_run_stage__training_finds_no_folder_of_its_own(script: ModuleType, tmp_path: Path) -> None:
    """A training refuses an ``out`` that holds anything."""
    check = ["-c", "import os, sys; sys.exit(os.path.exists('runs/a')); "]
    stage = script.Stage(name="a", result=Path("runs/a/exported/model.json"), commands=[check], run=Path("runs/a"))
    assert script.run_stage(stage, {}) == 0
    assert (tmp_path / stage.result).is_file()


def test_make_weights__order_of_clip_and_detector(script: ModuleType) -> None:
    names = [stage.name for stage in script.stages()]
    assert names == [
        "teacher", "text", "clip-start", "clip-names", "clip-hues", "clip", "ship-clip", "proposals", "regions", "vild",
        "calibrate", "measure", "ship-vild",
    ]  # fmt: skip


def test_stages__each_finds_what_the_earlier_ones_made(script: ModuleType) -> None:
    configs = SCRIPT.parents[1] / "configs"
    made = {"runs/teacher"}
    for stage in script.stages():
        for command in stage.commands:
            if "--config" in command:
                text = (configs / command[command.index("--config") + 1]).read_text(encoding="utf-8")
                assert set(re.findall(r"^(?!out:).*(runs/\w+)", text, flags=re.MULTILINE)) <= made, stage.name
        made.add(str(stage.result.parent if stage.run is None else stage.run))


def test_shipped_encoder__is_half_as_large_and_keeps_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship = load("ship_weights", monkeypatch)
    monkeypatch.setenv("OVD_WEIGHTS", str(tmp_path / "weights"))
    torch.manual_seed(0)
    text = CbowTower(width=8, hidden=8)
    exported = build_encoder(EncoderConfig(embed_dim=12, text=text)).save(tmp_path / "exported")
    ship.main(["clip", str(exported), "small"])
    (tmp_path / "weights/small/card.md").write_text("# small")
    ship.main(["clip", str(exported), "small"])
    shipped = weights_folder("small", tmp_path / "weights")
    assert (shipped / "card.md").read_text() == "# small"
    assert (shipped / "model.safetensors").stat().st_size < 0.51 * (exported / "model.safetensors").stat().st_size
    tokens = load_encoder(shipped).tokenize(["a dog"])
    ours, theirs = (load_encoder(folder).encode_text(tokens) for folder in (shipped, exported))
    assert float(torch.cosine_similarity(ours, theirs).detach()) > 0.9999


def test_shipped_detector__has_a_card_with_its_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship = load("ship_weights", monkeypatch)
    monkeypatch.setenv("OVD_WEIGHTS", str(tmp_path / "weights"))
    exported, metrics = tmp_path / "exported", tmp_path / "metrics.json"
    exported.mkdir()
    (exported / "model.safetensors").write_bytes(b"weights")
    calibration, report = {"threshold": 0.24}, tmp_path / "calibration.json"
    model = {"config_hash": "abc", "classes": ["cat", "dog", "cup"], "novel": [1], "encoder": "clip-sticker"}
    model["calibration"] = calibration
    (exported / "model.json").write_text(json.dumps(model))
    values = {"bbox/AP50_base": 0.25, "bbox/AP50_novel": 0.1234, "bbox/AR100_novel@50": 0.9}
    run = {"config_hash": "abc", "data": "stickers-val:200", "words": 3}
    typed = {"precision_at_threshold": 0.56, "recall_at_threshold": 0.29, "ece": 0.019, "absent_words_quiet": 0.956}
    report.write_text(json.dumps({"calibration": calibration, "other_scenes": typed}))
    command = ["detector", str(exported), "tiny", str(metrics), str(report)]
    metrics.write_text(json.dumps({"metrics": values, "run": run | {"config_hash": "of another detector"}}))
    with pytest.raises(UserError, match="evaluate this one"):
        ship.main(command)
    metrics.write_text(json.dumps({"metrics": values, "run": run | {"crop_refinement": 40}}))
    with pytest.raises(UserError, match=r"crop refinement of 40 regions, the detector refines 0"):
        ship.main(command)
    metrics.write_text(json.dumps({"metrics": values, "run": run}))
    report.write_text(json.dumps({"calibration": {"threshold": 0.5}, "other_scenes": typed}))
    with pytest.raises(UserError, match="calibrate this one"):
        ship.main(command)
    report.write_text(json.dumps({"calibration": calibration, "other_scenes": typed}))
    ship.main(command)
    card = json.loads((weights_folder("tiny", tmp_path / "weights") / "card.json").read_text())
    assert card["metrics"] == {"box AP50, base": 0.25, "box AP50, novel": 0.123, "AR100 at IoU .5, novel": 0.9}
    assert "56% of the boxes" in card["text"] and "29% of the objects" in card["text"] and "95.6%" in card["text"]
    assert "labels of 2 base nouns" in card["data"] and "1 nouns were never labelled" in card["data"]


def test_stages__every_config_exists(script: ModuleType) -> None:
    configs = SCRIPT.parents[1] / "configs"
    named = [c[c.index("--config") + 1] for stage in script.stages() for c in stage.commands if "--config" in c]
    assert named and all((configs / name).is_file() for name in named)


def test_photo_stages__picodet_is_looked_for_where_the_guide_puts_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = load("make_photo_weights", monkeypatch)
    unpacked = f"-d {photo.PICODET.parent}"
    for page in ("docs/guide/photographs.md", "docs/guide/proposals.md", "scripts/convert_picodet.py"):
        text = (SCRIPT.parents[1] / page).read_text(encoding="utf-8")
        assert unpacked in text and f"convert_picodet.py {photo.PICODET}" in text


def test_photo_stages__are_commands_that_their_programs_take(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ovd.config_detr import TRAIN_CONFIGS
    from ovd.embed import EmbedConfig
    from pretrain.config import PretrainConfig
    from pretrain.engine.config import load_config

    photo = load("make_photo_weights", monkeypatch)
    photos = tmp_path / "photos"
    assert photo.main([str(photos)]) == 2
    assert "images is not there" in capsys.readouterr().err
    (photos / "images").mkdir(parents=True)
    for name in ("labels.json", "instances_a.json.gz", "instances_b.json", "model.pdmodel"):
        (photos / name).write_text("{}")
    monkeypatch.setattr(photo, "ROOT", tmp_path)
    monkeypatch.setenv("OVD_WEIGHTS", "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert photo.main([str(photos), "--list"]) == 2
    assert "PicoDet comes from a Python package" in capsys.readouterr().err
    (tmp_path / photo.CONVERTED).parent.mkdir(parents=True)
    (tmp_path / photo.CONVERTED).write_text("{}")  # converted before: its file is no longer needed
    assert photo.main([str(photos), "--list"]) == 0
    (tmp_path / photo.CONVERTED).unlink()
    capsys.readouterr()
    assert photo.main([str(photos), "--picodet", str(photos / "model.pdmodel"), "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    trainings = [stage.commands[0] for stage in photo.stages(photos, photos / "model.pdmodel") if stage.run is not None]
    assert len(trainings) == 3
    for _, module, _, config, *overrides in trainings:
        kind = PretrainConfig if module == "pretrain.train" else TRAIN_CONFIGS
        loaded = load_config(kind, config, overrides)
        assert [Path(file).name for file in loaded.data.annotations] == ["instances_a.json.gz", "instances_b.json"]
    (embed,) = (
        c for stage in photo.stages(photos, photos / "model.pdmodel") for c in stage.commands if "ovd.embed" in c
    )
    assert loaded.data.not_things is None
    (photos / "not_things.json").write_text('["kitchen"]')
    (training,) = (stage for stage in photo.stages(photos, photos / "model.pdmodel") if stage.name == "vild")
    assert f"data.not_things={photos / 'not_things.json'}" in training.commands[0]
    regions = load_config(EmbedConfig, embed[3], embed[4:])
    assert loaded.model.variant == "ensemble" and loaded.regions == regions.out
