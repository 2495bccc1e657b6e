# SPDX-License-Identifier: Apache-2.0
"""YAML files and ``key=value`` overrides into frozen, typed, validated sections.

A command's configuration is one ``Section``: a pydantic model whose fields each carry a description and their bounds, so
that validation, ``--help`` and the documentation say the same thing. ``load_config`` reports everything that is wrong at
once, each problem with the file and line where the key stands, also when that file was reached through ``base:``.

YAML is read by the rules of YAML 1.2's core schema: ``1e-4`` is a float, ``on``/``off``/``yes``/``no`` and ``12:30`` are
text, ``010`` is ten. Tags other than the plain types are refused; nothing in a file can run code.

This module imports neither torch nor numpy: ``--help`` has to be quick.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pretrain.engine.errors import ConfigError

MAX_BYTES = 1_000_000  # of one file
MAX_NODES = 20_000  # of one file after its aliases are expanded: stops "billion laughs"
MAX_DEPTH = 32  # of nesting in a file, and of ``base:`` links
REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIXES = ("", ".yaml", ".yml")

FREE: dict[str, Any] = {"resume": "free"}
"""``Field(json_schema_extra=FREE)`` marks a key that does not influence what is learnt: it may differ when a run is
resumed, and the hash of a configuration leaves it out."""


class Section(BaseModel):
    """A group of keys. Frozen; unknown keys are errors; every field needs ``Field(description=…)`` and its bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


SectionT = TypeVar("SectionT", bound=Section)


class LoopConfig(Section):
    """How long, on what, and how often to write."""

    steps: int = Field(ge=1, le=10**9, description="Optimiser steps of the whole run.")
    batch_size: int = Field(
        ge=1, le=10**6, description="Samples per optimiser step, over all processes and accumulation passes."
    )
    accumulate: int = Field(
        default=1, ge=1, le=10**6, description="Forward/backward passes one optimiser step is split into, to save memory."
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="Seed of initial weights, sample order and augmentation."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Arithmetic of the forward pass: autocast to bf16 or fp16, or none."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Largest global L2 norm of the gradient; null: no clipping."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto (CUDA when there is one, otherwise CPU), cpu, cuda, cuda:N or mps.",
    )
    log_every: int = Field(default=20, ge=1, le=10**9, description="Steps between log lines.", json_schema_extra=FREE)
    save_every: int = Field(default=500, ge=1, le=10**9, description="Steps between checkpoints.", json_schema_extra=FREE)
    keep: int = Field(default=2, ge=1, le=10**6, description="Checkpoints to keep, newest first.", json_schema_extra=FREE)
    workers: int = Field(
        default=1,
        ge=0,
        le=256,
        description="Processes that prepare samples, per training process; 0: prepare them in the training process.",
        json_schema_extra=FREE,
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of one operator; null: leave it to torch and OMP_NUM_THREADS.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _splits_evenly(self) -> LoopConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be split into accumulate = {self.accumulate} equal passes")
        return self


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars"] = Field(default="adamw", description="Optimiser.")
    lr: float = Field(default=1e-3, gt=0, le=1000, description="Peak learning rate, reached after the warm-up.")
    weight_decay: float = Field(
        default=0.0, ge=0, le=10, description="Weight decay; biases and norm parameters (at most 1-D) get none."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd and lars.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay of adamw's first and second moment."
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="Term in adamw's denominator.")
    warmup_steps: int = Field(default=0, ge=0, le=10**9, description="Steps of linear warm-up from 0 to lr.")
    schedule: Literal["cosine", "constant", "step"] = Field(
        default="cosine", description="Learning rate after the warm-up; step: multiplied by gamma at each milestone."
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Steps at which schedule step lowers the learning rate; increasing."
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="Factor at each milestone of schedule step.")
    final_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Learning rate at the last step of schedule cosine, as a share of lr."
    )

    @model_validator(mode="after")
    def _milestones_fit(self) -> OptimConfig:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule step needs milestones, for example milestones: [6000, 8000]")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones are used by schedule step only, not by {self.schedule}; remove them")
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError("milestones must increase")
        return self


