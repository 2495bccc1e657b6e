# SPDX-License-Identifier: Apache-2.0
"""Types and bounds of configuration fields in words, for messages and for ``--help``."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, Discriminator, JsonValue
from pydantic.fields import FieldInfo

from pretrain.engine.config_yaml import to_yaml
from pretrain.engine.errors import ConfigError, did_you_mean

FREE: dict[str, JsonValue] = {"resume": "free"}
"""``Field(json_schema_extra=FREE)`` marks a key that does not influence what is learnt: it may differ when a run is
resumed, and the hash of a configuration leaves it out."""


def is_free(info: FieldInfo) -> bool:
    """Whether a field is marked ``FREE``."""
    return _is_marked(info, FREE)


LATER: dict[str, JsonValue] = {"hash": "unless default"}
"""``Field(json_schema_extra=LATER)`` marks a key that came after hashes were published: it enters the hash only where
it is set, so that a configuration written before it keeps its hash."""


def is_later(info: FieldInfo) -> bool:
    """Whether a field is marked ``LATER``."""
    return _is_marked(info, LATER)


def _is_marked(info: FieldInfo, mark: Mapping[str, JsonValue]) -> bool:
    return isinstance(info.json_schema_extra, dict) and mark.items() <= info.json_schema_extra.items()


# --- annotations -----------------------------------------------------------------------------------------------------


def literals(annotation: Any) -> tuple[Any, ...]:
    """The choices of a ``Literal``; nothing for another annotation."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def members(annotation: Any) -> list[Any]:
    """The members of a union, flattened; of another annotation, itself."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated and typing.get_origin(args[0]) in (Union, types.UnionType):
        return members(args[0])
    if origin in (Union, types.UnionType):
        return [member for argument in args for member in members(argument)]
    return [annotation]


def bare(annotation: Any) -> Any:
    """An annotation without ``Annotated`` around it."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def element_of(annotation: Any) -> Any:
    """Type of the elements of a list or the values of a mapping, when those are sections; otherwise ``None``."""
    for member in members(annotation):
        origin, args = typing.get_origin(bare(member)), typing.get_args(bare(member))
        element = args[0] if origin in (list, tuple) and args else args[1] if origin is dict else None
        if element is not None and shape_of(element).sections:
            return element
    return None


@dataclass(frozen=True)
class KeyShape:
    """Sections that a key accepts.

    Attributes:
        sections: the sections it may be: none for a plain value, several when a discriminator chooses.
        discriminator: name of the key that chooses.
        optional: whether null is allowed.
        alone: whether nothing but these sections (and null) is allowed.
    """

    sections: tuple[type[BaseModel], ...] = ()
    discriminator: str | None = None
    optional: bool = False
    alone: bool = True

    def tags(self) -> dict[str, type[BaseModel]]:
        """Value of the discriminator -> section, in the order of the union."""
        if self.discriminator is None:
            return {}
        choices = ((s, literals(bare(s.model_fields[self.discriminator].annotation))) for s in self.sections)
        return {str(tag): section for section, tags in choices for tag in tags}

    def choose(self, value: object) -> type[BaseModel] | None:
        """The section that the plain ``value`` is checked against; ``None`` when that is not known."""
        if self.discriminator is None:
            return self.sections[0] if len(self.sections) == 1 else None
        return self.tags().get(str(value.get(self.discriminator))) if isinstance(value, Mapping) else None


