# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.embed`` and its picture sources, with a small encoder of random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovd import embed
from ovd.regions.crops import embed_regions
from ovd.regions.images import CocoPictures, FolderPictures, ScenePictures
from ovd.regions.store import RegionStore
from pretrain.config import EncoderConfig, ResNetTower
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import BadImageError, ConfigError, UserError
from pretrain.nets.encoders import load_encoder
from pretrain.nets.towers import JointEncoder, build_encoder

REPOSITORY = Path(__file__).resolve().parents[2]


def make_encoder(folder: Path, seed: int = 0) -> JointEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = build_encoder(EncoderConfig(embed_dim=12, image=ResNetTower(image_size=16)))
    encoder.save(folder)
    return load_encoder(folder)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (root / "sub").mkdir()
    entries, annotations = [], []
    for i, name in enumerate(("a.png", "sub/b.png", "c.png")):
        Image.fromarray(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)).save(root / name)
        entries.append({"id": 70 - i, "file_name": name, "height": 40 + i, "width": 60})
        annotations.append(
            {"id": 2 * i, "image_id": 70 - i, "category_id": 1, "bbox": [5, 6, 20, 10 + i], "iscrowd": 0}
        )
        annotations.append(
            {"id": 2 * i + 1, "image_id": 70 - i, "category_id": 1, "bbox": [0, 0, 60, 40], "iscrowd": 1}
        )
    data = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "noise"}]}
    (root / "gt.json").write_text(json.dumps(data))
    return root


def coco(photos: Path, encoder_folder: Path, out: Path, *more: str) -> list[str]:
    return [
        f"out={out}",
        "proposer=ground-truth",
        f"encoder={encoder_folder}",
        "pictures.kind=coco",
        f"pictures.images={photos}",
        f"pictures.annotations={photos / 'gt.json'}",
        "images_per_shard=2",
        "proposals_per_image=4",
        *more,
    ]


