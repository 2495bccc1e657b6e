# SPDX-License-Identifier: Apache-2.0
"""YAML whose values stay text, so that class names such as ``no`` are not converted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml


class _TextSafeLoader(yaml.SafeLoader):
    """A loader without YAML's guesses: ``no``, ``010``, ``1e3`` and ``2024-01-01`` are texts, nothing is ''."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table whose keys differ: YAML asks for that, PyYAML lets the last value win."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise ValueError(f"the key {key!r} stands twice in the table of line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_plain_yaml(text: str) -> Any:
    """Tables, lists and texts of a YAML document.

    Raises:
        ValueError: it is none, in one line.
    """
    try:
        loader = _TextSafeLoader(text)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # the last two: escapes beyond Unicode, twin keys
        raise ValueError(f"not YAML: {' '.join(str(problem).split())}") from problem
    except RecursionError as problem:
        raise ValueError("YAML nested too deeply") from problem
