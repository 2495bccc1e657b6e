# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.train` from end to end on toys: distil a text tower, train an image tower to it, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import evaluate, train
from pretrain.config import PretrainConfig
from pretrain.data.phrases import Phrase, write_phrases, write_targets
from pretrain.engine.config import load_config
from pretrain.engine.errors import ConfigError, UserError
from pretrain.nets.encoders import load_encoder

WORDS = ["dog", "puppy", "car", "automobile", "rose", "tulip", "hammer", "saw"]


@pytest.fixture
def text_run(tmp_path: Path) -> list[str]:
    """Arguments of a distillation of a few words."""
    rows = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float32)
    write_targets(tmp_path / "targets.safetensors", WORDS, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    write_phrases(tmp_path / "phrases.txt", [Phrase(word) for word in WORDS])
    return [
        "--config", "pretrain/text.yaml", f"out={tmp_path / 'text'}",
        f"data.targets={tmp_path / 'targets.safetensors'}",
        f"data.phrases={tmp_path / 'phrases.txt'}", "method.encoder.embed_dim=8", "method.encoder.text.width=8",
        "method.encoder.text.hidden=8", "loop.steps=4", "loop.batch_size=8", "loop.workers=0", "loop.log_every=2",
        "optim.warmup_steps=1",
    ]  # fmt: skip


def clip_run(tmp_path: Path) -> list[str]:
    return [
        "--config", "pretrain/clip_start.yaml", f"out={tmp_path / 'clip'}",
        f"method.text_weights={tmp_path / 'text' / 'exported'}",
        "method.encoder.embed_dim=8", "method.encoder.image.image_size=32", "loop.steps=2", "loop.batch_size=4",
        "loop.workers=0", "data.length=1000", "optim.warmup_steps=1",
    ]  # fmt: skip


def test_train__text_tower_then_clip_then_evaluate(
    text_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(text_run) == 0
    text = load_encoder(tmp_path / "text" / "exported")
    assert text.visual is None
    assert train.main(clip_run(tmp_path)) == 0
    both = load_encoder(tmp_path / "clip" / "exported")
    tokens = both.tokenize(["a dog"])
    trunk = both.text.trunk  # type: ignore[union-attr]
    torch.testing.assert_close(trunk(tokens), text.encode_text(tokens))  # frozen
    assert (tmp_path / "clip" / "metrics.jsonl").exists()
    capsys.readouterr()
    arguments = [
        "--encoder",
        str(tmp_path / "clip" / "exported"),
        "--per-class",
        "1",
        "--out",
        str(tmp_path / "report.json"),
    ]
    assert evaluate.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["encoder"] == both.fingerprint()
    assert set(report["zero_shot"]) == {"name", "templates", "synonyms_on_pictures"}
    assert report["synonyms"]["everyday"].keys() == {"puppy", "automobile", "spectacles", "aeroplane"}


def test_check__writes_nothing(text_run: list[str], tmp_path: Path) -> None:
    assert train.main([*text_run, "--check"]) == 0
    assert not (tmp_path / "text").exists()


def test_seed__same_seed_gives_the_same_tower(text_run: list[str], tmp_path: Path) -> None:
    train.main(text_run)
    first = load_encoder(tmp_path / "text" / "exported").fingerprint()
    train.main([*text_run, "--overwrite"])
    assert load_encoder(tmp_path / "text" / "exported").fingerprint() == first
    train.main([*text_run, "--overwrite", "loop.seed=1"])
    assert load_encoder(tmp_path / "text" / "exported").fingerprint() != first


def test_train__other_embedding_length_names_the_key(text_run: list[str]) -> None:
    with pytest.raises(UserError, match="set method.encoder.embed_dim=8"):
        train.main([*text_run, "method.encoder.embed_dim=16"])


def test_train__missing_text_tower_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no encoder at"):
        train.main(clip_run(tmp_path))


def test_train__data_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="learns from data of kind sticker_pairs"):
        load_config(PretrainConfig, "pretrain/clip.yaml", ["data.kind=phrase_targets", "data.targets=x"])


@pytest.mark.parametrize("name", ["text", "clip"])
def test_shipped_configs__load(name: str) -> None:
    assert load_config(PretrainConfig, f"pretrain/{name}.yaml").out == Path("runs") / name
