# SPDX-License-Identifier: Apache-2.0
"""A failed validation as readable lines: where the key is, what is wrong, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pretrain.engine.config_schema import (
    KeyShape,
    bare,
    element_of,
    field_shape,
    field_text,
    literals,
    members,
    shape_of,
    walk,
)
from pretrain.engine.config_yaml import Item, describe_value
from pretrain.engine.errors import did_you_mean, nearest, shorten

MAX_PROBLEMS = 50  # explained one by one; more means that a data file was given

KINDS_OF_ABSENCE = ("missing", "union_tag_not_found", "value_error", "assertion_error")
"""Kinds of error that may only say that a file could not be read, when one could not."""


def explain(
    error: ValidationError, model: type[BaseModel], root: Item, *, partial: bool
) -> tuple[list[str], list[str]]:
    """Every problem of a failed validation, one line each.

    Args:
        error: what pydantic found.
        model: what was validated against.
        root: what was validated.
        partial: some file could not be read, so keys that seem to be missing may be in it.

    Returns:
        the problems, and, when there were too many, a last line that says so.
    """
    entries = error.errors(include_url=False)
    if partial:
        entries = [entry for entry in entries if entry["type"] not in KINDS_OF_ABSENCE]
    unlisted = len(entries) - MAX_PROBLEMS
    closing = [f"{root.where}: and {unlisted} more; is this configuration for this command?"] if unlisted > 0 else []
    return [_explain(entry, model, root) for entry in entries[:MAX_PROBLEMS]], closing


@dataclass
class _Spot:
    """The place an error belongs to."""

    path: list[str]  # dotted key
    shape: KeyShape  # what the schema allows there
    item: Item  # what is there, or the nearest enclosing item
    annotation: Any
    info: FieldInfo | None = None  # the field
    section: type[BaseModel] | None = None  # the section around it

    def enter(self, name: str, annotation: Any, shape: KeyShape) -> bool:
        """Step into a key or element; whether it is there."""
        self.path.append(name)
        self.annotation, self.shape = annotation, shape
        inside = self.item.value
        if isinstance(inside, dict) and name in inside:
            self.item = inside[name]
        elif isinstance(inside, list) and name.isdigit() and int(name) < len(inside):
            self.item = inside[int(name)]
        else:
            return False
        return True


def _locate(model: type[BaseModel], root: Item, loc: Sequence[str | int]) -> _Spot:
    """Follow pydantic's location, which also names branches of unions, through the model and the items."""
    spot = _Spot([], KeyShape((model,)), root, model)
    for step in map(str, loc):
        if spot.shape.discriminator is not None and step in spot.shape.tags():
            spot.shape = KeyShape((spot.shape.tags()[step],))
            continue
        branch = next((s for s in spot.shape.sections if s.__name__ == step and not spot.shape.alone), None)
        if branch is not None:
            spot.shape = KeyShape((branch,))
            continue
        section = spot.shape.choose(None)
        if section is not None and spot.shape.alone:
            spot.section, spot.info = section, section.model_fields.get(step)
            if spot.info is None:
                spot.enter(step, None, KeyShape())  # an unknown key
                return spot
            if not spot.enter(step, spot.info.annotation, field_shape(spot.info)):
                return spot
            continue
        element = element_of(spot.annotation)
        if element is None or not spot.enter(step, element, shape_of(element)):
            return spot  # inside a plain value: the field as a whole says what is expected
    return spot


def _explain(error: Mapping[str, Any], model: type[BaseModel], root: Item) -> str:
    kind = str(error["type"])
    spot = _locate(model, root, error["loc"])
    where, key = spot.item.where, ".".join(spot.path)
    head = f"{where}: {key}: " if key else f"{where}: "
    if kind == "extra_forbidden":
        return head + _unknown_key(spot.path, spot.section or model, model)
    if kind == "missing" and spot.info is not None:
        return f"{where}: missing key '{key}' ({field_text(spot.info)}): {spot.info.description}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags, name = spot.shape.tags(), spot.shape.discriminator or ""
        if not isinstance(spot.item.value, dict) or name not in spot.item.value:
            return f"{where}: missing key '{key}.{name}' (one of {', '.join(tags)})"
        chosen = spot.item.value[name]
        value = chosen.plain()
        hint = did_you_mean(value, tags) if isinstance(value, str) else ""
        return f"{chosen.where}: {key}.{name}: expected one of {', '.join(tags)}; got {describe_value(value)}{hint}"
    if kind in ("value_error", "assertion_error"):
        return head + str(error["ctx"]["error"])
    value = spot.item.plain()
    if spot.shape.sections and spot.shape.alone:
        names = ", ".join(dict.fromkeys(name for s in spot.shape.sections for name in s.model_fields))
        return head + f"expected a mapping with the keys {shorten(names, 160)}; got {describe_value(value)}"
    if spot.info is None or element_of(spot.info.annotation) is not None:
        return head + f"{error['msg']}; got {describe_value(value)}"
    return head + f"expected {field_text(spot.info)}; got {describe_value(value)}{_value_hint(value, spot.info)}"


def _value_hint(value: Any, info: FieldInfo) -> str:
    """The likely intention."""
    kinds = [bare(member) for member in members(info.annotation)]
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f" (write {int(value)})"
    if not isinstance(value, str):
        return ""
    if bool in kinds and value.lower() in ("on", "yes", "y", "off", "no", "n"):
        return f" (write {'true' if value.lower() in ('on', 'yes', 'y') else 'false'})"
    if (int in kinds or float in kinds) and re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?", value):
        return f" (write {value.replace('_', '')}, without quotes)"
    return did_you_mean(value, [str(choice) for kind in kinds for choice in literals(kind)])


def _unknown_key(path: Sequence[str], section: type[BaseModel], model: type[BaseModel]) -> str:
    name = path[-1]
    everywhere = [key for key, _ in walk(model)]
    names = list(section.model_fields)
    if "." in name and name in everywhere:
        outer, _, inner = name.rpartition(".")
        return f"unknown key - in a file write '{inner}' below '{outer}:', indented"
    hint = did_you_mean(name, names)
    if ".".join(path) in everywhere:
        hint = " for this choice"  # a key of another variant of a discriminated section
    elif not hint:
        same = [key for key in everywhere if key.endswith(f".{name}")]
        close = same or nearest(name, everywhere, 1)
        hint = f" - did you mean '{close[0]}'?" if close else ""
    listed = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    return f"unknown key{hint} (known: {listed})"
