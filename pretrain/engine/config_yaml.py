# SPDX-License-Identifier: Apache-2.0
"""YAML with the position of every value, and the files and overrides that make up a configuration.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: ``1e-4`` is a float; ``on``, ``yes`` and ``12:30`` are text.
Only nodes are composed, never objects; tags other than the plain types are refused, so nothing in a file can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.engine.errors import ConfigError, nearest, shorten

MAX_BYTES = 1_000_000  # of one file
MAX_NODES = 20_000  # of one file after its aliases are expanded: stops "billion laughs"
MAX_DEPTH = 32  # of nesting in a file, and of ``base:`` links
_ABOVE = Path(__file__).resolve().parents
REPOSITORY = _ABOVE[2] if (_ABOVE[2] / "configs").is_dir() else _ABOVE[1]
"""The folder with ``configs``: the checkout, or in an installed wheel the package."""
_TOO_MANY = f"more than {MAX_NODES} values, counting what aliases repeat"
SUFFIXES = ("", ".yaml", ".yml")


@dataclass
class Item:
    """A value and where it stands.

    Attributes:
        value: a scalar, a list of items or a dict of items.
        where: ``file:line``, or ``override 'key=value'``.
    """

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without its position."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


class _Refused(Exception):
    """Legal YAML that is not accepted here."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}")


# --- scalars ---------------------------------------------------------------------------------------------------------

_CORE_SCHEMA = {  # tag -> pattern, first characters ("" is the empty scalar): YAML 1.2.2, section 10.3.2
    "null": (r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+0123456789."),
    ),
}


def scalar_from_text(text: str) -> Any:
    """The value of an unquoted YAML scalar.

    Raises:
        ValueError: for an integer beyond Python's digit limit.
    """
    for tag, (pattern, _) in _CORE_SCHEMA.items():
        if re.match(pattern, text):
            return _construct(tag, text)
    return text