# ------------------------------------------------------------------------------------------------ what a model consists of


@dataclass(frozen=True)
class _Shape:
    """What may stand at a key: the sections (several when a discriminator chooses), and whether null is allowed."""

    sections: tuple[type[BaseModel], ...]
    discriminator: str | None
    optional: bool

    def tags(self) -> dict[str, type[BaseModel]]:
        """Value of the discriminator -> section."""
        if self.discriminator is None:
            return {}
        named = ((tag, s) for s in self.sections for tag in _literals(s.model_fields[self.discriminator].annotation))
        return {str(tag): section for tag, section in named}

    def choose(self, value: object) -> type[BaseModel] | None:
        """The section that validates the plain mapping ``value``; ``None`` when that is not known."""
        if self.discriminator is None:
            return self.sections[0] if len(self.sections) == 1 else None
        if not isinstance(value, Mapping):
            return None
        return self.tags().get(str(value.get(self.discriminator)))


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _members(annotation: Any) -> list[Any]:
    """The members of a union, flattened, without ``Annotated`` around unions; the annotation itself if it is none."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner = typing.get_args(annotation)[0]
        return _members(inner) if typing.get_origin(inner) in (Union, types.UnionType) else [annotation]
    if origin in (Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in _members(argument)]
    return [annotation]


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _shape(annotation: Any, discriminator: Any = None) -> _Shape:
    if typing.get_origin(annotation) is Annotated:
        for extra in typing.get_args(annotation)[1:]:
            discriminator = getattr(extra, "discriminator", None) or discriminator
    members = [_bare(member) for member in _members(annotation)]
    return _Shape(
        sections=tuple(member for member in members if _is_section(member)),
        discriminator=discriminator if isinstance(discriminator, str) else None,
        optional=type(None) in members,
    )


def _field_shape(info: FieldInfo) -> _Shape:
    return _shape(info.annotation, info.discriminator)


def _range_text(metadata: Iterable[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds, length = [], []
    for entry in metadata:
        for name, sign in signs.items():
            if getattr(entry, name, None) is not None:
                bounds.append(f"{sign} {getattr(entry, name)}")
        if getattr(entry, "multiple_of", None) is not None:
            bounds.append(f"a multiple of {entry.multiple_of}")
        if getattr(entry, "pattern", None):
            bounds.append(f"matching {entry.pattern}")
        if getattr(entry, "min_length", None):
            length.append(f"at least {entry.min_length}")
        if getattr(entry, "max_length", None) is not None:
            length.append(f"at most {entry.max_length}")
    text = " and ".join(bounds)
    return f"{text} (length {' and '.join(length)})".strip() if length else text


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type and its bounds in words: ``integer >= 1 or null``."""
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join(_type_text(m, () if m is type(None) else metadata) for m in members)
    if typing.get_origin(annotation) is Annotated:
        inner, *extra = typing.get_args(annotation)
        found = [e for x in extra for e in (x.metadata if isinstance(x, FieldInfo) else [x])]
        return _type_text(inner, [*found, *metadata])
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
    if origin is Literal:
        name = ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    elif origin is tuple and args and args[-1] is not Ellipsis:
        same = len(set(args)) == 1
        name = f"list of {len(args)}: " + (f"each {_type_text(args[0])}" if same else ", ".join(map(_type_text, args)))
    elif origin in (list, tuple, set, frozenset):
        name = f"list of {_type_text(args[0])}"
    elif origin in (dict, Mapping) or annotation is dict:
        name = f"mapping of names to {_type_text(args[1])}" if args else "mapping"
    elif _is_section(annotation):
        name = "mapping of keys"
    elif annotation is Any:
        name = "anything"
    else:
        name = names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return f"{name} {_range_text(metadata)}".rstrip()


def _field_text(info: FieldInfo) -> str:
    return _type_text(info.annotation, info.metadata)


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "default: see its keys"
    return f"default {_flow(_plain(value))}"


def _flow(value: Any) -> str:
    """A plain value as one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a model, the variants of discriminated sections merged, parents before children."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        seen: set[str] = set()
        for section in _field_shape(info).sections:
            for key, inner in _walk(section, f"{prefix}{name}."):
                if key not in seen:
                    seen.add(key)
                    yield key, inner


def known_keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key a configuration of this model may have."""
    return [key for key, _ in _walk(model)]