def shape_of(annotation: Any, discriminator: Any = None) -> KeyShape:
    """The ``KeyShape`` of an annotation."""
    if typing.get_origin(annotation) is Annotated:
        for extra in typing.get_args(annotation)[1:]:
            if isinstance(extra, FieldInfo | Discriminator):
                discriminator = extra.discriminator or discriminator
    parts = [bare(member) for member in members(annotation)]
    sections = tuple(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return KeyShape(
        sections=sections,
        discriminator=discriminator if isinstance(discriminator, str) else None,
        optional=type(None) in parts,
        alone=len(sections) + (type(None) in parts) == len(parts),
    )


def field_shape(info: FieldInfo) -> KeyShape:
    """The ``KeyShape`` of a field."""
    return shape_of(info.annotation, info.discriminator)


def default_of(info: FieldInfo) -> Any:
    """The default of a field that is not required."""
    return info.get_default(call_default_factory=True, validated_data={})


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a model and its field, parents first; a key that two variants share comes once."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        visited: set[str] = set()
        for section in field_shape(info).sections:
            for key, inner in walk(section, f"{prefix}{name}."):
                if key not in visited:
                    visited.add(key)
                    yield key, inner


# --- types in words --------------------------------------------------------------------------------------------------

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_LENGTHS = ("min_length", "max_length")
_OTHER_BOUNDS = {
    "multiple_of": "a multiple of",
    "pattern": "matching",
}


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type and its bounds in words: ``integer >= 1 or null``."""
    parts = members(annotation)
    if len(parts) > 1:
        return " or ".join(type_text(part, () if part is type(None) else metadata) for part in parts)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [entry for extra in args[1:] for entry in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return type_text(args[0], [*inner, *metadata])
    if origin is Literal:
        quoted = [str(choice) if choice != "" else "''" for choice in args]
        name = f"one of {', '.join(quoted)}" if len(args) > 1 else quoted[0]
    elif origin is tuple and args and args[-1] is not Ellipsis:
        texts = [type_text(argument) for argument in args]
        name = f"list of {len(args)}, " + (f"each {texts[0]}" if len(set(texts)) == 1 else f"namely {', '.join(texts)}")
    elif origin in (list, tuple, set, frozenset):
        name = f"list of {type_text(args[0])}"
    elif origin is dict:
        name = f"mapping of names to {type_text(args[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = "mapping of keys"
    elif annotation in (dict, Any):
        name = "mapping" if annotation is dict else "anything"
    else:
        name = _NAMES.get(annotation) or (annotation.__name__ if isinstance(annotation, type) else str(annotation))
    bounds = _bounds_text(metadata)
    return f"{name} {bounds}" if bounds else name


def _bounds_text(metadata: Iterable[Any]) -> str:
    bounds: dict[str, float] = {}
    bounds_texts: list[str] = []
    for entry in metadata:
        # pydantic's constraints have no class in common: each is known by what it has.
        names = (*_SIGNS, *_LENGTHS, *_OTHER_BOUNDS)
        has = {name: bound for name in names if (bound := getattr(entry, name, None)) is not None}
        bounds |= {name: has[name] for name in (*_SIGNS, *_LENGTHS) if name in has}
        bounds_texts += [f"{words} {has[name]}" for name, words in _OTHER_BOUNDS.items() if name in has]
    least, most = (bounds.pop(name, None) for name in _LENGTHS)
    if least and most:
        bounds_texts.append(f"of length {least}" if least == most else f"of length {least} to {most}")
    elif least or most:
        bounds_texts.append(f"of length at least {least}" if least else f"of length at most {most}")
    if {"ge", "le"} <= set(bounds):
        bounds_texts.insert(0, f"from {bounds.pop('ge'):.10g} to {bounds.pop('le'):.10g}")
    return " and ".join(
        [*(f"{sign} {bounds[name]:.10g}" for name, sign in _SIGNS.items() if name in bounds), *bounds_texts]
    )


def field_text(info: FieldInfo) -> str:
    """Type and bounds of a field, in words."""
    return type_text(info.annotation, info.metadata)


# --- help ------------------------------------------------------------------------------------------------------------

_KEY_COLUMN = 22
_WIDTH = 112


def describe(model: type[BaseModel], section: str | None = None) -> str:
    """Every key with its type and range, default and meaning, grouped by section, as plain text.

    Args:
        model: what a command's configuration consists of.
        section: dotted name of one section or key, to show that alone.

    Raises:
        ConfigError: when there is no such section or key.
    """
    groups = list(_groups(model))
    if section is None:
        chosen = [lines for _, lines in groups if lines]
    else:
        chosen = [lines for path, lines in groups if path == section or path.startswith(section + ".")]
    if chosen:
        return "\n\n".join("\n".join(lines) for lines in chosen)
    fields = dict(walk(model))
    if section in fields:
        return "\n".join(_key_lines(section, fields[section], _default_text(fields[section])))
    names = ", ".join(dict.fromkeys(path for path, _ in groups if path))
    raise ConfigError(
        [f"--help {section}: no such section or key{did_you_mean(section or '', fields)} (sections: {names})"]
    )


def overview(model: type[BaseModel]) -> str:
    """The keys and sections at the top, a line each; what does not fit it is cut."""
    lines = []
    for name, info in model.model_fields.items():
        below = bool(field_shape(info).sections)
        text = ("required: " if info.is_required() and not below else "") + (info.description or "")
        lines.append(f"  {name + '.…' if below else name:<21} {textwrap.shorten(text, 72, placeholder=' …')}")
    return "\n".join(lines)


def _groups(
    model: type[BaseModel], prefix: str = "", title: str = "", default: Any = None
) -> Iterator[tuple[str, list[str]]]:
    """(dotted section, its lines), the sections below it after it. ``default``: the instance whose values are shown."""
    notes: list[str] = [title] if title else []
    below: list[tuple[str, list[str]]] = []
    defaults = {} if default is None else dict(default)
    for name, info in model.model_fields.items():
        value = defaults.get(name)
        if default is None and not info.is_required():
            value = default_of(info)
        inner, per_element = field_shape(info), element_of(info.annotation)
        if per_element is not None:
            inner = shape_of(per_element)
        if not inner.sections or not inner.alone or per_element is not None:
            required = default is None and info.is_required()
            notes += _key_lines(name, info, "required" if required else _default_text(info, value))
        if not inner.sections:
            continue
        path = f"{prefix}{name}" + ("[]" if per_element is not None else "")
        note = " (null by default)" if inner.optional and value is None and not info.is_required() else ""
        head = f"{path}: {info.description or ''}{note}"
        tags = inner.tags()
        if tags:
            below.append(
                (path, [head, f"  {inner.discriminator} chooses which of these keys there are: {', '.join(tags)}"])
            )
        for tag, variant in (tags or {"": inner.sections[0]}).items():
            selected = value if isinstance(value, variant) else None
            text = f"{path} with {inner.discriminator}: {tag} - {_summary(variant)}" if tags else head
            below += _groups(variant, f"{path}.", text, selected)
    yield prefix.rstrip("."), notes
    yield from below


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _default_text(info: FieldInfo, value: Any = None) -> str:
    if value is None:
        if info.is_required():
            return "required"
        value = default_of(info)
    return f"default {to_yaml(plain_value(value), one_line=True)}"


def _key_lines(name: str, info: FieldInfo, default: str) -> list[str]:
    note = "; may change on resume" if is_free(info) else ""
    indent = " " * (_KEY_COLUMN + 2)
    head = textwrap.wrap(
        f"  {name:<{_KEY_COLUMN - 1}} {field_text(info)}; {default}{note}", _WIDTH, subsequent_indent=indent + "  "
    )
    return head + textwrap.wrap(info.description or "", _WIDTH, initial_indent=indent, subsequent_indent=indent)


def plain_value(value: Any) -> Any:
    """A validated value as plain dicts, lists and scalars."""
    if isinstance(value, BaseModel):
        values = dict(value)
        return {name: plain_value(values[name]) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_value(item) for item in value), key=repr)
    if isinstance(value, Path):
        return str(value)
    return value
