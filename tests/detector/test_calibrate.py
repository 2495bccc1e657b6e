# SPDX-License-Identifier: Apache-2.0
"""``ovd.calibrate``: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ovd import calibrate
from ovd.weights import detector_folder
from pretrain.engine.errors import UserError


def test_calibrate__writes_card_figures_and_diagram(tmp_path: Path) -> None:
    folder, report, plot = tmp_path / "detector", tmp_path / "report.json", tmp_path / "curve.svg"
    shutil.copytree(detector_folder("vild-sticker"), folder)
    before = json.loads((folder / "model.json").read_text())
    arguments = ["--weights", str(folder), "--second-look", "0", "--scenes", "10", "--size", "128"]
    assert calibrate.main([*arguments, "--report", str(report), "--plot", str(plot)]) == 0
    after, written = json.loads((folder / "model.json").read_text()), json.loads(report.read_text())
    assert after["calibration"] == written["calibration"] != before["calibration"]
    assert after["crop_refinement"] == written["crop_refinement"] == 0
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed <= {"calibration", "crop_refinement"} and "second_look" not in after
    figures = written["other_scenes"]
    assert figures["scenes"] == 10 and 0 <= figures["ece"] <= 1 and 0 < figures["average_precision"] < 1
    assert 0 < written["calibration"]["threshold"] < 1
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_calibrate__unusable_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder with a model\.json"):
        calibrate.main(["--weights", str(tmp_path)])
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="3 must be at least 10"):
        calibrate.main(["--weights", str(tmp_path), "--scenes", "3"])


@pytest.mark.parametrize("flags", [["--labels", "table.json"], ["--part", "val"]])
def test_calibrate__photo_flags_need_a_photo_detector(flags: list[str]) -> None:
    weights = ["--weights", str(detector_folder("vild-sticker"))]
    with pytest.raises(UserError, match="need --data"):
        calibrate.main([*weights, *flags])
    with pytest.raises(UserError, match=r"for detectors of photographs .* part is named in --data: FILE:PART"):
        calibrate.main([*weights, "--data", "boxes.json", *flags])
