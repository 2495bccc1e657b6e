# SPDX-License-Identifier: Apache-2.0
"""Input sizes of the proposal network of a detector of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ovd.inference.region_model import RegionModel
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.weights import ModelCard

MIN_SIDE, MAX_SIDE = 64, 2048


def apply_sides(model: RegionModel, sides: Sequence[int] | None) -> None:
    """Set the input sizes of a model's proposal network (longest sides, in pixels); None keeps its own.

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
    """The model card with the given sides in its ``settings``, so that results of different sides are told apart."""
    if sides is None:
        return card
    return {**card, "settings": f"{card.get('settings', '')} sides {' '.join(map(str, sides))}"}
