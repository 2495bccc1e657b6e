# SPDX-License-Identifier: Apache-2.0
"""Type checks of values from files that a run wrote and a user may have edited."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from pretrain.engine.errors import UserError, shorten

if TYPE_CHECKING:
    from pydantic import BaseModel

    ModelT = TypeVar("ModelT", bound=BaseModel)

_KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def is_number(value: object) -> bool:
    """Whether a value is a finite number, also where it is computed with as a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def require_types(record: type, values: Mapping[str, object]) -> None:
    """Refuse values that are not of the types of a dataclass's fields; numbers must be finite, lists be tuples by now.

    Raises:
        TypeError: the first of them, by its name. Names that the record lacks are left to its constructor.
    """
    hints = get_type_hints(record)
    for name, value in values.items():
        if name not in hints:
            continue
        hint = hints[name]
        if get_origin(hint) is dict and isinstance(value, dict):
            kind = get_args(hint)[1]
            entries = {f"{name}.{key}": (one, kind) for key, one in value.items()}
        else:
            entries = {name: (value, hint)}
        for key, (one, kind) in entries.items():
            if not _fits(one, kind):
                raise TypeError(f"{key}: {shorten(reprlib.repr(one))} is not {_KINDS.get(kind, 'of the right form')}")


def _fits(value: object, hint: Any) -> bool:
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, tuple):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is dict and isinstance(value, dict):
        return all(_fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items())
    kind = dict if is_typeddict(hint) else origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def stored_section(model: type[ModelT], values: object, *, where: object) -> ModelT:
    """A section of a configuration that is kept in a file of an export.

    Args:
        model: of the section.
        values: plain ones, as the file has them.
        where: the file and the key in it.

    Raises:
        UserError: the first thing that is wrong, by its key.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["", *map(str, first["loc"])])
        raise UserError(f"{where}{key}: {' '.join(first['msg'].split())}; export it again with this version") from error
