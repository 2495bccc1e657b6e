# SPDX-License-Identifier: Apache-2.0
"""A labelled data set in COCO's form, from any format, with its reader's notices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ovd.formats.spec import Kind
from pretrain.data.coco import GroundTruth, check_ground_truth
from pretrain.data.coco_entries import CocoCategory, CocoJson
from pretrain.engine.errors import UserError

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Tools' names of the parts of a data set → ours. Roboflow's folder of validation is ``valid``."""

QUOTED = 8  # mistakes quoted in one message


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A labelled data set.

    Attributes:
        content: COCO's form: images, annotations, categories; ``file_name`` is relative to ``root``, an image's
            ``split`` is its part.
        root: folder of the pictures.
        kind: of the files it was read from.
        where: they, for messages.
        notices: what was odd in them.
    """

    content: CocoJson
    root: Path
    kind: Kind
    where: str
    notices: list[str] = field(default_factory=list)

    def truth(self) -> GroundTruth:
        """The checked form, with the notices of the reader among its warnings.

        Raises:
            UserError: see `pretrain.data.coco.check_ground_truth`.
        """
        truth = check_ground_truth(self.content, where=self.where)
        truth.warnings[:0] = self.notices
        return truth


class Notes:
    """Mistakes and oddities of label files, each with file and line.

    Args:
        where: the data set, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._mistakes: list[str] = []
        self._odd: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def mistake(self, location: str, text: str) -> None:
        """Note something that makes the data set unusable."""
        self._mistakes.append(f"{location}: {text}")

    def odd(self, text: str, location: str) -> None:
        """Count an oddity: ``text`` follows the number."""
        self._odd[text] += 1
        self._first.setdefault(text, location)

    def raise_mistakes(self) -> None:
        """Raise if any mistake was noted.

        Raises:
            UserError: with the first of them.
        """
        if not self._mistakes:
            return
        if len(self._mistakes) == 1:
            raise UserError(self._mistakes[0])
        unlisted = len(self._mistakes) - QUOTED
        more = [f"and {unlisted} more"] if unlisted > 0 else []
        raise UserError(
            "\n  ".join([f"{len(self._mistakes)} mistakes in {self.where}:", *self._mistakes[:QUOTED], *more])
        )

    def notices(self) -> list[str]:
        """The oddities, counted."""
        return [f"{count} {text} (first: {self._first[text]})" for text, count in self._odd.items()]


def choose_parts(parts: Iterable[str], part: str | None, prefer: Sequence[str], where: str) -> frozenset[str]:
    """The requested parts of a data set.

    Args:
        parts: those it has, some of which may be ``""``: pictures of no part.
        part: the requested one, by any of the names that tools use; ``all``: every one.
        prefer: without ``part`` the first of these that it has; none of them or empty: all.
        where: the data set, for the message.

    Raises:
        UserError: no such part.
    """
    named = list(dict.fromkeys(parts))
    if part == "all":
        return frozenset(named)
    if part is not None:
        requested = part if part in named else PART_NAMES.get(part.lower(), part)
        if requested not in named:
            listed = ", ".join(filter(None, named)) or "it has no parts"
            raise UserError(f"{where}: no part {part!r} (there: {listed}); 'all' takes all pictures")
        return frozenset([requested])
    chosen = next((name for name in prefer if name in named), None)
    return frozenset(named) if chosen is None else frozenset([chosen])


def coco_categories(names: Mapping[int, str] | Sequence[str]) -> list[CocoCategory]:
    """COCO's categories of class indices 0, 1, …, with ids from 1."""
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    return [{"id": index + 1, "name": name} for index, name in pairs]
