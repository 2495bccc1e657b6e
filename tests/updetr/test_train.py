# SPDX-License-Identifier: Apache-2.0
"""The commands: dispatch, configurations, a cache that changes nothing, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovd.config import TrainConfig
from ovd.config_detr import TRAIN_CONFIGS, DetrConfig, DetrTrainConfig
from ovd.data.cached_features import META, CachedPatches, FeatureCache, Readable, files_of
from ovd.modeling.detr.task import DetrTask
from ovd.modeling.detr.updetr import PatchPretext
from ovd.modeling.task import DetectionTask
from pretrain.engine.cli import command_line
from pretrain.engine.config import LoopConfig, OptimConfig, load_config
from pretrain.engine.errors import BadImageError, ConfigError, UserError
from pretrain.engine.loop import fit
from tests.updetr.small import C, make, patch_batch, picture, region_tower

ROOT = Path(__file__).resolve().parents[2]


def pretext(**changes: Any) -> PatchPretext:
    model = make("conditional", variant="agnostic")
    return PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0]), **changes)


class Samples:
    """A source of fixed samples."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, draw: int) -> dict[str, Any]:
        return self.samples[index]

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return samples


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--config", "updetr.yaml"], DetrTrainConfig),
        (["--config=detr.yaml", "loop.steps=3000"], DetrTrainConfig),
        (["--config", "ov_detr"], DetrTrainConfig),  # arch stands in its base
        (["--config", "paper/detr_voc.yaml", "data.images=x", "data.annotations=y"], DetrTrainConfig),
        (["--config", "vild.yaml", "regions=x"], TrainConfig),
        (["--config", "mask_rcnn.yaml", "model.arch=mask_rcnn"], TrainConfig),
    ],
)
def test_command__the_arch_of_a_configuration_chooses_what_it_is_read_as(argv: list[str], kind: type) -> None:
    config, _ = command_line(TRAIN_CONFIGS, argv, prog="train", doc="")
    assert type(config) is kind


def test_command__unknown_arch_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  arch: conditionl\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: model\.arch: expected one of mask_rcnn.*'conditional'"):
        command_line(TRAIN_CONFIGS, ["--config", str(file)], prog="train", doc="")
    with pytest.raises(ConfigError, match=r"override 'model.arch=3': model\.arch: expected one of"):
        command_line(TRAIN_CONFIGS, ["--config", "detr.yaml", "model.arch=3"], prog="train", doc="")


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--help-all"], "anchor_sizes"),
        (["--config", "detr.yaml", "--help-all"], "decoder_layers"),
        (["--help", "model", "--config", "detr.yaml"], "decoder_layers"),
        (["model.arch=detr", "--help", "model.queries"], "object queries"),
        (["--config", "no_such.yaml", "--help-all"], "anchor_sizes"),
    ],
)
def test_command__help_shows_the_keys_of_the_architecture(
    argv: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(TRAIN_CONFIGS, argv, prog="train", doc="")
    assert key in capsys.readouterr().out


def test_configs__a_removed_key_of_an_older_run_is_read_where_it_changed_nothing() -> None:
    old = DetrConfig.model_validate({"arch": "conditional", "crop_conditions": 0.0})
    assert old == DetrConfig(arch="conditional")


@pytest.mark.parametrize(
    "name",
    [
        "updetr",
        "detr",
        "ov_detr",
        "paper/updetr",
        "paper/detr",
        "paper/detr_300",
        "paper/detr_voc",
        "paper/detr_voc_300",
    ],
)
def test_configs__are_valid(name: str) -> None:
    load_config(DetrTrainConfig, ROOT / "configs" / f"{name}.yaml")


def test_configs__hold_the_published_recipe() -> None:
    up = load_config(DetrTrainConfig, ROOT / "configs/paper/updetr.yaml")
    assert up.pretext is not None
    assert (up.pretext.patches.count, up.model.queries, up.pretext.grouped, up.pretext.shuffle) == (
        10,
        100,
        False,
        True,
    )
    assert up.loop.steps == round(60 * 1_281_167 / 256) and up.optim.milestones == (round(40 * 1_281_167 / 256),)
    fine = load_config(DetrTrainConfig, ROOT / "configs/paper/detr.yaml")
    assert fine.optim.lr * fine.pretrained_lr_scale == pytest.approx(5e-5)
    assert not fine.model.backbone.frozen and fine.model.backbone.freeze_at == 2, "stem and first stage stay (DETR)"
    cut, data = fine.data.cut, fine.data
    assert cut is not None and (cut.probability, cut.short_sides, cut.sides) == (0.5, (400, 500, 600), (384, 600))
    assert [data.short_side * factor for factor in data.scale] == [480, 800] and data.long_side == 1333
    assert fine.model.model_dump(exclude={"variant", "backbone", "loss"}) == up.model.model_dump(
        exclude={"variant", "backbone", "loss"}
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretext.patches.count=60"], "at least as many model.queries"),
        (["model.backbone.frozen=false"], "frozen backbone"),
        (["data.scale=[0.5, 1.0]"], "flips only"),
        (["data.cut={}", "pretext=null", "model.variant=text", "model.embed_space=clip"], "flips only"),
        (["data.cut={}", "cache=null"], "training on labels"),
        (["model.variant=text", "pretext=null", "model.embed_space=ssl"], "embed_space clip"),
        (["model.arch=detr", "model.denoising=1"], "start from anchors"),
        (["model.heads=3"], "not divisible"),
        (["model.crop_conditions=0.5"], "crop_conditions was removed"),
    ],
)
def test_configs__contradictions_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DetrTrainConfig, ROOT / "configs/updetr.yaml", overrides)


