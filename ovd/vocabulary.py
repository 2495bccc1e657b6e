# SPDX-License-Identifier: Apache-2.0
"""Vocabulary: the typed class names, with synonyms, negative words and prompt templates.

Grammar of the text form (the page, ``--classes``, a text file)::

    dog, cat; zebra            commas, semicolons and line ends separate classes
    mug: cup, coffee mug       a colon gives synonyms, up to the end of the line or the next semicolon
    -poster                    a minus gives a negative word: regions that look like it are not shown

Commas, semicolons, colons and minus signs of other scripts (``，`` ``、`` ``；`` ``：`` ``－``) are read as these.
Bullets and numbers in front of the lines of a list are left out, and so are lines that begin with ``# `` or ``// ``.
In list form each item is one class and follows the same rules, except that a comma in front of the colon is part of the
name. Names are compared case-insensitively; a repeated name is merged and leaves a notice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovd.plain_yaml import read_plain_yaml
from ovd.words import MINUS, cleaned, listed, listed_lines, notices_of_groups, table_of, with_plain_separators
from pretrain.engine.errors import UserError
from pretrain.engine.files import parse_json, write_atomically

MAX_CLASSES = 10_000
MAX_NAME = 100
MAX_SYNONYMS = 50
MAX_TEXT = 2_000_000
FILE_FORMAT = "ovd-vocabulary-1"

# The 63 prompts of ViLD (Gu et al., ICLR 2022, appendix; the released notebook's list).
TEMPLATES_63: tuple[str, ...] = (
    "There is {article} {} in the scene.",
    "There is the {} in the scene.",
    "a photo of {article} {} in the scene.",
    "a photo of the {} in the scene.",
    "a photo of one {} in the scene.",
    "itap of {article} {}.",
    "itap of my {}.",
    "itap of the {}.",
    "a photo of {article} {}.",
    "a photo of my {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a good photo of {article} {}.",
    "a good photo of the {}.",
    "a bad photo of {article} {}.",
    "a bad photo of the {}.",
    "a photo of a nice {}.",
    "a photo of the nice {}.",
    "a photo of a cool {}.",
    "a photo of the cool {}.",
    "a photo of a weird {}.",
    "a photo of the weird {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of a clean {}.",
    "a photo of the clean {}.",
    "a photo of a dirty {}.",
    "a photo of the dirty {}.",
    "a bright photo of {article} {}.",
    "a bright photo of the {}.",
    "a dark photo of {article} {}.",
    "a dark photo of the {}.",
    "a photo of a hard to see {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of {article} {}.",
    "a low resolution photo of the {}.",
    "a cropped photo of {article} {}.",
    "a cropped photo of the {}.",
    "a close-up photo of {article} {}.",
    "a close-up photo of the {}.",
    "a jpeg corrupted photo of {article} {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of {article} {}.",
    "a blurry photo of the {}.",
    "a pixelated photo of {article} {}.",
    "a pixelated photo of the {}.",
    "a black and white photo of the {}.",
    "a black and white photo of {article} {}.",
    "a plastic {}.",
    "the plastic {}.",
    "a toy {}.",
    "the toy {}.",
    "a plushie {}.",
    "the plushie {}.",
    "a cartoon {}.",
    "the cartoon {}.",
    "an embroidered {}.",
    "the embroidered {}.",
    "a painting of the {}.",
    "a painting of a {}.",
)
# Short list for the shipped small model: its text tower knows plain names and simple captions, not 63 kinds of photo.
TEMPLATES_STICKER: tuple[str, ...] = (
    "{}",
    "{article} {}",
    "a photo of {article} {}",
    "a picture of {article} {}",
)
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    # As ViLD's code fills them: "This is " in front of what begins with a or the (58 of the 63).
    "vild63": tuple(f"This is {t}" if t.startswith(("a", "the")) else t for t in TEMPLATES_63),
    "sticker": TEMPLATES_STICKER,
    "name": ("{}",),
    "photo": ("a photo of a {}",),  # as the encoder of photographs is trained
    "clip": ("a photo of {article} {}.",),  # CLIP's own default (arXiv:2103.00020, section 3.1.4)
}
"""By the name that a detector's configuration and card give."""

