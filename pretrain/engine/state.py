# SPDX-License-Identifier: Apache-2.0
"""Load tensors into a module: the one place that compares their names and shapes, and reports what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from pretrain.engine.errors import UserError

COUNTER = "num_batches_tracked"  # of batch norms; no result depends on it, and files often lack it
QUOTED = 6  # names in a report; the rest are counted

Strict = Literal["both", "module", "file", "no"]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Tensors that were loaded, missing, unexpected or of another shape.

    Attributes:
        loaded: copied into the module.
        missing: of the module, not in the file; they keep their values.
        unexpected: of the file, not in the module.
        other_shape: in both, but of different shapes; they keep their values.
        skipped: of the file, left out on purpose.
        notes: further remarks of the caller.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: str = ""

    def __str__(self) -> str:
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "skipped": self.skipped,
            "other shape": self.other_shape,
        }
        parts = [f"{len(self.loaded)} tensors loaded"]
        for title, names in groups.items():
            if names:
                parts.append(f"{title} {len(names)}: {', '.join(names[:QUOTED])}{' …' if len(names) > QUOTED else ''}")
        return "; ".join(parts + [self.notes] * bool(self.notes))


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Any],
    *,
    source: str | Path,
    strict: Strict = "both",
    skip: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    hint: str = "",
) -> LoadReport:
    """Copy tensors into a module by name. Nothing is copied where ``strict`` is not met.

    What is not copied keeps its value. ``load_state_dict(strict=False)`` does not promise that: Detectron2's frozen
    batch norm takes a dictionary without its statistics for an old file, and sets them to zero and one.

    Args:
        module: to be loaded into.
        tensors: by name; a dtype that differs is converted.
        source: where they come from, for messages.
        strict: what must be complete: ``both`` sides, all of the ``module``, all of the ``file``, or ``no`` side
            (tensors of another shape are then left out too). Counters of batch norms may always be missing.
        skip: prefixes of the module's names that keep their values.
        optional: prefixes of the module's names that may be missing under any ``strict``.
        hint: what to do when it does not fit, for the message.

    Raises:
        UserError: it does not fit; with counts, first names and the first shapes. Or it holds integers or other numbers
            that are no weights where weights belong.
    """
    target = module.state_dict()
    skipped = skip or ("\0",)  # no name begins with it
    expected = [name for name in target if not name.startswith(skipped)]
    shared = [name for name in expected if name in tensors]
    other_shape = [name for name in shared if _shape(target[name]) != _shape(tensors[name])]
    missing = [name for name in expected if name not in tensors]
    absent = [name for name in missing if not name.endswith(COUNTER) and not name.startswith(optional or ("\0",))]
    unexpected = [name for name in tensors if name not in target and not name.startswith(skipped)]
    surplus = [name for name in unexpected if not name.endswith(COUNTER)]
    problems = {
        "missing": absent if strict in ("both", "module") else [],
        "unexpected": surplus if strict in ("both", "file") else [],
        "of another shape": other_shape if strict != "no" else [],
    }
    if any(problems.values()):
        text = f"{source} does not fit this model: {_misfit(problems, target=target, tensors=tensors)}"
        raise UserError(f"{text}. {hint}" if hint else text)
    loaded = [name for name in shared if name not in other_shape]
    require_weights({name: tensors[name] for name in loaded if _is_floating(target[name])}, source=source)
    module.load_state_dict({**target, **{name: tensors[name] for name in loaded}})
    return LoadReport(
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        other_shape=tuple(other_shape),
        skipped=tuple(name for name in tensors if name.startswith(skipped)),
    )


def require_weights(tensors: Mapping[str, Any], *, source: str | Path) -> None:
    """Refuse what torch would convert to floats without a word: the integers of a quantised network, complex numbers.

    Raises:
        UserError: a tensor is not of 16-, 32- or 64-bit floats; 8-bit floats are not weights without their scales.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not (_is_floating(value) and value.element_size() >= 2):
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: {name} holds numbers of type {kind} where weights belong, as quantised networks do; give "
                "them as floats of 16 bits or more"
            )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape of a tensor; None for a module's extra state, which is any value."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _misfit(problems: Mapping[str, list[str]], *, target: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Counts and the first name of each kind."""
    compared = [name for name in target if name in tensors or not name.endswith(COUNTER)]
    matching = [name for name in compared if name in tensors and _shape(tensors[name]) == _shape(target[name])]
    parts = [f"{len(matching)} of {len(compared)} tensors match"]
    for title, names in problems.items():
        if names:
            first, shapes = names[0], ""
            if title == "of another shape":
                shapes = f": {_shape(tensors[first])} instead of {_shape(target[first])}"
            parts.append(f"{len(names)} {title}, such as {first}{shapes}")
    return "; ".join(parts)