def test_cache__features_and_embeddings_give_the_same_losses_and_the_same_boxes(tmp_path: Path) -> None:
    task = pretext(mask_queries=0.0)
    model = task.detr
    batch = patch_batch(4, 3)
    calls: list[list[int]] = []

    def compute(indices: list[int]) -> dict[str, Any]:
        calls.append(indices)
        samples = [batch[i] for i in indices]
        with torch.no_grad():
            maps = model.maps(model.normalised(torch.stack([s["image"] for s in samples])))
            z = task.patch_embeddings(samples)
        return {
            **{name: value.numpy() for name, value in maps.items()},
            "size": np.array([s["size"] for s in samples]),
            "patch_boxes": np.stack([s["boxes"].numpy() for s in samples])[:, None],
            "patch_embeddings": z.numpy()[:, None],
        }

    task.train()
    given: dict[str, Any] = {"key": {"what": "test"}, "count": 4, "compute": compute, "batch": 3}
    first = FeatureCache.open(tmp_path, **given)
    again = FeatureCache.open(tmp_path, **given)
    assert calls == [[0, 1, 2], [3]]  # computed once
    assert len(again) == 4 and len(first) == 4
    source = CachedPatches(cache=again, features=("res4",))
    cached = [source.sample(i, 0) for i in range(4)]
    plain, quick = task(batch), task(cached)
    assert float(quick[0]) == pytest.approx(float(plain[0]), abs=1e-5)
    for name, value in plain[1].items():
        assert float(quick[1][name]) == pytest.approx(float(value), abs=1e-5)
    FeatureCache.open(tmp_path, **{**given, "key": {"what": "other"}})
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["rows.npy", META])
@pytest.mark.parametrize("left", [0, 90])
def test_cache__a_damaged_one_is_named(name: str, left: int, tmp_path: Path) -> None:
    given: dict[str, Any] = {"key": {}, "count": 4, "compute": lambda i: {"rows": np.zeros((len(i), 64), np.float32)}}
    FeatureCache.open(tmp_path, **given)
    (file,) = tmp_path.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:left] if left < file.stat().st_size else b"{}")
    with pytest.raises(UserError, match=rf"cache {file.parent}: is damaged .*; remove it"):
        FeatureCache.open(tmp_path, **given)


