# SPDX-License-Identifier: Apache-2.0
"""Base/novel splits of a category list, as data with a hash.

*Base* categories are those a detector was trained on; of *novel* ones it only knows the names. A category in neither
group is left out of every mean. Numbers are comparable only for the same split, so its hash is written beside them
(`Split.hash`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.coco_entries import CocoJson
from pretrain.engine.errors import UserError, nearest
from pretrain.engine.files import read_json, write_atomically

# COCO's 80 categories with their official, non-contiguous ids.
COCO_NAMES: dict[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

# The 48 seen and 17 unseen categories of Bansal et al. 2018 ("Zero-Shot Object Detection"), as OVR-CNN, ViLD and Detic
# use them.
OVCOCO_BASE: tuple[int, ...] = (
    1, 2, 3, 4, 7, 8, 9, 15, 16, 19, 20, 23, 24, 25, 27, 31, 33, 34, 35, 38, 42, 44, 48, 50, 51, 52, 53, 54, 55, 56, 57,
    59, 60, 62, 65, 70, 72, 73, 74, 75, 78, 79, 80, 82, 84, 85, 86, 90,
)  # fmt: skip
OVCOCO_NOVEL: tuple[int, ...] = (5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which category ids are base and which are novel.

    Attributes:
        name: a word for tables and file names.
        base: category ids seen in training, ascending.
        novel: category ids not seen in training, ascending.
        names: category id -> name; holds every id of both groups, and may hold more (known, but left out of every
            mean).

    Raises:
        UserError: an id stands in both groups or twice in one, an id has no name, both groups are empty, or two
            evaluated categories share a name.
    """

    name: str
    base: tuple[int, ...]
    novel: tuple[int, ...]
    names: Mapping[int, str] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self._checked("base", self.base))
        object.__setattr__(self, "novel", self._checked("novel", self.novel))
        object.__setattr__(self, "names", dict(self.names))
        if both := sorted(set(self.base) & set(self.novel)):
            listed = some_of(f"{i} ({self.names.get(i, '?')})" for i in both)
            raise UserError(f"split {self.name!r}: in base and in novel: {listed}. Leave each category in one group.")
        if not self.base and not self.novel:
            raise UserError(f"split {self.name!r}: base and novel are both empty, so there is nothing to average.")
        if nameless := [i for i in self.ids if i not in self.names]:
            raise UserError(f"split {self.name!r}: no name for category id {some_of(map(str, nameless))}.")
        index_of: dict[str, int] = {}
        for i in self.ids:
            if (first := index_of.setdefault(self.names[i], i)) != i:
                raise UserError(f"split {self.name!r}: ids {first} and {i} are both named {self.names[i]!r}.")

    def _checked(self, group: str, ids: Iterable[int]) -> tuple[int, ...]:
        ids = tuple(ids)
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int):
                raise UserError(f"split {self.name!r}: {group} holds {i!r}, which is not a whole number.")
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise UserError(f"split {self.name!r}: {group} lists {some_of(map(str, twice))} more than once.")
        return tuple(sorted(ids))

    @property
    def ids(self) -> tuple[int, ...]:
        """All evaluated category ids, base and novel, ascending."""
        return tuple(sorted(self.base + self.novel))

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """`{"all": ids, "base": ids, "novel": ids}`, in the order tables print them."""
        return {"all": self.ids, "base": self.base, "novel": self.novel}

    @property
    def hash(self) -> str:
        """12 hex digits over the ids and names of both groups; the split's own name and left-out names do not enter."""
        content = {g: [[i, self.names[i]] for i in ids] for g, ids in (("base", self.base), ("novel", self.novel))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def group_of(self, category_id: int) -> str:
        """`"base"`, `"novel"` or `"outside"`."""
        return "base" if category_id in self.base else "novel" if category_id in self.novel else "outside"

    def check_categories(self, categories: Mapping[int, str], *, where: str) -> None:
        """Refuse a data set whose categories do not fit this split.

        Args:
            categories: id -> name of the data set.
            where: the file, for the message.

        Raises:
            UserError: an id of the split is missing there, or has another name (ids renumbered to be contiguous,
                typically).
        """
        if missing := [i for i in self.ids if i not in categories]:
            listed = some_of(f"{i} ({self.names[i]})" for i in missing)
            raise UserError(f"split {self.name!r} names categories that {where} does not define: {listed}.")
        other = [i for i in self.ids if _same(categories[i]) != _same(self.names[i])]
        if other:
            listed = some_of(f"{i} is {self.names[i]!r} in the split but {categories[i]!r} there" for i in other)
            raise UserError(f"split {self.name!r} does not fit {where}: {listed}. Were the ids renumbered?")

    def to_dict(self) -> dict[str, object]:
        """JSON content that `Split.load` reads back to an equal split."""
        return {"name": self.name, "base": list(self.base), "novel": list(self.novel),
                "names": {str(i): n for i, n in sorted(self.names.items())}, "hash": self.hash}  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the split as JSON."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, spec: str | Path, *, categories: Mapping[int, str] | None = None) -> Split:
        """A built-in split or a split file.

        Args:
            spec: `"ovcoco"` (COCO 48/17), `"stickers"` (the shipped Sticker Scenes), or a JSON file
                `{"name", "base": [...], "novel": [...]}` whose lists hold category ids or names; an optional `"names"`
                maps ids to names.
            categories: id -> name of the data set: needed for a file of names, or of ids without `"names"`.

        Raises:
            UserError: missing file, unreadable JSON, wrong shape, unknown id or name, or any of the class's own checks.
        """
        if spec == "ovcoco":
            return cls(name="ovcoco", base=OVCOCO_BASE, novel=OVCOCO_NOVEL, names=COCO_NAMES)
        if spec == "stickers":
            return stickers_split()
        path = Path(spec)
        if not path.is_file():
            raise UserError(f"no split file {path}; give a JSON file, or one of: all, ovcoco, lvis, stickers.")
        return cls.from_dict(read_json(path), categories=categories, where=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, categories: Mapping[int, str] | None = None, where: str = "split") -> Split:
        """A split from JSON content; see `load` for the form and the errors."""
        if not isinstance(content, dict):
            raise UserError(f"{where}: expected an object with base and novel, found {type(content).__name__}.")
        for key in ("base", "novel"):
            if not isinstance(content.get(key), list):
                raise UserError(f"{where}: {key!r} must be a list of category ids or names.")
        if unknown := sorted(set(content) - {"name", "base", "novel", "names", "hash"}):
            raise UserError(
                f"{where}: unknown key {some_of(map(repr, unknown))}; known: name, base, novel, names, hash."
            )
        names = dict(categories or {})
        named = content.get("names", {})
        if not isinstance(named, dict) or not all(_is_id(k) and isinstance(v, str) for k, v in named.items()):
            raise UserError(f"{where}: 'names' must map category ids to names.")
        names |= {int(k): v for k, v in named.items()}
        by_name: dict[str, list[int]] = {}
        for i, n in names.items():
            by_name.setdefault(_same(n), []).append(i)

        def resolve(group: str, entry: Any) -> int:
            if isinstance(entry, str):
                matching = by_name.get(_same(entry), [])
                if len(matching) != 1:
                    problem = "unknown category name" if not matching else f"ids {matching} share the name"
                    raise UserError(f"{where}: {group}: {problem} {entry!r}.{_close(entry, by_name)}")
                return matching[0]
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise UserError(f"{where}: {group}: {entry!r} is neither a category id nor a name.")
            if entry not in names:
                raise UserError(f"{where}: {group}: unknown category id {entry}.")
            return entry

        name = content.get("name") or Path(where).stem
        base, novel = ([resolve(g, e) for e in content[g]] for g in ("base", "novel"))
        split = cls(name=str(name), base=tuple(base), novel=tuple(novel), names=names)
        if "hash" in content and content["hash"] != split.hash:
            raise UserError(
                f"{where}: its hash {content['hash']!r} does not fit its content ({split.hash}): the file was edited. "
                "Remove the 'hash' line if that was meant."
            )
        return split

    @classmethod
    def everything(cls, categories: Mapping[int, str]) -> Split:
        """Every category in base: plain closed-vocabulary evaluation."""
        return cls(name="all", base=tuple(categories), novel=(), names=categories)


def lvis_split(categories: Iterable[CocoJson]) -> Split:
    """Base = frequent and common, novel = rare (ViLD §4.1), from the `frequency` field (`f`, `c`, `r`) of LVIS
    categories.

    Args:
        categories: the `categories` list of an LVIS annotation file; v1 gives 866 base and 337 novel.

    Raises:
        UserError: a category without a known frequency.
    """
    groups: dict[str, list[int]] = {"f": [], "c": [], "r": []}
    for c in categories:
        if c.get("frequency") not in groups:
            raise UserError(
                f"category {c.get('id')} ({c.get('name')}): 'frequency' must be f, c or r, is {c.get('frequency')!r}. "
                "Is this an LVIS annotation file?"
            )
        groups[c["frequency"]].append(c["id"])
    names = {c["id"]: c["name"] for c in categories}
    return Split(name="lvis", base=tuple(groups["f"] + groups["c"]), novel=tuple(groups["r"]), names=names)


def stickers_split() -> Split:
    """The shipped Sticker Scenes: 552 nouns; category id = class index + 1, because COCO tools count from 1."""
    from pretrain.data.stickers import Stickers  # a room below; imported late to keep this module light

    data = Stickers.load()
    return Split(
        name="stickers",
        base=tuple(i + 1 for i in data.base),
        novel=tuple(i + 1 for i in data.novel),
        names={i + 1: noun for i, noun in enumerate(data.nouns)},
    )


def _same(name: str) -> str:
    """Names as compared: case and the separators `_`, `-` and blank do not matter."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _is_id(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()


def some_of(items: Iterable[str]) -> str:
    """The first five items, and how many more there are."""
    items = list(items)
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _close(name: str, names: Iterable[str]) -> str:
    matching = nearest(_same(name), names, 1)
    return f" Did you mean {matching[0]!r}?" if matching else ""