_SILENT_H = re.compile(r"(hour|honest|honou?r|heir)")
_YOU_OR_WON = re.compile(r"(uni(?!n|m)|us[aeiu]|ut[ei]|u\b|ufo|usb|ukulele|ura[nl]|eu|ewe|ewer|one\b|one-|once)")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}


def article_for(name: str, *, parity: bool = False) -> str:
    """Return the indefinite article of a name.

    Args:
        name: one class name.
        parity: follow ViLD's released code, which looks at the first letter only and is case-sensitive
            ("a hour", "an unicorn", "a Apple"). Only for comparing with published numbers.
    """
    if parity:
        return "an" if name[:1] in tuple("aeiou") else "a"
    word = name.strip().lower()
    if _SILENT_H.match(word):
        return "an"
    if _YOU_OR_WON.match(word):
        return "a"
    return "an" if word[:1] in tuple("aeiou") else "a"


def fill_template(template: str, name: str, *, parity: bool = False, this_is: bool = False) -> str:
    """Return the prompt of one name.

    Args:
        template: text with ``{}`` for the name and optionally ``{article}``.
        name: class name or synonym. ``_`` is read as a space, ``/`` as " or "; lower-cased, final full stop dropped.
        parity: article as in ViLD's code, see `article_for`.
        this_is: put "This is " in front of prompts that begin with "a" or "the", as ViLD does.
    """
    article = article_for(name, parity=parity)
    clean = name.replace("_", " ").replace("/", " or ").lower().rstrip(".")
    text = template.replace("{article}", article).replace("{}", clean)
    return f"This is {text}" if this_is and text.startswith(("a", "the")) else text


def _clean(phrase: str) -> str:
    """Return the phrase in its normal form (`ovd.words.cleaned`) without enclosing quotes."""
    text = cleaned(phrase)
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    if len(text) > MAX_NAME:
        raise UserError(f"class name {text[:30]!r}… has {len(text)} characters; at most {MAX_NAME} are allowed")
    return text


def split_name(raw: str) -> tuple[str, bool]:
    """(clean name, whether a minus stood in front of it)."""
    text = cleaned(raw)
    negative = text.startswith(tuple(MINUS))
    return _clean(text.lstrip(MINUS) if negative else text), negative


