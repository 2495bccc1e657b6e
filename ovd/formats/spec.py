# SPDX-License-Identifier: Apache-2.0
"""How a command line names a labelled data set. Imports nothing that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["coco", "yolo", "voc"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """A data set as a command line names it: ``data.yaml``, ``folder:val``, ``voc:folder``, ``yolo:data.yaml:test``."""

    path: Path
    kind: Kind | None = None
    part: str | None = None

    @classmethod
    def parse(cls, text: str) -> LabelSpec:
        """Read ``[KIND:]PATH[:PART]``; a path that exists as it is written is one."""
        head, colon, remainder = text.partition(":")
        kind = next((name_of_kind for name_of_kind in KINDS if colon and head == name_of_kind), None)
        name = remainder if kind else text
        path, colon, part = name.rpartition(":")
        if not colon or not path or Path(name).exists() or "/" in part:
            return cls(path=Path(name), kind=kind)
        return cls(path=Path(path), kind=kind, part=part)