def test_embed__coco_pictures_end_in_a_store_read_by_coco_id(
    photos: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    assert embed.main(coco(photos, encoder_folder, tmp_path / "s")) == 0
    encoder = load_encoder(encoder_folder)
    store = RegionStore.open(
        tmp_path / "s",
        encoder_fingerprint=encoder.fingerprint(),
        proposals_fingerprint=f"ground-truth:{CocoPictures(photos / 'gt.json', photos).boxes_fingerprint()}",
    )
    assert list(store) == [70, 69, 68]
    boxes, embeddings, scores = store[69]
    assert boxes.tolist() == [[5, 6, 25, 17]] and scores.tolist() == [1]  # the crowd is no proposal
    image = np.asarray(Image.open(photos / "sub" / "b.png"))
    assert torch.allclose(embeddings, embed_regions(encoder, image, boxes), atol=2e-3)


def test_embed__sticker_scenes_end_in_a_store_that_fits_the_training_source(
    encoder_folder: Path, tmp_path: Path
) -> None:
    pictures = ["pictures.length=3", "pictures.size=96", "pictures.seed=5", "proposals_per_image=10"]
    common = [f"out={tmp_path / 's'}", "proposer=ground-truth", f"encoder={encoder_folder}", *pictures]
    assert embed.main(common) == 0
    scenes = SceneSource(Stickers.load(), split="train", seed=5, size=96, length=2, labels="base")
    fits = ScenePictures(scenes)
    store = RegionStore.open(tmp_path / "s", source_fingerprint=fits.fingerprint(), image_ids=fits.ids)
    every = SceneSource(Stickers.load(), split="train", seed=5, size=96, length=3).scene(1)
    assert np.array_equal(np.sort(store[1][0], axis=0), np.sort(every.boxes, axis=0))
    for other in ({"seed": 6}, {"size": 128}, {"split": "val"}):
        values = {"split": "train", "seed": 5, "size": 96, "length": 2, **other}
        fingerprint = ScenePictures(SceneSource(Stickers.load(), **values)).fingerprint()
        with pytest.raises(UserError, match="source: it has"):
            store.require(source_fingerprint=fingerprint)


def test_embed__another_encoder_is_refused_by_name(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    assert embed.main(coco(photos, encoder_folder, tmp_path / "s")) == 0
    make_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="encoder: it has"):
        embed.main(coco(photos, tmp_path / "other", tmp_path / "s"))
    with pytest.raises(UserError, match=r"settings.border: it has 'clamp', you have 'fill'"):
        embed.main(coco(photos, encoder_folder, tmp_path / "s", "crops.border=fill"))
    assert embed.main([*coco(photos, tmp_path / "other", tmp_path / "s"), "--overwrite"]) == 0
    assert RegionStore.open(tmp_path / "s").manifest["encoder"] == load_encoder(tmp_path / "other").fingerprint()


def test_embed__the_same_command_again_keeps_what_is_there(
    photos: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ("2 shards written, 0 were whole already", "0 shards written, 2 were whole already"):
        embed.main(coco(photos, encoder_folder, tmp_path / "s"))
        assert expected in capsys.readouterr().out


def test_embed_check__reports_the_size_and_writes_nothing(
    photos: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main([*coco(photos, encoder_folder, tmp_path / "s"), "--check"]) == 0
    assert "3 pictures x 4 proposals x 12 numbers" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


def test_embed_verify__finds_damage(
    photos: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed.main(coco(photos, encoder_folder, tmp_path / "s"))
    assert embed.main(["verify", str(tmp_path / "s")]) == 0
    assert "whole: 3 pictures, 3 regions of 12 numbers" in capsys.readouterr().out
    file = tmp_path / "s" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    assert embed.main(["verify", str(tmp_path / "s")]) == 1
    assert "shard-00001.safetensors: damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["pictures.kind=coco"], "needs pictures.images"),
        (["crops.scales=[1, 9]"], "between 0.1 and 3"),
        (["crops.mode=stretch"], "crops.mode"),
        (["proposals_per_imag=3"], "proposals_per_image"),
    ],
)
def test_embed_config__mistakes_are_named(overrides: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        embed.main([f"out={tmp_path / 's'}", "proposer=ground-truth", *overrides])
    assert not (tmp_path / "s").exists()


def test_embed__ground_truth_of_a_plain_folder_is_refused(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ground-truth needs pictures with boxes"):
        embed.main(
            [
                f"out={tmp_path / 's'}",
                "proposer=ground-truth",
                f"encoder={encoder_folder}",
                "pictures.kind=folder",
                f"pictures.images={photos}",
            ]
        )


def test_embed_config__the_shipped_one_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        embed.main(["--config", str(REPOSITORY / "configs" / "embed.yaml"), "--print-config"])
    assert stop.value.code == 0 and "proposals_per_image" in capsys.readouterr().out


def test_embed__helper_processes_share_the_work(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    arguments = coco(photos, encoder_folder, tmp_path / "s", "processes=2", "threads=1", "images_per_shard=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ovd.embed", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert RegionStore.open(tmp_path / "s").verify() == []
    assert not list((tmp_path / "s").glob("*.lease")) and not list((tmp_path / "s").glob(".*.tmp"))


def test_embed__errors_have_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ovd.embed", "verify", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: ") and "no region store here" in done.stderr and "Traceback" not in done.stderr
    )


# --- picture sources --------------------------------------------------------------------------------------------------


def test_embed__a_folder_is_read_by_relative_path(photos: Path, tmp_path: Path) -> None:
    images = FolderPictures(photos)
    assert list(images.ids) == ["a.png", "c.png", "sub/b.png"]
    assert images.image(2).shape == (41, 60, 3)
    before = images.fingerprint()
    assert FolderPictures(photos).fingerprint() == before
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert FolderPictures(tmp_path).fingerprint() != before


def test_coco_regions__boxes_and_fingerprint(photos: Path, tmp_path: Path) -> None:
    images = CocoPictures(photos / "gt.json", photos)
    assert images.boxes(2).tolist() == [[5, 6, 25, 18]]
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert CocoPictures(moved / "gt.json", moved).fingerprint() == images.fingerprint()  # data sets move
    Image.new("RGB", (60, 41)).save(moved / "a.png")
    assert CocoPictures(moved / "gt.json", moved).fingerprint() != images.fingerprint(), "another picture of that name"
    content = json.loads((moved / "gt.json").read_text())
    content["annotations"][0]["bbox"][0] += 1
    (moved / "gt.json").write_text(json.dumps(content))
    assert CocoPictures(moved / "gt.json", moved).boxes_fingerprint() != images.boxes_fingerprint()
    (moved / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadImageError):
        CocoPictures(moved / "gt.json", moved).image(0)
    with pytest.raises(UserError, match=r"gt\.json: 3 of its 3 pictures are not there, such as .*; is .* the folder"):
        CocoPictures(photos / "gt.json", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"images": [{"id": 1}]}', '{"images": []}'])
def test_coco_regions__a_file_that_is_not_coco_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "gt.json").write_text(text)
    with pytest.raises(UserError, match=r"gt\.json"):
        CocoPictures(tmp_path / "gt.json", tmp_path)
    with pytest.raises(UserError, match="missing.json"):
        CocoPictures(tmp_path / "missing.json", tmp_path)
