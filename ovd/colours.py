# SPDX-License-Identifier: Apache-2.0
"""Colours of classes: chosen by name, not by order, and safe for colour-blind readers.

Palette: Okabe and Ito's (without black), two of Paul Tol's *muted* set, and a violet that is far from all of them with
every kind of colour blindness. A second cue, the dash of the outline, repeats what the hue says.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

PALETTE = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#882255",
    "#9933ff",
    "#332288",
)
# Dash lengths in line widths; () is a solid line.
DASHES: tuple[tuple[int, ...], ...] = ((), (5, 2), (2, 2), (6, 2, 1, 2))


@dataclass(frozen=True)
class ClassStyle:
    """Colour of a class, the ink that can be read on it, and its dash pattern in line widths."""

    colour: str
    ink: str
    dash: tuple[int, ...]

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as 0 to 255."""
        return int(self.colour[1:3], 16), int(self.colour[3:5], 16), int(self.colour[5:7], 16)


def _number(name: str) -> int:
    text = unicodedata.normalize("NFC", name).casefold()
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # WCAG contrast with white is 1.05 / (L + .05), with black (L + .05) / .05; take the larger.
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def class_styles(names: Sequence[str]) -> list[ClassStyle]:
    """Return one style per name.

    A name has a favourite colour; while there are colours left, two names of one vocabulary get different ones. Depends
    on the set of names, not on their order.
    """
    chosen: dict[str, ClassStyle] = {}
    free = set(range(len(PALETTE)))
    for name in sorted(set(names), key=lambda n: (n.casefold(), n)):
        number = _number(name)
        slot = number % len(PALETTE)
        if not free:
            free = set(range(len(PALETTE)))
        while slot not in free:
            slot = (slot + 1) % len(PALETTE)
        free.discard(slot)
        chosen[name] = ClassStyle(PALETTE[slot], _ink(PALETTE[slot]), DASHES[number // len(PALETTE) % len(DASHES)])
    return [chosen[name] for name in names]