def test_cache__half_features_train_under_bfloat16_autocast() -> None:
    task = pretext().train()
    batch = patch_batch(2, 3)
    with torch.no_grad():
        maps = task.detr.maps(task.detr.normalised(torch.stack([s["image"] for s in batch])))
        z = task.patch_embeddings(batch)
    cached = [
        {
            "features": {name: value[n].half() for name, value in maps.items()},
            "size": one["size"],
            "boxes": one["boxes"],
            "embeddings": z[n].half(),
        }
        for n, one in enumerate(batch)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = task(cached)
    loss.backward()
    assert all(torch.isfinite(value) for value in parts.values())
    for name, value in task(cached)[1].items():
        assert float(parts[name]) == pytest.approx(float(value), rel=0.1, abs=0.05), name


def test_cache__pictures_of_several_sizes_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    def compute(indices: list[int]) -> dict[str, Any]:
        return {"res4": np.zeros((len(indices), 2, 3 + indices[0], 3), dtype=np.float32)}

    with pytest.raises(UserError, match="one size"):
        FeatureCache.open(tmp_path, key={}, count=4, compute=compute, batch=2)
    assert list(tmp_path.iterdir()) == []


def test_cache__a_changed_annotation_file_or_picture_is_another_cache(tmp_path: Path) -> None:
    folder, labels = tmp_path / "photos", tmp_path / "labels.json"
    (folder / "deep").mkdir(parents=True)
    picture = folder / "deep" / "a.jpg"
    picture.write_bytes(b"one")
    labels.write_text("{}")
    settings = {"images": str(folder), "annotations": str(labels), "split": "all", "paths": [str(labels)], "seed": 3}
    first = files_of(settings)
    assert set(first) == {"files.images.0", "files.annotations.0", "files.paths.0"} and files_of(settings) == first
    labels.write_text("[]")
    changed = files_of(settings)
    assert (
        changed["files.images.0"] == first["files.images.0"]
        and changed["files.annotations.0"] != first["files.annotations.0"]
    )
    picture.write_bytes(b"another")
    assert files_of(settings)["files.images.0"] != first["files.images.0"]


def test_cache__unreadable_picture_is_replaced_by_the_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = {1, 4, 6, 8}

    def load(index: int) -> int:
        if index in broken:
            raise BadImageError(f"{index}.jpg")
        return index

    readable = Readable(9)
    assert [readable(index, load) for index in (0, 1, 2, 1)] == [0, 2, 2, 2]
    assert capsys.readouterr().err.count("1.jpg") == 1  # said once
    assert [readable(index, load) for index in (4, 6)] == [5, 7]  # three prove nothing, as in the loop
    with pytest.raises(BadImageError, match=r"8\.jpg.*4 of 9"):
        readable(8, load)
    readable = Readable(400)  # four of 400 are one in a hundred
    assert [readable(index, load) for index in (1, 4, 6, 8)] == [2, 5, 7, 9]


def fit_samples(
    task: DetectionTask, samples: list[dict[str, Any]], out: Path, steps: int, resume: bool, **loop: Any
) -> None:
    fit(
        task,
        Samples(samples),
        loop=LoopConfig(
            steps=steps, batch_size=2, workers=0, log_every=2, save_every=3, device="cpu", threads=1, **loop
        ),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
        out=out,
        record={"steps": "any"},
        resume=resume,
    )


def run(out: Path, steps: int, *, resume: bool = False) -> PatchPretext:
    torch.manual_seed(5)
    task = pretext(mask_queries=0.3, shuffle=True, held_out=[patch_batch(2, 3, seed=9)], evaluate_every=2)
    fit_samples(task, patch_batch(5, 3), out, steps, resume, clip_norm=0.1)
    return task


def test_resume__a_pretext_that_was_interrupted_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all("patch_miou" in line for line in lines)


def train(out: Path, steps: int, *, resume: bool = False) -> DetrTask:
    torch.manual_seed(5)
    model = make("conditional", denoising=2, conditioned=3, region_tower=region_tower(), dropout=0.1)
    task = DetrTask(model=model, pretrained_lr_scale=0.1)
    boxes = [[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]]
    pictures = [picture(64, 64, boxes[: 1 + n % 2], [n % C, (n + 1) % C][: 1 + n % 2], seed=n) for n in range(5)]
    fit_samples(task, pictures, out, steps, resume)
    return task


def test_resume__detr_with_all_parts_is_bit_exact(
    tmp_path: Path,
) -> None:
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed = train(tmp_path / "parts", 6, resume=True)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
