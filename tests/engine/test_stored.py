# SPDX-License-Identifier: Apache-2.0
"""Cards of exported folders that somebody edited: read as they are meant, or one line with file and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ovd.modeling.export import DetectorCard, exported_tensors, read_card, write_card
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    card = DetectorCard(
        model={"arch": "mask_rcnn", "variant": "text"}, embed_dim=4, pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0), encoder="clip-photo", encoder_fingerprint="0", short_side=32, long_side=64,
        classes=("cat", "dog"), novel=(1,), background_words=("sky", "grass", "sea"), calibration={"slope": 1.5},
        config_hash="0",
    )  # fmt: skip
    write_card(tmp_path, card)
    save_weights(tmp_path / "model.safetensors", {"bank": torch.ones(3, 4), "model.a": torch.ones(2)}, {})
    return tmp_path


def test_card__round_trip_with_weights(folder: Path) -> None:
    state, bank = exported_tensors(folder, read_card(folder))
    assert list(state) == ["a"] and bank.shape == (3, 4)


def put(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda card: card.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(embed_dim="4"), "embed_dim: '4' is not a whole number"),
        (put(embed_dim=True), "embed_dim"),
        (put(embed_dim=0), "embed_dim"),
        (put(pixel_std=[1, 0, 1]), "pixel_std"),
        (put(pixel_mean=[1, 2]), "pixel_mean"),
        (put(pixel_mean=None), "pixel_mean"),
        (put(classes=["cat", 2]), "classes"),
        (put(classes="cat"), "classes"),
        (put(novel=[2]), "novel"),
        (put(long_side=8), "short_side"),
        (put(long_side=1_000_000), "short_side"),
        (put(own=[{"names": ["a"], "file": "x", "sha256": "0", "side": 10**6, "nms": 0.6, "top": 9}]), "own"),
        (put(calibration={"slope": float("nan")}), "calibration.slope: nan is not a finite number"),
        (put(calibration={"slope": "1"}), "calibration.slope"),
        (put(calibration={"threshold": 2}), "calibration.threshold"),
        (put(calibration={"open_conse": 5}), "calibration.open_conse"),
        (put(calibration={"open_fallback": 2}), "calibration.open_fallback"),
        (put(calibration={"slop": 1}), "calibration.slop"),
        (put(calibration=[]), "calibration"),
        (put(model="x"), "model"),
        (put(templates="x"), "templates"),
        (put(own=[{"file": "x"}]), "'names' is missing"),
        (put(own=[{"names": ["a"], "file": "x", "sha256": "0", "side": "416", "nms": 0.6, "top": 9}]), "side"),
        (lambda card: card.pop("encoder"), "encoder"),
        (put(more=1), "more"),
    ],
)
def test_card__meaningless_value_is_named_by_key(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    card = json.loads((folder / "model.json").read_text())
    change(card)
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=rf"model\.json: .*{message}"):
        read_card(folder)


@pytest.mark.parametrize(
    "model", [{"arch": "fvlm", "side": "x"}, {"arch": "nothing"}, {"arch": "mask_rcnn", "more": 1}]
)
def test_card__invalid_architecture_is_named_by_key(model: dict[str, object], folder: Path) -> None:
    card = json.loads((folder / "model.json").read_text()) | {"model": model}
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"model\.json: model\.(side|arch|more): "):
        read_card(folder).architecture  # noqa: B018


@pytest.mark.parametrize("bank", [None, torch.ones(2, 4), torch.ones(3, 5), torch.ones(4), torch.ones(3, 4).int()])
def test_card__background_words_need_embeddings(bank: torch.Tensor | None, folder: Path) -> None:
    save_weights(
        folder / "model.safetensors", {"model.a": torch.ones(2)} | ({} if bank is None else {"bank": bank}), {}
    )
    with pytest.raises(UserError, match=r"model\.safetensors: bank must hold the embeddings of .* \[3, 4\] numbers"):
        exported_tensors(folder, read_card(folder))


def test_export__weights_that_are_nan_are_named(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {"good": torch.ones(3), "spoilt": torch.tensor([1.0, float("nan")], dtype=dtype)}
        save_weights(tmp_path / "w.safetensors", tensors, {})
        with pytest.raises(UserError, match=r"w\.safetensors: spoilt holds values that are no numbers"):
            load_weights(tmp_path / "w.safetensors")
