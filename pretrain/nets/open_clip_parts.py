# SPDX-License-Identifier: Apache-2.0
"""Single modules of open_clip without the rest of the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

_PACKAGE = "open_clip"


@cache
def open_clip_module(name: str) -> ModuleType:
    """Import ``open_clip.NAME``, and nothing else of the package where that is possible.

    ``import open_clip`` brings all models of timm and torch's compiler: 3 seconds and 250 MB of which a text tower and
    a tokenizer need nothing. An empty package stands in ``sys.modules`` meanwhile; nothing of it stays there, so that a
    later ``import open_clip`` is an ordinary one.
    """
    module = f"{_PACKAGE}.{name}"
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return importlib.import_module(module)
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(module)
    finally:
        for part in [m for m in sys.modules if m == _PACKAGE or m.startswith(f"{_PACKAGE}.")]:
            del sys.modules[part]
