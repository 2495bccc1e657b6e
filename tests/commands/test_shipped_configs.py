# SPDX-License-Identifier: Apache-2.0
"""`--check` of every shipped configuration takes a step, or says in a line what is missing, and leaves nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovd import embed
from ovd import train as detectors
from ovd.config_detr import TRAIN_CONFIGS
from pretrain import train as encoders
from pretrain.config import PretrainConfig
from pretrain.engine.config import load_config, plain
from pretrain.engine.errors import ConfigError, UserError
from pretrain.engine.stages import shipped_stages

ROOT = Path(__file__).resolve().parents[2]
MAINS = {"pretrain.train": encoders.main, "ovd.embed": embed.main, "ovd.train": detectors.main}
MODULES = {stage.config: stage.module for stage in shipped_stages()}
CONFIGS = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))

ENCODER = f"{ROOT}/weights/clip-sticker"
STAND_INS = {  # for what an earlier stage makes
    "embed.yaml": ["proposer=vild-sticker", "pictures.length=2"],
    "pretrain/clip.yaml": [f"method.text_weights={ENCODER}", f"method.image_weights={ENCODER}"],
    "pretrain/clip_hues.yaml": [f"method.text_weights={ENCODER}", f"method.image_weights={ENCODER}"],
    "pretrain/clip_names.yaml": [f"method.text_weights={ENCODER}", f"method.image_weights={ENCODER}"],
    "pretrain/clip_start.yaml": [f"method.text_weights={ENCODER}"],
}
COMPLETE = {
    *STAND_INS, "detr.yaml", "mask_rcnn.yaml", "ov_detr.yaml", "updetr.yaml",
    "pretrain/barlow_twins.yaml", "pretrain/byol.yaml", "pretrain/byol_gn.yaml", "pretrain/moco_v1.yaml",
    "pretrain/moco_v2.yaml", "pretrain/simclr.yaml", "pretrain/simsiam.yaml", "pretrain/swav.yaml",
}  # fmt: skip
"""Configurations that have everything here. The others lack a stage or pictures; the tests of each stage have those."""


def test_shipped_configs__all_are_listed() -> None:
    assert set(CONFIGS) == set(MODULES) >= COMPLETE


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_shipped_configs__check_steps_or_names_what_is_missing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = MAINS[MODULES[config]]
    argv = ["--config", config, *STAND_INS.get(config, ()), "--check"]
    if config in COMPLETE:
        assert main(argv) == 0
        assert re.search(r"check: two batches and one step|pictures/s|2 pictures", capsys.readouterr().out)
    else:
        with pytest.raises(UserError, match=r"make it with `python |run the command in |data/|photos") as refusal:
            main(argv)
        assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


MODELS: dict[str, Any] = {"pretrain.train": PretrainConfig, "ovd.embed": embed.EmbedConfig, "ovd.train": TRAIN_CONFIGS}


def numbers_of(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, length) of every list of numbers."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{before}{key}.")
        elif isinstance(value, list) and value and all(type(one) in (int, float) for one in value):
            yield before + key, len(value)


def test_lists_of_numbers__take_no_negative_ones() -> None:
    seen = set()
    for config in CONFIGS:
        model = MODELS[MODULES[config]]
        for key, length in numbers_of(plain(load_config(model, config))):
            if key not in seen:
                seen.add(key)
                with pytest.raises(ConfigError, match=re.escape(key.split(".")[-1])):
                    load_config(model, config, [f"{key}=[{', '.join(['-1'] * length)}]"])
    assert len(seen) >= 20


@pytest.mark.parametrize(
    ("config", "override"),
    [
        ("mask_rcnn.yaml", "data.scale=[1.5, 0.5]"),
        ("mask_rcnn.yaml", "model.proposals.post_nms=[0, 0]"),
        ("mask_rcnn.yaml", "model.proposals.anchor_sizes=[[-8.0, 16.0]]"),
        ("photos/lite_clip.yaml", "data.crop_side=[1.8, 0.8]"),
        ("photos/lite_clip.yaml", "data.resolution=[0, 0]"),
        ("paper/clip.yaml", "method.encoder.image_std=[0, 0, 0]"),
        ("paper/clip.yaml", "method.augment.crop_scale=[1.0, 0.5]"),
    ],
)
def test_ranges__reversed_or_empty_are_refused(config: str, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].split(".")[-1]):
        load_config(MODELS[MODULES[config]], config, [override])
