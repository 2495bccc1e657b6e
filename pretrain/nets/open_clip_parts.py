# SPDX-License-Identifier: Apache-2.0
"""Single modules of open_clip without the rest of the package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

_PACKAGE = "open_clip"


def open_clip_module(name: str) -> ModuleType:
    """Import ``open_clip.NAME``, and nothing else of the package where that is possible.

    ``import open_clip`` brings all models of timm and torch's compiler: 3 seconds and 250 MB of which a text tower and
    a tokenizer need nothing. The package stands in ``sys.modules`` as an empty one meanwhile; later imports of it are
    whole, and share this module.
    """
    whole = f"{_PACKAGE}.{name}"
    if _PACKAGE in sys.modules or whole in sys.modules:
        return importlib.import_module(whole) if whole not in sys.modules else sys.modules[whole]
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return importlib.import_module(whole)  # which says what is wrong
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(whole)
    finally:
        del sys.modules[_PACKAGE]
