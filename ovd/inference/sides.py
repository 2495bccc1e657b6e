# SPDX-License-Identifier: Apache-2.0
"""The sizes at which a detector of photographs looks for boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ovd.inference.region_model import RegionModel
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.weights import ModelCard

MIN_SIDE, MAX_SIDE = 64, 2048


def apply_sides(model: RegionModel, sides: Sequence[int] | None) -> None:
    """Let a model's proposal network look at a photo with these longest sides, in place of its own; None: leave them.

    A photo is enlarged by a third at most, whatever is given (`ovd.modeling.proposals.build.MAX_ENLARGEMENT`).

    Raises:
        UserError: sides out of range, or a detector that has one input size.
    """
    if sides is None:
        return
    if not sides or not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise UserError(f"sides {list(sides)}: one or more numbers of {MIN_SIDE} to {MAX_SIDE} pixels")
    model.set_sides(tuple(dict.fromkeys(sides)))


def card_with_sides(card: ModelCard, sides: Sequence[int] | None) -> ModelCard:
    """A model card whose ``settings`` tell the sides that were given: results of others must not pass for these."""
    if sides is None:
        return card
    return {**card, "settings": f"{card.get('settings', '')} sides {' '.join(map(str, sides))}"}
