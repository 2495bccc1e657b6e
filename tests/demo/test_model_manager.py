# SPDX-License-Identifier: Apache-2.0
"""Weights to choose from: one detector in memory at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from ovd.demo.answer import Answerer
from ovd.demo.model_manager import ModelManager, Offer, manager_of
from ovd.detector import Detector
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector


def named(name: str, threshold: float) -> Detector:
    detector = make_detector(threshold=threshold)
    detector.card["name"] = name
    return detector


def offer(name: str, threshold: float, loads: list[str]) -> Offer:
    def load() -> Detector:
        loads.append(name)
        return named(name, threshold)

    return Offer(name=name, kind="photos", card={"name": name}, load=load)


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def manager(loads: list[str]) -> ModelManager:
    return ModelManager(named("one", 0.3), {o.name: o for o in (offer("one", 0.3, loads), offer("two", 0.6, loads))})


def test_weights__loaded_on_demand_replace_the_others(
    manager: ModelManager, loads: list[str], pictures: dict[str, Path]
) -> None:
    first = weakref.ref(manager.current.model)
    answerer = Answerer(manager=manager)
    assert answerer.answer(pictures["good"], "red")["model"]["name"] == "one" and loads == []
    for _ in range(2):
        assert answerer.answer(pictures["good"], "red", weights="two")["threshold"] == 0.6
    assert loads == ["two"]
    gc.collect()
    assert first() is None  # the memory of the first is free
    assert answerer.answer(pictures["good"], "red", weights=None)["model"]["name"] == "one"
    assert loads == ["two", "one"]


def test_weights__not_offered_are_refused(manager: ModelManager, pictures: dict[str, Path]) -> None:
    for wrong in ("three", 3, ["one"], "../one"):
        with pytest.raises(UserError, match="known: one, two"):
            Answerer(manager=manager).answer(pictures["good"], "red", weights=wrong)


def test_weights__failed_load_keeps_the_current_ones(manager: ModelManager, pictures: dict[str, Path]) -> None:
    def broken() -> Detector:
        raise UserError("weights 'two' are not as shipped")

    manager.offers["two"] = Offer(name="two", kind="photos", card={}, load=broken)
    answerer = Answerer(manager=manager)
    with pytest.raises(UserError, match="not as shipped"):
        answerer.answer(pictures["good"], "red", weights="two")
    assert answerer.answer(pictures["good"], "red")["model"]["name"] == "one"


def test_weights__shipped_ones_are_offered_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovd.weights import add_weights

    for name, encoder in (("mine", None), ("drawn", "clip-sticker"), ("photo", "clip-photo")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
        if encoder:
            (tmp_path / name / "model.json").write_text(f'{{"encoder": "{encoder}"}}')
        add_weights(tmp_path / name, name, tmp_path / "weights")
    monkeypatch.setenv("OVD_WEIGHTS", str(tmp_path / "weights"))
    asked: list[Any] = []

    def load(weights: str | Path) -> Detector:
        asked.append(weights)
        return named("own", 0.3)

    manager = manager_of("some/folder", load)
    assert {name: o.kind for name, o in manager.offers.items()} == {
        "own": "photos",
        "drawn": "stickers",
        "photo": "photos",
    }
    manager.load("drawn")
    manager.load("own")
    assert asked == ["some/folder", "drawn", "some/folder"]
