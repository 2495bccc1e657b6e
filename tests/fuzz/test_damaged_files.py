# SPDX-License-Identifier: Apache-2.0
"""Damaged pictures, checkpoints, word lists, configurations and region stores.

The right answer, or one line that names the file; never a traceback, never a wrong answer.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ovd.config_detr import TRAIN_CONFIGS
from ovd.regions.layout import Identity, StoreSettings
from ovd.regions.store import RegionStore
from ovd.regions.writer import write_regions
from ovd.vocabulary import Vocabulary
from pretrain.config import PretrainConfig
from pretrain.data.folder import read_image
from pretrain.engine import checkpoint
from pretrain.engine.checkpoint import pack
from pretrain.engine.config import load_config
from pretrain.engine.config_yaml import find_config
from pretrain.engine.errors import BadImageError, ConfigError, UserError
from pretrain.nets.checkpoints import read_tensors
from tests.fuzz.damage import FUZZ, assert_one_line, broken, documents
from tests.regions.fakes import NoisePictures, RandomProposer, TinyEncoder

HEIGHT, WIDTH = 12, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@contextmanager
def written(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


# --- pictures


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a picture"
    options: dict[str, Any] = {"JPEG": {"exif": exif}, "PNG": {"exif": exif}, "WEBP": {"exif": exif}}.get(kind, {})
    if kind == "P":
        picture.quantize(8).save(buffer, "PNG", transparency=2)
    elif kind == "I;16":
        Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200).save(buffer, "PNG")
    elif kind == "progressive":
        picture.save(buffer, "JPEG", progressive=True, quality=60)
    else:
        picture.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "P", "I;16", "progressive")]


@FUZZ
@given(data=st.sampled_from(PICTURES).flatmap(broken))
def test_fuzz__any_picture_is_pixels_or_a_bad_image(data: bytes) -> None:
    for options in ({}, {"alpha": True}, {"max_side": 8}):
        with written("picture.jpg", data) as path:
            try:
                pixels = read_image(path, **options)  # type: ignore[arg-type]
            except BadImageError as error:
                assert_one_line(error, "picture.jpg")
            else:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and 0 not in pixels.shape


# --- checkpoints

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


WEIGHTS = [
    pack(TENSORS, {"format": "x"}),
    saved({"state_dict": TENSORS, "epoch": 3}),
    saved(TENSORS, _use_new_zipfile_serialization=False),
    saved({"state_dict": TENSORS, "best": np.float64(0.5)}),
]


@FUZZ
@given(data=st.sampled_from(WEIGHTS).flatmap(broken), name=st.sampled_from(["w.safetensors", "w.pth"]))
def test_fuzz__any_weight_file_is_tensors_or_one_line(data: bytes, name: str) -> None:
    with written(name, data) as path:
        try:
            assert all(isinstance(value, torch.Tensor) for value in read_tensors(path).values())
        except UserError as error:
            assert_one_line(error, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a run."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        model = {"weight": torch.full((4,), float(step))}
        checkpoint.save(root, step=step, model=model, state={"step": step}, meta={"config": {"a": 1}}, keep=2)
    return root


@FUZZ
@given(data=st.data(), name=st.sampled_from(["meta.json", "model.safetensors", "state.pt"]))
def test_fuzz__a_damaged_checkpoint_is_noticed_and_the_one_before_is_read(
    run: Path, data: st.DataObject, name: str
) -> None:
    file = run / "step_2" / name
    good = file.read_bytes()
    damaged = data.draw(broken(good))
    try:
        file.write_bytes(damaged)
        warnings: list[str] = []
        found = checkpoint.newest(run, warn=warnings.append)
        assert found is not None
        model, state = checkpoint.load_state(found)
        assert found.step == state["step"] == model["weight"][0] == (2 if damaged == good else 1)
        assert len(warnings) == (damaged != good) and all("step_2" in text and "\n" not in text for text in warnings)
    finally:
        file.write_bytes(good)


# --- word lists

WORDS = [
    b"dog, cat; zebra\nmug: cup, coffee mug\n-poster\n",
    "\ufeff花，车；mug：cup\n－poster".encode(),
    b'["dog", "cat"]',
    b'{"format": "ovd-vocabulary-1", "classes": [{"name": "dog", "synonyms": ["puppy"], "negative": false}],'
    b' "templates": ["a {}"], "this_is": false, "parity": false}',
    b"train: images\nnc: 2\nnames:\n  0: dog\n  1: cat\n",
    b'{"categories": [{"id": 1, "name": "dog"}]}',
]


@FUZZ
@given(
    data=st.one_of(
        st.sampled_from(WORDS).flatmap(broken), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
    ),
    suffix=st.sampled_from([".txt", ".json", ".yaml"]),
)
@example(data=b"&a [*a, *a]", suffix=".yaml")
@example(data=b"names: &a\n  - *a", suffix=".yaml")
@example(data=b"[" * 5000, suffix=".yaml")
@example(data=b'{"categories": null}', suffix=".json")
def test_fuzz__any_word_list_is_words_that_round_trip_or_one_line(data: bytes, suffix: str) -> None:
    with written(f"words{suffix}", data) as path:
        try:
            words = Vocabulary.load(path)
        except UserError as error:
            assert_one_line(error, path.name)
            return
        assert words.names and all(isinstance(name, str) for name in words.names)
        words.save(path.with_name("saved.json"))
        assert Vocabulary.load(path.with_name("saved.json")) == words


# --- configurations

CONFIGS = [
    (PretrainConfig, "pretrain/simclr.yaml"), (PretrainConfig, "paper/clip.yaml"), (PretrainConfig, "paper/swav.yaml"),
    (TRAIN_CONFIGS, "vild.yaml"), (TRAIN_CONFIGS, "updetr.yaml"), (TRAIN_CONFIGS, "photos/lite_proposals.yaml"),
]  # fmt: skip


@FUZZ
@given(data=st.data(), which=st.sampled_from(range(len(CONFIGS))))
def test_fuzz__any_configuration_is_read_or_every_mistake_is_named(data: st.DataObject, which: int) -> None:
    model, name = CONFIGS[which]
    content = yaml.safe_load(find_config(name).read_text())
    content.pop("base", None)
    if data.draw(st.booleans()):
        text = yaml.safe_dump(data.draw(documents(content)), allow_unicode=data.draw(st.booleans())).encode(
            "utf-8", "replace"
        )
    else:
        text = data.draw(broken(find_config(name).read_bytes()))
    with written("mine.yaml", text) as path:
        try:
            load_config(model, path)  # type: ignore[type-var]
        except ConfigError as error:
            for problem in error.problems:
                assert len(problem) < 2_000
                assert "mine.yaml" in problem or "base" in problem or any(k in problem for k in ("method", "model")), (
                    problem
                )


# --- region stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    pictures, encoder = NoisePictures(5), TinyEncoder()
    settings = StoreSettings(proposals_per_image=4, crop_size=16, images_per_shard=2)
    identity = Identity(encoder="e", dim=16, proposals="p", source="s", settings=settings)
    write_regions(root, source=pictures, proposer=RandomProposer(), encoder=encoder, identity=identity)
    return root


def content_of(store: Path) -> list[Any]:
    opened = RegionStore.open(store)
    return [[image_id, *(part.tolist() for part in opened[image_id])] for image_id in opened]


@FUZZ
@given(data=st.data())
def test_fuzz__a_damaged_store_is_refused_found_by_verify_or_unchanged(store: Path, data: st.DataObject) -> None:
    whole = content_of(store)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(store, Path(folder) / "store"))
        file = data.draw(st.sampled_from(sorted(path for path in copy.iterdir() if path.is_file())))
        file.write_bytes(data.draw(broken(file.read_bytes())))
        try:
            found = content_of(copy)
            assert found == whole or RegionStore.open(copy).verify()
        except UserError as error:
            assert_one_line(error, file.name, "region store", "store")