def _construct(tag: str, text: str) -> Any:
    if tag == "null":
        return None
    if tag == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{shorten(text)!r} is neither true nor false")  # reached by an explicit !!bool
        return text.lower() == "true"
    if tag == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if tag == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def has_lone_surrogate(text: str) -> bool:
    """Whether ``text`` cannot be written as UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


# --- one document ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Composes nodes; stops at a nesting depth well before Python's own recursion limit would."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # PyYAML's way to replace its 1.1 rules
    depth = 0
    count = 0
    at: Callable[[int], str] = str

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_NODES:
            where = self.at(self.peek_event().start_mark.line)
            limit = f"nested more than {MAX_DEPTH} levels deep" if self.depth > MAX_DEPTH else _TOO_MANY
            raise _Refused(where, limit)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Reader:
    """Turns the nodes of one document into items."""

    def __init__(self, locate: Callable[[yaml.Node], str]) -> None:
        self.locate = locate
        self.problems: list[str] = []
        self.count = 0

    def item(self, node: yaml.Node, where: str, depth: int = 0) -> Item:
        self.count += 1
        if self.count > MAX_NODES:
            raise _Refused(where, _TOO_MANY)
        if depth > MAX_DEPTH:
            raise _Refused(where, f"nested more than {MAX_DEPTH} levels deep (does an alias contain itself?)")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return Item(self._mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return Item([self.item(child, self.locate(child), depth + 1) for child in node.value], where)
        if isinstance(node, yaml.ScalarNode) and tag in (*_CORE_SCHEMA, "str"):
            try:
                value = _construct(tag, node.value)
            except ValueError as error:
                raise _Refused(where, f"not readable as {tag}: {shorten(str(error))}") from None
            if isinstance(value, str) and has_lone_surrogate(value):
                raise _Refused(where, "text with half a surrogate pair")
            return Item(value, where)
        raise _Refused(where, f"the tag '{shorten(node.tag)}' is not accepted; write a plain value")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Item]:
        result: dict[str, Item] = {}
        for key_node, value_node in node.value:
            where = self.locate(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value or has_lone_surrogate(key_node.value):
                self.problems.append(f"{where}: a key must be a word")
                continue
            key = key_node.value
            if key == "<<":
                self.problems.append(f"{where}: '<<' is not accepted; a file inherits with 'base: other.yaml'")
            elif key in result:
                self.problems.append(f"{where}: duplicate key '{shorten(key)}' (first at {result[key].where})")
            else:
                result[key] = self.item(value_node, where, depth + 1)
        return result


def read_yaml(text: str, source: str, *, lines: bool = True) -> tuple[Item | None, list[str]]:
    """Parse one document.

    Args:
        text: YAML.
        source: what to call it in messages.
        lines: whether line numbers mean something to the reader of a message.

    Returns:
        the root, ``None`` when nothing could be made of it, and the problems found.
    """

    def at(line: int) -> str:
        return f"{source}:{line + 1}" if lines else source

    reader = _Reader(lambda node: at(node.start_mark.line))
    try:
        loader = _Loader(text)
        loader.at = at
        node = loader.get_single_node()
        root = Item({}, source) if node is None else reader.item(node, at(node.start_mark.line))
    except _Refused as error:
        return None, [*reader.problems, str(error)]
    except yaml.reader.ReaderError as error:
        return None, [f"{at(text.count(chr(10), 0, error.position))}: not readable as YAML: {error.reason}"]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.context, error.problem) if part)
        return None, [f"{at(mark.line if mark else 0)}: not readable as YAML: {shorten(why, 200)}"]
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes beyond Unicode, \UFFFFFFFF
        return None, [f"{source}: not readable as YAML: {shorten(str(error), 200)}"]
    if root.value is None:
        root = Item({}, source)  # nothing but comments
    return root, reader.problems


# --- writing ---------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Quotes each text that a YAML 1.1 or 1.2 reader would read as another type; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if any(re.match(pattern, value) for pattern, _ in _CORE_SCHEMA.values()) else None
    if not value.isprintable():
        style = (
            '"'  # PyYAML writes line separators such as U+0085 unescaped in the other styles, and reads a space back
        )
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    simple = not any(isinstance(element, (list, dict)) for element in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=simple or None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def to_yaml(value: Any, *, one_line: bool = False) -> str:
    """Plain dicts, lists and scalars as YAML that ``read_yaml`` reads back to the same; keys keep their order."""
    style = True if one_line else False
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=style, sort_keys=False, allow_unicode=True, width=10**9
    )
    return text.strip().removesuffix("...").strip() if one_line else text


# --- files -----------------------------------------------------------------------------------------------------------


def display_path(path: Path) -> str:
    """A path as the person would write it: relative when it is below the current directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _search_folders(search: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders of ``search`` that exist: below the current directory first, then below the repository."""
    result: list[Path] = []
    for root in (Path(), REPOSITORY):
        for folder in search:
            path = root / folder
            if path.is_dir() and not any(path.samefile(other) for other in result):
                result.append(path)
    return result


def find_config(path: str | os.PathLike[str], search: Sequence[str | os.PathLike[str]] = ("configs",)) -> Path:
    """Find a configuration file.

    Args:
        path: a path, or a name looked up in the search folders; ``.yaml`` may be left out.
        search: folders below the current directory and below the repository, tried after the path itself.

    Raises:
        ConfigError: when there is no such file; the nearest names are suggested.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ConfigError([f"'{text}' is not a file name"])
    direct = Path(text)
    try:
        folders = [] if direct.is_absolute() else _search_folders(search)
        for root in (Path(), *folders):
            for suffix in SUFFIXES:
                candidate = root / f"{text}{suffix}"
                if candidate.is_file():
                    return candidate
        if direct.is_dir():
            raise ConfigError([f"{text}: is a folder; name a YAML file"])
        if direct.exists():
            raise ConfigError([f"{text}: is not a regular file"])
    except OSError as error:  # a name too long, a folder that may not be entered, a circle of links
        raise ConfigError([f"{shorten(text)}: cannot be read: {error.strerror}"]) from None
    hint = file_hint(text, folders or [direct.parent])
    raise ConfigError([f"{shorten(text, 200)}: no such file{hint}"])


def file_hint(name: str, folders: Iterable[Path]) -> str:
    """The configuration files in ``folders`` whose names are near ``name``, as the end of a message."""
    names: list[str] = []
    for folder in folders:
        if folder.is_dir():
            names += sorted(str(p.relative_to(folder)) for p in _yaml_files(folder))
    names = list(dict.fromkeys(names))
    by_form: dict[str, str] = {}
    for candidate in names:
        for form in (candidate, str(Path(candidate).with_suffix("")), Path(candidate).name, Path(candidate).stem):
            by_form.setdefault(form, candidate)
    close = list(dict.fromkeys(by_form[form] for form in nearest(name, by_form) + nearest(Path(name).stem, by_form)))
    if close:
        return f" - did you mean {' or '.join(repr(candidate) for candidate in close[:3])}?"
    return f" (there are: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''})" if names else ""


def _yaml_files(folder: Path, limit: int = 500) -> list[Path]:
    """YAML files at most two folders deep: somebody may keep a data set beside the configuration."""
    paths: list[Path] = []
    for pattern in ("*", "*/*", "*/*/*"):
        for suffix in SUFFIXES[1:]:
            paths += list(folder.glob(pattern + suffix))[: limit - len(paths)]
    return paths


def read_file(path: Path) -> tuple[Item | None, list[str]]:
    """``read_yaml`` of a file; what is wrong with the file itself is a problem too."""
    source = display_path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return None, [f"{source}: cannot be read: {error.strerror}"]
    if len(data) > MAX_BYTES:
        return None, [f"{source}: larger than {MAX_BYTES // 1000} kB; is this a configuration?"]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, [f"{source}:{line}: not UTF-8 text"]
    return read_yaml(text, source)


def read_chain(path: Path) -> tuple[list[Item], list[str]]:
    """Read a file and, through ``base:``, those it inherits from.

    Returns:
        the roots of the files that could be read, the innermost base first, without ``base``; and the problems.
    """
    chain: list[Item] = []
    visited: list[Path] = []
    base: Item | None = None
    while True:
        real = path.resolve()
        if base is not None and real in visited:
            circle = " -> ".join(display_path(p) for p in [*visited[visited.index(real) :], real])
            return chain, [f"{base.where}: base: these files inherit from each other in a circle: {circle}"]
        if base is not None and len(visited) == MAX_DEPTH:
            return chain, [f"{base.where}: base: a chain of more than {MAX_DEPTH} files"]
        visited.append(real)
        root, problems = read_file(path)
        if root is None:
            return chain, problems
        if not isinstance(root.value, dict):
            return chain, [
                *problems,
                f"{root.where}: expected lines of 'key: value', got {describe_value(root.plain())}",
            ]
        base = root.value.pop("base", None)
        chain.insert(0, root)
        if problems or base is None:
            return chain, problems
        if not isinstance(base.value, str) or not base.value:
            return chain, [
                f"{base.where}: base: expected the path of one YAML file, got {describe_value(base.plain())}"
            ]
        try:
            path = find_config(path.parent / base.value, search=())
        except ConfigError as error:
            return chain, [f"{base.where}: base: {error} (the path is relative to {display_path(path)})"]


# --- overrides -------------------------------------------------------------------------------------------------------


def override_name(override: str) -> str:
    """How messages call an override."""
    text = override.encode("utf-8", "backslashreplace").decode()  # argv may hold bytes that are not UTF-8
    return f"override '{shorten(text)}'"


def read_overrides(overrides: Iterable[str], merge: Callable[[Item, Item], Item]) -> tuple[Item, list[str]]:
    """``key.sub=value`` strings as one tree, laid over each other with ``merge`` in their order."""
    root = Item({}, "overrides")
    problems: list[str] = []
    for override in overrides:
        where = override_name(override)
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"{where}: expected key=value, for example optim.lr=1e-4")
        elif has_lone_surrogate(override):
            problems.append(f"{where}: not UTF-8 text")
        elif parts[0] == "base":
            problems.append(f"{where}: 'base' can only stand in a file; name the other file with --config")
        elif len(parts) > MAX_DEPTH:
            problems.append(f"{where}: nested more than {MAX_DEPTH} levels deep")
        else:
            item, override_problems = _override_value(text.strip(), where)
            problems += override_problems
            if item is not None:
                for part in reversed(parts):
                    item = Item({part: item}, where)
                root = merge(root, item)
    return root, problems


def _override_value(text: str, where: str) -> tuple[Item | None, list[str]]:
    """Lists, mappings and quoted text are YAML; anything else is one scalar, taken whole (``#``, ``: `` are text)."""
    if text[:1] in ("[", "{", '"', "'"):
        return read_yaml(text, where, lines=False)
    try:
        return Item(scalar_from_text(text), where), []
    except ValueError as error:
        return None, [f"{where}: {shorten(str(error))}"]


def describe_value(value: Any) -> str:
    """The value in words, for a message."""
    if isinstance(value, dict) and len(value) != 1:
        return f"a mapping of {len(value)} keys"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {shorten(repr(value))}" if value else "an empty text"
    return shorten(to_yaml(value, one_line=True))
