# SPDX-License-Identifier: Apache-2.0
"""YAML files and ``key=value`` overrides into frozen, typed, validated sections.

A command's configuration is one ``Section``: a pydantic model whose fields each carry a description and their bounds,
so that validation, ``--help`` and the documentation say the same thing. ``load_config`` reports everything that is
wrong at once, each problem with the file and line where the key stands, also when that file was reached by ``base:``.

Relative paths in a configuration are relative to the current directory, wherever the file lies; only ``base:`` is
relative to its file. This module imports neither torch nor numpy: ``--help`` has to be quick.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pretrain.engine.config_choice import ConfigChoice
from pretrain.engine.config_explain import explain
from pretrain.engine.config_schema import (
    FREE,
    KeyShape,
    default_of,
    field_shape,
    is_free,
    is_later,
    plain_value,
    walk,
)
from pretrain.engine.config_schema import LATER as LATER  # for the modules that define sections
from pretrain.engine.config_yaml import (
    Item,
    display_path,
    find_config,
    override_name,
    read_chain,
    read_overrides,
    to_yaml,
)
from pretrain.engine.errors import ConfigError


class Section(BaseModel):
    """A group of keys. Frozen; unknown keys are errors; every field needs ``Field(description=…)`` and its bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def unread_keys(self) -> tuple[str, ...]:
        """Keys that a run of this configuration does not read, whatever they name."""
        return ()


SectionT = TypeVar("SectionT", bound=Section)