# --------------------------------------------------------------------------------------------------------- YAML with lines


@dataclass
class _Item:
    """A value and where it stands. ``value``: scalar, list of items or dict of items."""

    value: Any
    where: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


class _Refused(Exception):
    """Something in a YAML file that is legal YAML but not accepted here."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        super().__init__(text)


_CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
"""Tag, pattern, first characters: YAML 1.2.2 §10.3.2."""


def _add_core_schema(resolver: Any) -> None:
    resolver.yaml_implicit_resolvers = {}
    for tag, pattern, first in _CORE_SCHEMA:
        letters = ["" if letter == "\0" else letter for letter in first]
        resolver.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), letters)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; stops at a nesting depth before Python's own recursion limit does."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(self.peek_event().start_mark.line + 1, f"nested more than {MAX_DEPTH} levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a YAML 1.1 or a 1.2 reader would take for something else; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_add_core_schema(_Loader)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    tag = "tag:yaml.org,2002:str"
    ambiguous = isinstance(_scalar_from_text(value), str) is False
    return dumper.represent_scalar(tag, value, style="'" if ambiguous else None)


_Dumper.add_representer(str, _represent_text)


def _scalar_from_text(text: str) -> Any:
    """A plain (unquoted) YAML scalar by the core schema. Raises ValueError for integers beyond Python's digit limit."""
    for tag, pattern, _ in _CORE_SCHEMA:
        if re.match(pattern, text):
            return _construct(tag, text)
    return text


