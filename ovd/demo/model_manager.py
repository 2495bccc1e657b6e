# SPDX-License-Identifier: Apache-2.0
"""The weights that the page can answer with: one detector is in memory, a request for another one replaces it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.demo.memory import release_idle_memory
from ovd.runtime.files import find_export
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

if TYPE_CHECKING:
    from ovd.detector import Detector
    from ovd.weights import ModelCard

log = logging.getLogger(__name__)

STICKER_ENCODER = "clip-sticker"
KINDS = {"photos": "Photographs", "stickers": "Drawings"}
"""Kind of pictures (and folder of the page's examples) -> its label on the page."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Weights to choose from.

    Attributes:
        name: that the page sends.
        kind: of pictures that they are made for, a key of `KINDS`.
        card: what is known of them, as `ovd.weights.read_model_card` gives it.
        load: loads them.
    """

    name: str
    kind: str
    card: ModelCard
    load: Callable[[], Detector]


class ModelManager:
    """Weights on offer, and the loaded detector. `load` is for the model's thread alone, all else for every thread.

    Args:
        detector: in memory at the start.
        offers: by name, that of the start first; None: no others.
    """

    def __init__(self, detector: Detector, offers: Mapping[str, Offer] | None = None) -> None:
        if not offers:
            name = str(detector.card.get("name", "unnamed"))
            offers = {name: Offer(name=name, kind=kind_of(detector), card=detector.card, load=lambda: detector)}
        self.offers = dict(offers)
        self._loaded = (next(iter(self.offers)), detector)  # one value: name and detector change together

    @property
    def current(self) -> Detector:
        """The detector in memory. Requests that began with another one keep it until they are answered."""
        return self._loaded[1]

    def check(self, name: object) -> str:
        """The name of weights; that of the start for None.

        Raises:
            UserError: there are no such weights here.
        """
        if name is None or name == "":
            return next(iter(self.offers))
        if not isinstance(name, str) or name not in self.offers:
            raise UserError(f"no weights {str(name)[:60]!r} on this page; known: {', '.join(self.offers)}")
        return name

    def loaded_detector(self, name: str) -> Detector | None:
        """The detector of these weights, if it is the one in memory."""
        loaded, detector = self._loaded
        return detector if loaded == name else None

    def load(self, name: str) -> Detector:
        """The detector of these weights, loaded now if another one is in memory.

        Raises:
            UserError: their files are missing or damaged.
        """
        if self.loaded_detector(name) is None:
            log.info("loading %s", name)
            self._loaded = (name, self.offers[name].load())
            release_idle_memory()
        return self.current


def kind_of(detector: Detector) -> str:
    """Kind of pictures that a detector is made for, by its encoder."""
    card = detector.model.card
    return "stickers" if card is not None and card.encoder == STICKER_ENCODER else "photos"


def manager_of(weights: str | Path, load: Callable[[str | Path], Detector]) -> ModelManager:
    """A manager with these weights loaded, and the shipped ones on offer.

    Args:
        weights: name or folder, as for `ovd.Detector.load`.
        load: loads a detector.

    Raises:
        UserError: of ``load``.
    """
    detector = load(weights)
    name = str(detector.card.get("name", "unnamed"))
    first = Offer(name=name, kind=kind_of(detector), card=detector.card, load=lambda: load(weights))
    return ModelManager(detector, {name: first} | {offer.name: offer for offer in _shipped(load) if offer.name != name})


def _shipped(load: Callable[[str | Path], Detector]) -> list[Offer]:
    from ovd.weights import read_manifest, read_model_card

    offers = []
    try:
        entries = read_manifest()
    except UserError:
        return []
    for entry in entries.values():
        settings = entry.folder / "model.json"
        try:
            encoder = read_json(settings).get("encoder") if settings.is_file() else None
            card = read_model_card(entry.folder) if encoder is not None else {}
        except (UserError, AttributeError, OSError) as problem:
            log.warning("%s is not offered: %s", entry.name, problem)
            continue
        runs = find_export(entry.folder) is not None or importlib.util.find_spec("torch") is not None
        if encoder is not None and runs:  # else not a detector, or one that needs torch
            kind = "stickers" if encoder == STICKER_ENCODER else "photos"

            def loaded(name: str = entry.name) -> Detector:
                return load(name)

            offers.append(Offer(name=entry.name, kind=kind, card=card | {"name": entry.name}, load=loaded))
    return offers
