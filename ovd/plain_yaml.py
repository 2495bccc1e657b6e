# SPDX-License-Identifier: Apache-2.0
"""YAML whose values stay text, so that class names such as ``no`` are not converted."""

from __future__ import annotations

from typing import Any

import yaml


class _TextSafeLoader(yaml.SafeLoader):
    """A loader without YAML's guesses: ``no``, ``010``, ``1e3`` and ``2024-01-01`` are texts, nothing is ''."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def read_plain_yaml(text: str) -> Any:
    """Tables, lists and texts of a YAML document.

    Raises:
        ValueError: it is none, in one line.
    """
    try:
        loader = _TextSafeLoader(text)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # the last two: escapes beyond Unicode
        raise ValueError(f"not YAML: {' '.join(str(problem).split())}") from problem
    except RecursionError as problem:
        raise ValueError("YAML nested too deeply") from problem