def _construct(tag: str, text: str) -> Any:
    if tag == "null":
        return None
    if tag == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{_shorten(text)!r} is not true or false")
        return text.lower() == "true"
    if tag == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if tag == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Reader:
    """Turns the nodes of one document into items."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.problems: list[str] = []
        self.count = 0

    def at(self, node: yaml.Node) -> str:
        return f"{self.shown}:{node.start_mark.line + 1}"

    def item(self, node: yaml.Node, where: str, depth: int = 0) -> _Item:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_NODES:
            raise _Refused(line, f"more than {MAX_NODES} values once its aliases are expanded")
        if depth > MAX_DEPTH:
            raise _Refused(line, f"nested more than {MAX_DEPTH} levels deep (does an alias contain itself?)")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return _Item(self.mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return _Item([self.item(child, self.at(child), depth + 1) for child in node.value], where)
        if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
            try:
                value = _construct(tag, node.value)
            except ValueError as error:
                raise _Refused(line, f"not a {tag}: {_shorten(str(error))}") from None
            if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                raise _Refused(line, "text with half a surrogate pair")
            return _Item(value, where)
        raise _Refused(line, f"tag '{_shorten(node.tag)}' is not accepted; write a plain value")

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, _Item]:
        result: dict[str, _Item] = {}
        for key_node, value_node in node.value:
            where = self.at(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                self.problems.append(f"{where}: a key must be a word")
                continue
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge" or key == "<<":
                self.problems.append(f"{where}: '<<' is not accepted; use 'base: other.yaml' to inherit")
            elif key in result:
                self.problems.append(f"{where}: duplicate key '{_shorten(key)}' (first at {result[key].where})")
            else:
                result[key] = self.item(value_node, where, depth + 1)
        return result


def _read_yaml(text: str, shown: str) -> tuple[_Item | None, list[str]]:
    """Parse one document. Returns the root (``None`` when it cannot be parsed) and the problems found."""
    reader = _Reader(shown)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        root = _Item({}, shown) if node is None else reader.item(node, f"{shown}:{node.start_mark.line + 1}")
    except _Refused as error:
        return None, [*reader.problems, f"{shown}:{error.line}: {error}"]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return None, [f"{shown}:{line}: not readable as YAML: {error.reason}"]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        why = ", ".join(part for part in (error.context, error.problem) if part)
        return None, [f"{shown}:{line}: not readable as YAML: {_shorten(why, 200)}"]
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        return None, [f"{shown}: not readable as YAML: {_shorten(str(error), 200)}"]
    if root.value is None:
        root = _Item({}, shown)  # a file of comments only
    return root, reader.problems


# ------------------------------------------------------------------------------------------------------- files and overrides


def _shown(path: Path) -> str:
    """A path as the person would write it: relative when it is below the current directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def _folders(search: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The search folders: below the current directory first, then below the repository."""
    result: list[Path] = []
    for root in (Path.cwd(), REPOSITORY):
        for folder in search:
            path = root / folder
            if path.is_dir() and not any(path.samefile(other) for other in result):
                result.append(path)
    return result


def _available(folders: Iterable[Path]) -> list[str]:
    names = {str(p.relative_to(f)) for f in folders for s in (".yaml", ".yml") for p in sorted(f.rglob(f"*{s}"))[:500]}
    return sorted(names)


def _nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[m] for m in difflib.get_close_matches(word.lower(), list(by_lower), n=count, cutoff=0.6)]


def find_config(path: str | os.PathLike[str], search: Sequence[str | os.PathLike[str]] = ("configs",)) -> Path:
    """Find a configuration file.

    Args:
        path: A path, or a name looked up in the search folders; ``.yaml`` may be left out.
        search: Folders below the current directory and below the repository, tried after the path itself.

    Raises:
        ConfigError: When there is no such file; the nearest names are suggested.
    """
    given = Path(path)
    text = str(path)
    if not text or "\0" in text:
        raise ConfigError([f"'{text}' is not a file name"])
    folders = [] if given.is_absolute() else _folders(search)
    try:
        for root in [Path(), *folders]:
            for suffix in SUFFIXES:
                candidate = root / f"{text}{suffix}"
                if candidate.is_file():
                    return candidate
        if given.is_dir():
            raise ConfigError([f"{text}: is a folder; name a YAML file, for example {text.rstrip('/')}/NAME.yaml"])
        if given.exists():
            raise ConfigError([f"{text}: is not a regular file"])
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ConfigError([f"{_shorten(text)}: cannot be read: {error.strerror}"]) from None
    raise ConfigError([f"{_shorten(text, 200)}: no such file{_file_hint(given, folders)}"])


def _file_hint(given: Path, folders: Sequence[Path]) -> str:
    names = _available(folders)
    by_stem: dict[str, str] = {}
    for name in names:
        for form in (name, name.removesuffix(".yaml"), Path(name).name, Path(name).stem):
            by_stem.setdefault(form, name)
    close = list(dict.fromkeys(by_stem[form] for form in _nearest(str(given), by_stem) + _nearest(given.stem, by_stem)))
    if close:
        return f" - did you mean {' or '.join(repr(name) for name in close[:3])}?"
    if names:
        return f" (available: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"
    return ""


def _read_file(path: Path) -> tuple[_Item | None, list[str]]:
    shown = _shown(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return None, [f"{shown}: cannot be read: {error.strerror}"]
    if len(data) > MAX_BYTES:
        return None, [f"{shown}: larger than {MAX_BYTES // 1000} kB; is this a configuration file?"]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, [f"{shown}:{line}: not UTF-8 text"]
    return _read_yaml(text, shown)


def _load_chain(path: Path, model: type[BaseModel]) -> tuple[_Item, list[str]]:
    """Read a file and those it is based on; the deepest base first, each next one merged over it."""
    chain: list[_Item] = []
    problems: list[str] = []
    seen: list[Path] = []
    source = ""
    while True:
        real = path.resolve()
        if real in seen:
            loop = " -> ".join(_shown(p) for p in [*seen[seen.index(real) :], real])
            problems.append(f"{source}: base: files inherit from each other in a circle: {loop}")
            break
        if len(seen) >= MAX_DEPTH:
            problems.append(f"{source}: base: more than {MAX_DEPTH} files inherit from each other")
            break
        seen.append(real)
        root, found = _read_file(path)
        problems += found
        if root is None:
            break
        if not isinstance(root.value, dict):
            problems.append(f"{root.where}: expected 'key: value' lines, got {_got(root.plain())}")
            break
        base = root.value.pop("base", None)
        chain.append(root)
        if base is None:
            break
        if not isinstance(base.value, str) or not base.value:
            problems.append(f"{base.where}: base: expected the path of one YAML file, got {_got(base.plain())}")
            break
        source = base.where
        try:
            path = find_config(path.parent / base.value, search=())
        except ConfigError:
            hint = _file_hint(Path(base.value), [path.parent])
            problems.append(f"{base.where}: base: no file '{_shorten(base.value)}' beside {_shown(path)}{hint}")
            break
    merged = _Item({}, _shown(seen[0]))
    for root in reversed(chain):
        merged = _merge(merged, root, _Shape((model,), None, False))
    merged.where = _shown(seen[0])
    return merged, problems


def _merge(old: _Item, new: _Item, shape: _Shape) -> _Item:
    """Lay ``new`` over ``old``: mappings key by key, everything else replaced.

    A section whose discriminator changes is replaced as a whole: the other variant's keys mean nothing to it.
    """
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    tag = shape.discriminator
    if tag and tag in new.value and tag in old.value and new.value[tag].value != old.value[tag].value:
        return new
    both = {**{k: v.plain() for k, v in old.value.items() if k == tag}, **{k: v.plain() for k, v in new.value.items() if k == tag}}
    section = shape.choose(both)
    result = dict(old.value)
    for key, item in new.value.items():
        info = section.model_fields.get(key) if section else None
        below = _field_shape(info) if info else _Shape((), None, False)
        result[key] = _merge(result[key], item, below) if key in result else item
    return _Item(result, new.where)


def _override_value(text: str, where: str) -> tuple[_Item | None, list[str]]:
    """``[...]``, ``{...}`` and quoted text are YAML; anything else is one plain scalar, taken whole."""
    text = text.strip()
    if text[:1] in tuple("[{\"'"):
        item, problems = _read_yaml(text, where)
        return (_relabel(item, where) if item else None), [re.sub(r"^(override '.*'):\d+:", r"\1:", p, flags=re.S) for p in problems]
    try:
        return _Item(_scalar_from_text(text), where), []
    except ValueError as error:
        return None, [f"{where}: {error}"]


def _relabel(item: _Item, where: str) -> _Item:
    if isinstance(item.value, dict):
        return _Item({key: _relabel(child, where) for key, child in item.value.items()}, where)
    if isinstance(item.value, list):
        return _Item([_relabel(child, where) for child in item.value], where)
    return _Item(item.value, where)


def _read_overrides(overrides: Iterable[str]) -> tuple[_Item, list[str]]:
    """``key.sub=value`` strings to one tree; a later one wins."""
    root = _Item({}, "overrides")
    problems: list[str] = []
    for override in overrides:
        where = f"override '{_shorten(override)}'"
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"{where}: expected key=value, for example optim.lr=1e-4")
            continue
        if any("\ud800" <= c <= "\udfff" for c in override):
            problems.append(f"{where.encode('utf-8', 'backslashreplace').decode()}: not UTF-8 text")
            continue
        if parts == ["base"]:
            problems.append(f"{where}: base can stand in a file only; give the other file with --config")
            continue
        item, found = _override_value(text, where)
        problems += found
        if item is None:
            continue
        for part in reversed(parts):
            item = _Item({part: item}, where)
        root = _merge(root, item, _Shape((), None, False))
    return root, problems


# --------------------------------------------------------------------------------------------------------------- validation


def _got(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list"}
    if type(value) in kinds and len(value) > 4:
        return f"{kinds[type(value)]} of {len(value)}"
    if isinstance(value, str):
        return f"the text {_shorten(repr(value))}" if value else "an empty text"
    return _shorten(_flow(value))


def _complete(item: _Item, shape: _Shape) -> _Item:
    """Let a section that is absent or empty (``loop:`` with nothing below) stand for ``{}``, so that its keys are named."""
    section = shape.choose(item.plain() if isinstance(item.value, dict) else None)
    if section is None or not isinstance(item.value, dict):
        return item
    result = dict(item.value)
    for name, info in section.model_fields.items():
        below = _field_shape(info)
        if not below.sections or below.optional:
            continue
        child = result.get(name)
        if child is None and info.is_required() and not _is_collection(info.annotation):
            child = _Item({}, item.where)
        elif child is not None and child.value is None:
            child = _Item({}, child.where)
        if child is not None:
            result[name] = _complete(child, below)
    return _Item(result, item.where)


def _is_collection(annotation: Any) -> bool:
    return any(typing.get_origin(_bare(m)) in (list, tuple, dict, set, frozenset) for m in _members(annotation))


@dataclass
class _Spot:
    """Where an error of pydantic belongs: dotted path, the field it concerns, the section around, the nearest item."""

    path: list[str]
    info: FieldInfo | None
    shape: _Shape
    item: _Item
    section: type[BaseModel] | None


def _locate(model: type[BaseModel], root: _Item, loc: Sequence[str | int]) -> _Spot:
    """Follow pydantic's error location, which also names union branches, through the model and the items."""
    spot = _Spot([], None, _Shape((model,), None, False), root, model)
    annotation: Any = model
    for index, step in enumerate(loc):
        inside = spot.item.value if isinstance(spot.item.value, (dict, list)) else {}
        if spot.shape.discriminator is not None and str(step) in spot.shape.tags():
            section = spot.shape.tags()[str(step)]
            spot.shape, spot.section, annotation = _Shape((section,), None, False), section, section
            continue
        section = spot.shape.choose(None) if spot.shape.discriminator is None else None
        if section is not None and (str(step) in section.model_fields or index == len(loc) - 1):
            spot.path.append(str(step))
            spot.section = section
            spot.info = section.model_fields.get(str(step))
            if isinstance(inside, dict) and step in inside:
                spot.item = inside[str(step)]
            if spot.info is None:
                break
            annotation = spot.info.annotation
            spot.shape = _field_shape(spot.info)
            continue
        element = _element(annotation, step)
        if element is None:
            break  # a branch of a union, or part of a key: the field's own text says what is expected
        annotation, spot.shape = element, _shape(element)
        present = step in inside if isinstance(inside, dict) else isinstance(step, int) and step < len(inside)
        if not present:
            break
        spot.path.append(str(step))
        spot.item = inside[step]  # type: ignore[index]
    return spot


def _element(annotation: Any, step: str | int) -> Any:
    """Annotation of an element of a list or mapping, only for those that hold sections."""
    for member in _members(annotation):
        origin, args = typing.get_origin(_bare(member)), typing.get_args(_bare(member))
        if origin in (list, tuple) and isinstance(step, int):
            element = args[0] if origin is list or args[-1] is Ellipsis else args[min(step, len(args) - 1)]
        elif origin is dict and isinstance(step, str):
            element = args[1]
        else:
            continue
        if _shape(element).sections:
            return element
    return None


def _explain(error: Mapping[str, Any], model: type[BaseModel], root: _Item) -> str:
    """One of pydantic's errors as ``file:line: key: what is wrong``."""
    kind = str(error["type"])
    spot = _locate(model, root, error["loc"])
    where, key = spot.item.where, ".".join(spot.path)
    head = f"{where}: {key}: " if key else f"{where}: "
    if kind == "extra_forbidden":
        return head + _unknown_key(spot.path, spot.section or model, model)
    if kind == "missing" and spot.info is not None:
        return f"{where}: missing key '{key}' ({_field_text(spot.info)}): {spot.info.description or ''}".rstrip(": ")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = spot.shape.tags()
        name = spot.shape.discriminator or "name"
        present = spot.item.value.get(name) if isinstance(spot.item.value, dict) else None
        choices = ", ".join(tags)
        if present is None:
            return f"{where}: missing key '{key}.{name}' (one of {choices})"
        value = present.plain()
        return f"{present.where}: {key}.{name}: expected one of {choices}, got {_got(value)}{_did_you_mean(str(value), tags)}"
    if kind in ("value_error", "assertion_error"):
        return head + str(error["ctx"]["error"])
    value = spot.item.plain()
    if spot.info is None:
        return head + f"{error['msg']}, got {_got(value)}"
    if spot.shape.sections and not _is_collection(spot.info.annotation):
        names = ", ".join(dict.fromkeys(n for s in spot.shape.sections for n in s.model_fields))
        return head + f"expected a mapping with the keys {_shorten(names, 160)}; got {_got(value)}"
    return head + f"expected {_field_text(spot.info)}; got {_got(value)}{_value_hint(value, spot.info)}"


def _value_hint(value: Any, info: FieldInfo) -> str:
    members = [_bare(m) for m in _members(info.annotation)]
    if isinstance(value, str):
        if bool in members and value.lower() in ("on", "yes", "y", "off", "no", "n"):
            return f" (write {'true' if value.lower() in ('on', 'yes', 'y') else 'false'})"
        if (int in members or float in members) and re.fullmatch(r"[-+0-9_.eE]+", value) and "_" in value:
            return f" (write {value.replace('_', '')})"
        choices = [str(c) for m in members for c in _literals(m)]
        return _did_you_mean(value, choices)
    return ""


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = _nearest(word, choices, 1)
    return f" - did you mean '{close[0]}'?" if close else ""


def _unknown_key(path: Sequence[str], section: type[BaseModel], model: type[BaseModel]) -> str:
    name = path[-1]
    known = list(section.model_fields)
    everywhere = known_keys(model)
    listed = ", ".join(known[:16]) + (", ..." if len(known) > 16 else "")
    if "." in name and name in everywhere:
        first, _, rest = name.partition(".")
        return f"unknown key - in a file write it nested: '{first}:' and below it '{rest.replace('.', ': ')}: ...'"
    hint = _did_you_mean(name, known)
    if not hint:
        elsewhere = [key for key in everywhere if key.rpartition(".")[2] == name and "." in key] or _nearest(name, everywhere, 1)
        hint = f" - did you mean '{elsewhere[0]}'?" if elsewhere else ""
    return f"unknown key{hint} (known: {listed})"


def load_config(
    model: type[SectionT],
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    *,
    search: Sequence[str | os.PathLike[str]] = ("configs",),
) -> SectionT:
    """Read, merge and validate a configuration.

    Args:
        model: The section that describes the whole configuration.
        path: YAML file, or a name looked up in ``search``; ``None``: defaults and overrides only.
        overrides: ``key.sub=value``; a later one wins. The value is a number, true/false, null, text, or YAML in
            ``[...]`` or ``{...}``.
        search: Folders below the current directory and the repository for names that are not paths.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: With all problems, each with the file and line, or the override, it comes from.
    """
    if path is None:
        root, problems = _Item({}, "configuration"), []
    else:
        root, problems = _load_chain(find_config(path, search), model)
    readable = not problems
    changes, found = _read_overrides(overrides)
    problems += found
    top = _Shape((model,), None, False)
    merged = _complete(_merge(root, changes, top), top)
    merged.where = root.where
    try:
        cfg = TypeAdapter(model).validate_json(json.dumps(merged.plain()), strict=True)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            if readable or entry["type"] != "missing":  # what an unreadable file would have said is not missing
                problems.append(_explain(entry, model, merged))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return cfg


# ------------------------------------------------------------------------------------------------------- out of a model again


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def plain(cfg: Section) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars: what a run records, and what ``changed_keys`` compares."""
    result: dict[str, Any] = _plain(cfg)
    return result


def dump_config(cfg: Section) -> str:
    """The configuration as YAML, every key written out; ``load_config`` reads it back to an equal one."""
    text: str = yaml.dump(plain(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    return text


def free_keys(model: type[BaseModel]) -> frozenset[str]:
    """Dotted keys that may change when a run is resumed: those marked ``FREE``, and a top-level ``out``."""
    marked = {key for key, info in _walk(model) if _is_free(info)}
    return frozenset(marked | ({"out"} & set(model.model_fields)))


def _is_free(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and extra.get("resume") == "free"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + str(key), item


def _covered(key: str, ignore: Iterable[str]) -> bool:
    return any(key == entry or key.startswith(entry + ".") for entry in ignore)


def training_keys(cfg: Section) -> dict[str, Any]:
    """Dotted key -> plain value of every key that influences what is learnt."""
    free = free_keys(type(cfg))
    return {key: value for key, value in _flatten(plain(cfg)) if not _covered(key, free)}


FREE_BY_DEFAULT: frozenset[str] = frozenset({"out"} | {f"loop.{key}" for key in free_keys(LoopConfig)})
"""Free keys of any configuration that has ``out`` and ``loop: LoopConfig``, in dotted form."""


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = FREE_BY_DEFAULT
) -> list[str]:
    """Dotted keys whose values differ between two plain configurations (``plain``), sorted.

    Args:
        old: The recorded configuration.
        new: The one of this run.
        ignore: Dotted keys, or sections, that do not count. A command with more free keys passes ``free_keys(model)``.
    """
    ignored = tuple(ignore)
    before, after = dict(_flatten(_plain(old))), dict(_flatten(_plain(new)))
    absent = object()
    keys = sorted({*before, *after})
    return [k for k in keys if not _covered(k, ignored) and before.get(k, absent) != after.get(k, absent)]


def config_hash(cfg: Section) -> str:
    """12 hex digits (SHA-256) over the training keys; the same for two configurations that learn the same."""
    text = json.dumps(training_keys(cfg), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------- help


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()


def _key_lines(name: str, info: FieldInfo) -> list[str]:
    free = "; may change on resume" if _is_free(info) else ""
    head = f"  {name:<18} {_field_text(info)}; {_default_text(info)}{free}"
    body = textwrap.wrap(info.description or "(no description)", 96, initial_indent=" " * 21, subsequent_indent=" " * 21)
    return [*textwrap.wrap(head, 118, subsequent_indent=" " * 23), *body]


def _help_groups(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted section, lines) of a model and of the sections below it."""
    lines: list[str] = []
    below: list[tuple[str, list[str]]] = []
    for name, info in model.model_fields.items():
        shape = _field_shape(info)
        if not shape.sections or _is_collection(info.annotation):
            lines += _key_lines(name, info)
            continue
        path = f"{prefix}{name}"
        null = " May be null." if shape.optional else ""
        if shape.discriminator is None:
            for section in shape.sections:
                groups = list(_help_groups(section, f"{path}."))
                title = f"{path}: {info.description or _summary(section)}{null}"
                below += [(path, [title, *groups[0][1]]), *groups[1:]]
            continue
        tags = shape.tags()
        below.append((path, [f"{path}: {info.description or ''}{null}", f"  {shape.discriminator} chooses: {', '.join(tags)}"]))
        for tag, section in tags.items():
            groups = list(_help_groups(section, f"{path}."))
            below += [(path, [f"{path} with {shape.discriminator}: {tag} - {_summary(section)}", *groups[0][1]]), *groups[1:]]
    yield prefix.rstrip("."), lines
    yield from below


def describe(model: type[BaseModel], section: str | None = None) -> str:
    """Every key with its type and range, default and meaning, grouped by section, as plain text.

    Args:
        model: The section that describes a command's configuration.
        section: Dotted name of one section or key to show alone.

    Raises:
        ConfigError: When there is no such section or key.
    """
    groups = list(_help_groups(model))
    if section is None:
        top = [("", ["Keys:", *groups[0][1]])] if groups[0][1] else []
        return "\n\n".join("\n".join(lines) for _, lines in [*top, *groups[1:]])
    chosen = [lines for path, lines in groups[1:] if path == section or path.startswith(section + ".")]
    if chosen:
        return "\n\n".join("\n".join(lines) for lines in chosen)
    fields = {key: info for key, info in _walk(model)}
    if section in fields:
        return "\n".join(_key_lines(section, fields[section]))
    hint = _did_you_mean(section, fields)
    names = ", ".join(dict.fromkeys(path for path, _ in groups[1:]))
    raise ConfigError([f"--help {section}: no such section or key{hint} (sections: {names})"])


__all__ = [
    "FREE",
    "FREE_BY_DEFAULT",
    "LoopConfig",
    "OptimConfig",
    "Section",
    "changed_keys",
    "config_hash",
    "describe",
    "dump_config",
    "find_config",
    "free_keys",
    "known_keys",
    "load_config",
    "plain",
    "training_keys",
]