@dataclass(frozen=True, slots=True)
class VocabularyClass:
    """One class: its name, other words that mean the same, and whether it is a negative word."""

    name: str
    synonyms: tuple[str, ...] = ()
    negative: bool = False

    @property
    def phrases(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An ordered set of classes and the templates they are embedded with.

    Attributes:
        classes: all classes in the order typed, negative words included.
        templates: prompt templates, see `fill_template`.
        this_is: put "This is " in front of prompts beginning with "a" or "the".
        parity: articles as in ViLD's code.
        notices: what parsing changed (merged duplicates …); not part of the identity.
        alone: at least one class must be without a minus; False if examples are given as well.
    """

    classes: tuple[VocabularyClass, ...]
    templates: tuple[str, ...] = TEMPLATES_STICKER
    this_is: bool = False
    parity: bool = False
    notices: tuple[str, ...] = field(default=(), compare=False)
    alone: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if self.alone and not any(not c.negative for c in self.classes):
            if self.classes:
                raise UserError("Every word starts with a minus. Type at least one class name without one, e.g. mug")
            raise UserError("Type at least one class name, e.g. mug")
        if len(self.classes) > MAX_CLASSES:
            raise UserError(f"{len(self.classes):,} class names; at most {MAX_CLASSES:,} are allowed. Split the list")
        if not self.templates or any("{}" not in t for t in self.templates):
            raise UserError("every template needs {} where the class name goes")

    @classmethod
    def of(cls, names: Iterable[str], *, templates: Sequence[str] = TEMPLATES_STICKER) -> Vocabulary:
        """One class for each name of a data set, unchanged: nothing is merged, a colon is part of the name."""
        return cls(tuple(VocabularyClass(name) for name in names), templates=tuple(templates))

    @classmethod
    def parse(
        cls,
        text: str | Iterable[str],
        *,
        templates: Sequence[str] = TEMPLATES_STICKER,
        this_is: bool = False,
        parity: bool = False,
        alone: bool = True,
    ) -> Vocabulary:
        """Read typed class names.

        Args:
            text: one string in the grammar of this module, or a list with one class per item.
            templates: prompt templates.
            this_is: see `fill_template`.
            parity: see `article_for`.
            alone: False if examples are given as well: there may then be no word, or negative ones only.

        Raises:
            UserError: no class, too many, a name too long, a line with two colons, or a mapping.
        """
        if isinstance(text, str):
            if len(text) > MAX_TEXT:
                raise UserError(f"the class names are {len(text):,} characters long; at most {MAX_TEXT:,} are allowed")
            text = _json_list(text) or text
        if isinstance(text, Mapping):
            raise UserError('classes are a list, not a dict; synonyms follow a colon: ["mug: cup, coffee mug", "dog"]')
        if isinstance(text, str):
            entries, found = _split_text(text)
        else:
            entries, found = [], []
            for item in text:
                if not isinstance(item, str):
                    raise UserError(f"class names must be strings, not {type(item).__name__}")
                head, colon, tail = with_plain_separators(item).partition(":")
                entries.append((head, _split_synonyms(item, tail) if colon else []))
        classes, notices = _merge(entries)
        return cls(tuple(classes), tuple(templates), this_is, parity, (*found, *notices), alone)

    @property
    def positives(self) -> tuple[VocabularyClass, ...]:
        """The classes to look for."""
        return tuple(c for c in self.classes if not c.negative)

    @property
    def negatives(self) -> tuple[VocabularyClass, ...]:
        """The negative words."""
        return tuple(c for c in self.classes if c.negative)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes to look for; the index is the ``class_id`` of detections."""
        return tuple(c.name for c in self.positives)

    def prompts(self, phrase: str) -> list[str]:
        """The filled templates of one phrase."""
        return [fill_template(t, phrase, parity=self.parity, this_is=self.this_is) for t in self.templates]

    def _record(self) -> dict[str, object]:
        rows = [{"name": c.name, "synonyms": list(c.synonyms), "negative": c.negative} for c in self.classes]
        return {
            "format": FILE_FORMAT,
            "classes": rows,
            "templates": list(self.templates),
            "this_is": self.this_is,
            "parity": self.parity,
        }

    @property
    def hash(self) -> str:
        """16 hex digits over everything that changes the embeddings or their order; the same on every machine."""
        text = json.dumps(self._record(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON, whole or not at all."""
        text = json.dumps(self._record(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(path), text.encode("utf-8", "backslashreplace"))

    @classmethod
    def load(cls, path: str | Path, *, templates: Sequence[str] = TEMPLATES_STICKER) -> Vocabulary:
        """Read a vocabulary file: JSON written by `save`, or a text file in the typed grammar.

        Args:
            path: the file.
            templates: used for text files; a JSON file brings its own.

        Raises:
            UserError: the file is missing, not UTF-8, or not a vocabulary.
        """
        source = Path(path)
        try:
            if source.stat().st_size > 4 * MAX_TEXT:
                raise UserError(f"{source}: vocabulary file is larger than {4 * MAX_TEXT:,} bytes")
            text = source.read_text(encoding="utf-8-sig")
        except OSError as problem:
            raise UserError(f"{source}: cannot read the vocabulary file: {problem.strerror}") from problem
        except UnicodeDecodeError as problem:
            raise UserError(f"{source}: the vocabulary file is not UTF-8 text") from problem
        try:
            if source.suffix.lower() not in (".json", ".yaml", ".yml"):
                kind = table_of(text) if source.suffix.lower() in (".csv", ".tsv", ".pbtxt") else None
                if kind is not None:
                    raise UserError(f"is {kind}, whose columns are no classes; give a text with one name a line")
                return cls.parse(text, templates=templates)
            record = parse_json(text) if source.suffix.lower() == ".json" else read_plain_yaml(text)
            names = listed(record, where="the file") if not _is_record(record) else None
            if names is not None:
                classes, notices = _merge([(name, []) for name in names])
                return cls(tuple(classes), tuple(templates), notices=tuple(notices))
            if not _is_record(record):
                raise UserError("not a list of class names: give a list, or names: [dog, cat] as YOLO's data.yaml")
            return cls._from_record(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            reason = " ".join(str(problem).split())
            raise UserError(f"{source}: not a vocabulary file ({FILE_FORMAT}): {reason}") from problem
        except UserError as problem:
            raise UserError(f"{source}: {problem}") from problem

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Vocabulary:
        if record["format"] != FILE_FORMAT:
            raise UserError(f"unknown vocabulary format {record['format']!r}; this version reads {FILE_FORMAT!r}")
        classes = []
        for row in record["classes"]:
            name, synonyms = row["name"], row.get("synonyms", [])
            if not isinstance(name, str) or not name.strip() or not all(isinstance(s, str) for s in synonyms):
                raise UserError("names and synonyms must be texts, and no name empty")
            # Unchanged: names of a data set may begin with a minus or be quoted.
            classes.append(VocabularyClass(name, tuple(synonyms), bool(row.get("negative"))))
        templates = record.get("templates", TEMPLATES_STICKER)
        if not all(isinstance(t, str) for t in templates):
            raise UserError("templates must be strings")
        return cls(
            tuple(classes), tuple(templates), bool(record.get("this_is", False)), bool(record.get("parity", False))
        )


def _is_record(record: object) -> bool:
    """Whether JSON content is what `Vocabulary.save` writes."""
    return isinstance(record, dict) and "format" in record


def _split_synonyms(entry: str, tail: str) -> list[str]:
    if ":" in tail:
        raise UserError(
            f"two colons in {entry.strip()[:60]!r}: put each class that has synonyms on its own line, e.g. mug: cup"
        )
    return tail.split(",")


def _json_list(text: str) -> list[str] | None:
    """The names in typed JSON, ``["dog", "cat"]`` or ``{"0": "dog", "1": "cat"}``; None for other text.

    Raises:
        UserError: a list of something else.
    """
    if text.strip()[:1] + text.strip()[-1:] not in ("[]", "{}"):
        return None
    try:
        names = listed(parse_json(text), where="class names")
    except (ValueError, RecursionError) as problem:
        raise UserError(
            f'class names in brackets must be a JSON list like ["dog", "cat"] ({problem}); or leave the brackets out: '
            "dog, cat"
        ) from problem
    if names is None:
        raise UserError('class names in braces must be numbered, like {"0": "dog", "1": "cat"}; or write dog, cat')
    return names


def _split_text(text: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Names with their synonyms as typed, and notices of what was left out."""
    entries: list[tuple[str, list[str]]] = []
    lines, notices = listed_lines(with_plain_separators(text))
    for line in lines:
        for part in line.split(";"):
            head, colon, tail = part.partition(":")
            names = head.split(",")
            entries.extend((name, []) for name in names[:-1] if name and not name.isspace())
            entries.append((names[-1], _split_synonyms(part, tail) if colon else []))
    phrases = (phrase for name, synonyms in entries for phrase in (name, *synonyms))
    return entries, [*notices, *notices_of_groups(phrases)]


def _merge(entries: Iterable[tuple[str, list[str]]]) -> tuple[list[VocabularyClass], list[str]]:
    """Clean the entries and merge repeated names; returns the classes and one notice per change."""
    merged: dict[tuple[str, bool], tuple[str, list[str]]] = {}
    repeated: list[str] = []
    notices: list[str] = []
    for raw, raw_synonyms in entries:
        if not raw_synonyms and (not raw or raw.isspace()):
            continue
        name, negative = split_name(raw)
        synonyms = [s for s in map(_clean, raw_synonyms) if s]
        if not name:
            if synonyms:
                raise UserError(f"synonyms {', '.join(synonyms[:3])!r} have no class name in front of the colon")
            continue
        key = (name.casefold(), negative)
        if key in merged:
            repeated.append(name)
        stored_name, stored = merged.setdefault(key, (name, []))
        stored_names = {stored_name.casefold(), *(s.casefold() for s in stored)}
        for synonym in synonyms:
            if synonym.casefold() not in stored_names:
                stored_names.add(synonym.casefold())
                stored.append(synonym)
        if len(stored) > MAX_SYNONYMS:
            raise UserError(f"class {stored_name!r} has {len(stored)} synonyms; at most {MAX_SYNONYMS} are allowed")
    if repeated:
        names = ", ".join(dict.fromkeys(repeated[:5])) + (" …" if len(repeated) > 5 else "")
        notices.append(f"Typed more than once, counted once: {names}")
    classes = []
    for (folded, negative), (name, synonyms) in merged.items():
        if negative and (folded, False) in merged:
            notices.append(f"{name!r} is typed both as a class and with a minus; the minus is ignored")
            continue
        classes.append(VocabularyClass(name, tuple(synonyms), negative))
    return classes, notices
