# SPDX-License-Identifier: Apache-2.0
"""A command whose configuration is one of several sections; a key below the top level chooses, such as ``model.arch``.

pydantic's discriminated unions want the key in the section itself; here it lies deeper, and most keys differ with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.engine.config_schema import walk
from pretrain.engine.config_yaml import Item, describe_value
from pretrain.engine.errors import ConfigError, did_you_mean

SectionT = TypeVar("SectionT", bound=BaseModel)


@dataclass(frozen=True)
class ConfigChoice(Generic[SectionT]):
    """Sections and the key that chooses among them.

    Attributes:
        key: dotted.
        sections: value of the key → section.
        default: value of a configuration without the key.
    """

    key: str
    sections: Mapping[str, type[SectionT]]
    default: str

    def choose(self, roots: Iterable[Item]) -> type[SectionT]:
        """The section that configurations and overrides choose, the last of them first.

        Raises:
            ConfigError: an unknown value.
        """
        chosen = Item(self.default, "default")
        for root in roots:
            chosen = self._item(root) or chosen
        value = chosen.plain()
        if not isinstance(value, str) or value not in self.sections:
            hint = did_you_mean(value, self.sections) if isinstance(value, str) else ""
            expected = ", ".join(self.sections)
            raise ConfigError(
                [f"{chosen.where}: {self.key}: expected one of {expected}; got {describe_value(value)}{hint}"]
            )
        return self.sections[value]

    def _item(self, root: Item) -> Item | None:
        item: Item | None = root
        for part in self.key.split("."):
            item = item.value.get(part) if item is not None and isinstance(item.value, dict) else None
        return item

    def walk(self) -> Iterator[tuple[str, FieldInfo]]:
        """Every dotted key of every section and its field."""
        for section in dict.fromkeys(self.sections.values()):
            yield from walk(section)