class LoopConfig(Section):
    """How long, on what, and how often to write."""

    steps: int = Field(ge=1, le=10**9, description="optimiser steps of the whole run")
    batch_size: int = Field(
        ge=1, le=10**6, description="samples per optimiser step, over all processes and accumulation passes"
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="forward/backward passes one optimiser step is split into, to save memory",
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="seed of initial weights, sample order and augmentation"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="arithmetic of the forward pass: autocast to bf16 or fp16, or none"
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="largest global L2 norm of the gradient; null: no clipping"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA when there is one, otherwise CPU), cpu, cuda or cuda:N",
    )
    log_every: int = Field(default=20, ge=1, le=10**9, description="steps between log lines", json_schema_extra=FREE)
    save_every: int = Field(
        default=500, ge=1, le=10**9, description="steps between checkpoints", json_schema_extra=FREE
    )
    keep: int = Field(
        default=2, ge=1, le=10**6, description="checkpoints to keep, newest first", json_schema_extra=FREE
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=256,
        description="processes that prepare samples, per training process; 0: prepare them in the training process",
        json_schema_extra=FREE,
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of one operator; null: leave it to torch and OMP_NUM_THREADS",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _splits_evenly(self) -> LoopConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into accumulate = {self.accumulate} equal passes"
            )
        return self


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars"] = Field(default="adamw", description="optimiser")
    lr: float = Field(default=1e-3, gt=0, le=1000, description="peak learning rate, reached after the warm-up")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="weight decay; biases and norm parameters (at most 1-D) get none, but in MoCo, SimSiam and SwAV",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd and lars")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of adamw's first and second moment"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="term in adamw's denominator")
    warmup_steps: int = Field(default=0, ge=0, le=10**9, description="steps of linear warm-up from 0 to lr")
    schedule: Literal["cosine", "constant", "step"] = Field(
        default="cosine", description="learning rate after the warm-up; step: multiplied by gamma at each milestone"
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="steps at which schedule step lowers the learning rate; increasing"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at each milestone of schedule step")
    final_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="learning rate at the last step of schedule cosine, as a share of lr"
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


def check_warmup(loop: LoopConfig, optim: OptimConfig) -> None:
    """For the validator of a configuration that has both sections.

    Raises:
        ValueError: if the warm-up is not over before the last step, so that ``optim.lr`` would never be reached.
    """
    if optim.warmup_steps >= loop.steps:
        raise ValueError(
            f"optim.warmup_steps {optim.warmup_steps} must be less than loop.steps {loop.steps}: the learning rate "
            "would never be reached; for a short trial set optim.warmup_steps=0"
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(
    model: type[SectionT] | ConfigChoice[SectionT],
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
) -> SectionT:
    """Read, merge and validate a configuration.

    Args:
        model: the section that describes the whole configuration, or several and the key that chooses.
        path: YAML file, or a name looked up in ``configs/``; ``None``: defaults and overrides only.
        overrides: ``key.sub=value``; a later one wins. The value is a number, true or false, null, text, or YAML in
            ``[...]``, ``{...}`` or quotes.

    Returns:
        the validated, frozen configuration.

    Raises:
        ConfigError: with all problems, each with the file and line, or the override, it comes from.
    """
    texts = list(overrides)
    closing: list[str] = []
    file = None if path is None else find_config(path)
    chain, problems = ([], []) if file is None else read_chain(file)
    partial = bool(problems)
    changes, bad_overrides = read_overrides(texts, lambda old, new: _merge(old, new, KeyShape()))
    problems += bad_overrides
    if isinstance(model, ConfigChoice):
        model = model.choose([*chain, changes])
    top = KeyShape((model,))
    merged = Item({}, "configuration" if file is None else display_path(file))
    for root in chain:
        merged = Item(_merge(merged, root, top).value, merged.where)
    merged = _complete(Item(_merge(merged, changes, top).value, merged.where), top, None)
    try:
        cfg: SectionT = TypeAdapter(model).validate_json(json.dumps(merged.plain()), strict=True)
    except ValidationError as error:
        explained, closing = explain(error, model, merged, partial=partial)
        problems += explained
    if problems:
        raise ConfigError([*_in_order(problems, texts), *closing])
    return cfg


def _in_order(problems: Iterable[str], overrides: Sequence[str]) -> list[str]:
    """Problems of files by file and line, then those of overrides as they were given; each once."""
    positions = {override_name(override): number for number, override in enumerate(overrides)}

    def position(problem: str) -> tuple[int, str, int]:
        name = next((name for name in positions if problem.startswith(f"{name}: ")), None)
        if name is not None:
            return 1, "", positions[name]
        match = re.match(r"(.*?):(\d+): ", problem, flags=re.DOTALL)
        return (0, match[1], int(match[2])) if match else (0, problem.partition(": ")[0], 0)

    return sorted(dict.fromkeys(problems), key=position)


def _merge(old: Item, new: Item, shape: KeyShape) -> Item:
    """Lay ``new`` over ``old``: mappings key by key, everything else replaced.

    A section whose discriminator changes is replaced as a whole: the other variant's keys mean nothing to it.
    """
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    tag = shape.discriminator
    if tag in new.value and tag in old.value and new.value[tag].plain() != old.value[tag].plain():
        return new
    chosen = {tag: (new.value.get(tag) or old.value[tag]).plain()} if tag in new.value or tag in old.value else None
    section = shape.choose(chosen)
    result = dict(old.value)
    for key, item in new.value.items():
        info = section.model_fields.get(key) if section else None
        result[key] = _merge(result[key], item, field_shape(info) if info else KeyShape()) if key in result else item
    return Item(result, new.where)


def _complete(item: Item, shape: KeyShape, default: Any) -> Item:
    """Fill in what a section leaves out.

    A section that is absent, or empty (``loop:`` with nothing below it), stands for ``{}``, so that its missing keys
    are named one by one; one that sets some keys keeps the field's default for the others, as ``--help`` shows them.
    """
    if not isinstance(item.value, dict):
        return item
    result = dict(item.value)
    if default is not None and (shape.discriminator is None or _same_tag(result, default, shape.discriminator)):
        for name, value in plain_value(default).items():
            result.setdefault(name, _as_item(value, item.where))
    section = shape.choose(Item(result, item.where).plain())
    if section is None or not shape.alone:
        return Item(result, item.where)
    for name, info in section.model_fields.items():
        inner, child = field_shape(info), result.get(name)
        if not inner.sections or not inner.alone:
            continue
        if child is None and info.is_required() and not inner.optional:
            child = Item({}, item.where)
        elif child is not None and child.value is None and not inner.optional:
            child = Item({}, child.where)
        if child is not None:
            standard = dict(default).get(name) if isinstance(default, section) else None
            if standard is None and not info.is_required():
                standard = default_of(info)
            result[name] = _complete(child, inner, standard)
    return Item(result, item.where)


def _same_tag(items: Mapping[str, Item], default: BaseModel, tag: str) -> bool:
    return tag not in items or items[tag].plain() == dict(default).get(tag)


def _as_item(value: Any, where: str) -> Item:
    if isinstance(value, dict):
        return Item({key: _as_item(inner, where) for key, inner in value.items()}, where)
    if isinstance(value, list):
        return Item([_as_item(inner, where) for inner in value], where)
    return Item(value, where)


# --- out of a model again --------------------------------------------------------------------------------------------


def plain(cfg: Section) -> dict[str, object]:
    """A configuration as plain dicts, lists and scalars: what a run records, and what ``changed_keys`` compares."""
    result: dict[str, object] = plain_value(cfg)
    return result


def dump_config(cfg: Section | Mapping[str, Any]) -> str:
    """A configuration, or the ``plain`` form of one, as YAML with every key written out.

    ``load_config`` reads it back to an equal configuration.
    """
    return to_yaml(plain_value(cfg))


def free_keys(model: type[BaseModel]) -> frozenset[str]:
    """Dotted keys that may change when a run is resumed: those marked ``FREE``, and a top-level ``out``."""
    return frozenset({key for key, info in walk(model) if is_free(info)} | ({"out"} & set(model.model_fields)))


FREE_BY_DEFAULT: frozenset[str] = frozenset({"out", *(f"loop.{key}" for key in free_keys(LoopConfig))})
"""The free keys of every configuration with ``out`` and ``loop: LoopConfig``."""


def training_keys(cfg: Section) -> dict[str, object]:
    """Dotted key -> plain value, of every key that influences what is learnt; ``LATER`` ones if they are set."""
    excluded = free_keys(type(cfg)) | ({key for key, info in walk(type(cfg)) if is_later(info)} & keys_at_default(cfg))
    return {key: value for key, value in _flatten(plain(cfg)) if not _covered(key, excluded)}


def keys_at_default(cfg: Section) -> frozenset[str]:
    """Dotted keys, down to plain values, that have their default values."""
    return frozenset(_at_default(cfg, "", None))


def _at_default(cfg: Section, prefix: str, standard: Any) -> Iterator[str]:
    values = dict(cfg)
    # The section's own default wins over those of its class, as in load_config.
    standards = dict(standard) if type(standard) is type(cfg) else {}
    for name, info in type(cfg).model_fields.items():
        value, default = values[name], None
        if name in standards:
            default = standards[name]
        elif not info.is_required():
            default = default_of(info)
        elif not isinstance(value, Section):
            continue
        if isinstance(value, Section):
            yield from _at_default(value, f"{prefix}{name}.", default)
        elif value == default:
            yield from (key for key, _ in _flatten(plain_value({name: value}), prefix))


def changed_keys(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    ignore: Iterable[str] = FREE_BY_DEFAULT,
    at_default: Iterable[str] = (),
) -> list[str]:
    """Dotted keys whose values differ between two plain configurations, sorted.

    Args:
        old: the recorded configuration (``plain``).
        new: that of this run.
        ignore: dotted keys, or sections, that do not count. A command with more of them passes ``free_keys(model)``.
        at_default: keys of ``new`` that ``old`` may lack, because it is older than they are and they have their default
            (``keys_at_default``).
    """
    ignored, absent = tuple(ignore), object()
    before, after = dict(_flatten(plain_value(old))), dict(_flatten(plain_value(new)))
    keys = sorted({*before, *after} - (set(at_default) - set(before)))
    return [k for k in keys if not _covered(k, ignored) and before.get(k, absent) != after.get(k, absent)]


def config_hash(cfg: Section) -> str:
    """12 hex digits (SHA-256) over the training keys: the same for two configurations that learn the same."""
    text = json.dumps(training_keys(cfg), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _covered(key: str, ignore: Iterable[str]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in ignore)
