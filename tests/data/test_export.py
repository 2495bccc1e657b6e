# SPDX-License-Identifier: Apache-2.0
"""Scenes written as a COCO data set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pretrain.data.export import export, main
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError


@pytest.fixture(scope="module")
def stickers() -> Stickers:
    return Stickers.load()


def scenes(stickers: Stickers, **changes) -> SceneSource:
    return SceneSource(stickers, **{"split": "val", "seed": 1, "size": 160, "length": 4, **changes})


def test_export__pycocotools_reads_the_same_labels(stickers: Stickers, tmp_path: Path) -> None:
    source = scenes(stickers)
    coco = COCO(str(export(source, tmp_path / "out", image_format="png")))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(stickers.nouns)
    for index in range(4):
        scene = source.scene(index)
        info = coco.loadImgs([index + 1])[0]
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / info["file_name"])), scene.image)
        found = coco.loadAnns(coco.getAnnIds([index + 1]))
        assert [entry["category_id"] - 1 for entry in found] == scene.classes.tolist()
        for entry, mask in zip(found, scene.masks, strict=True):
            decoded = coco.annToMask(entry).astype(bool)
            assert np.array_equal(decoded, mask) and entry["area"] == decoded.sum()
            y, x = np.nonzero(decoded)
            assert entry["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]


def test_export__header_names_its_source(stickers: Stickers, tmp_path: Path) -> None:
    data = json.loads(export(scenes(stickers, labels="base"), tmp_path).read_text(encoding="utf-8"))
    assert data["info"]["split_sha256"] == stickers.split_hash
    assert "CC-BY-4.0" in data["info"]["licence"] == data["licenses"][0]["name"]
    assert {entry["category_id"] - 1 for entry in data["annotations"]} <= stickers.base
    assert {c["id"] - 1 for c in data["categories"] if c["novel"]} == stickers.novel
    ids = [entry["id"] for entry in data["annotations"]]
    assert ids == list(range(1, len(ids) + 1)), "0 is no annotation id: COCO's matcher takes it for unmatched"


def test_export__non_empty_folder_is_refused(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        export(scenes(stickers), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite__replaces_the_earlier_export_only(stickers: Stickers, tmp_path: Path) -> None:
    export(scenes(stickers), tmp_path)
    mine = tmp_path / "val" / "holiday.jpg"
    mine.write_bytes(b"mine")
    target = export(scenes(stickers, length=2), tmp_path, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "val").iterdir()) == ["000001.jpg", "000002.jpg", "holiday.jpg"]
    assert len(json.loads(target.read_text(encoding="utf-8"))["images"]) == 2 and mine.read_bytes() == b"mine"


def test_overwrite__never_deletes_outside_the_folder(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    out = tmp_path / "out"
    target = export(scenes(stickers, length=1), out)
    data = json.loads(target.read_text(encoding="utf-8"))
    data["images"][0]["file_name"] = "../precious.txt"
    target.write_text(json.dumps(data), encoding="utf-8")
    export(scenes(stickers, length=1), out, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_export__file_in_place_of_the_folder_is_refused(stickers: Stickers, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(scenes(stickers), tmp_path / "file", overwrite=True)


def test_export__command_writes_jpegs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--split", "val", "--count", "2", "--size", "96", "--out", str(tmp_path / "x")]
    assert main(args) == 0
    assert "2 scenes" in capsys.readouterr().out
    with Image.open(tmp_path / "x" / "val" / "000002.jpg") as image:
        assert image.format == "JPEG" and image.size == (96, 96)


def test_export__command_errors_have_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-m", "pretrain.data.stickers", "--split", "val", "--out", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
