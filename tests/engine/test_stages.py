# SPDX-License-Identifier: Apache-2.0
"""A stage that lacks another's output names the command that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovd import embed
from ovd import train as detectors
from pretrain import train as encoders
from pretrain.engine.config import Section
from pretrain.engine.errors import UserError
from pretrain.engine.stages import require_stages, stage_commands


@pytest.mark.parametrize(
    ("main", "config", "said"),
    [
        (
            encoders.main,
            "pretrain/clip.yaml",
            r"method\.text_weights: runs/text/exported is not there yet; make it with `python -m pretrain\.train "
            r"--config pretrain/text\.yaml`; method\.image_weights: .*--config pretrain/clip_hues\.yaml`",
        ),
        (
            detectors.main,
            "vild.yaml",
            r"weights: runs/mask_rcnn/exported .*`python -m ovd\.train --config mask_rcnn\.yaml`; "
            r"regions: runs/regions .*`python -m ovd\.embed --config embed\.yaml`",
        ),
        (embed.main, "embed.yaml", r"proposer: runs/mask_rcnn/exported .*`python -m ovd\.train --config mask_rcnn\."),
    ],
)  # fmt: skip
def test_missing_stage__names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: object, config: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        main(["--config", config, "--check"])  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ["vild_text.yaml", "oracle.yaml"])
def test_missing_stage__a_variant_without_distillation_needs_no_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    """Embedding them takes longer than its training."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^weights: runs/mask_rcnn/exported [^;]*; make it with [^;]*$"):
        detectors.main(["--config", config, "--check"])


def test_shipped_configs__paths_below_runs_have_a_producer() -> None:
    commands = stage_commands()
    assert commands["runs/text"] == "python -m pretrain.train --config pretrain/text.yaml"
    assert commands["runs/regions"] == "python -m ovd.embed --config embed.yaml"
    assert commands["runs/paper/vild_lvis"] == "python -m ovd.train --config paper/vild_lvis.yaml", "through its base"


class Stage(Section):
    """A configuration with an input and an output."""

    out: str
    weights: str


def test_stages__existing_or_unknown_paths_pass(tmp_path: Path) -> None:
    require_stages(Stage(out="runs/text", weights=f"{tmp_path}/own/exported"))
    require_stages(Stage(out="runs/text", weights=str(tmp_path)))
    require_stages(Stage(out="runs/text", weights="clip-sticker"))
    with pytest.raises(UserError, match=r"or set weights to one you have"):
        require_stages(Stage(out="x", weights="runs/text"))
