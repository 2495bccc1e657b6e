# SPDX-License-Identifier: Apache-2.0
"""Open-vocabulary detection: type class names, get boxes. ``from ovd import Detector``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovd.detections import Detections
    from ovd.detector import Detector, Regions
    from ovd.examples import Crop, Example
    from ovd.vocabulary import Vocabulary

_HOMES = {
    "Crop": "ovd.examples",
    "Detections": "ovd.detections",
    "Detector": "ovd.detector",
    "Example": "ovd.examples",
    "Regions": "ovd.detector",
    "Vocabulary": "ovd.vocabulary",
}
__all__ = ["Crop", "Detections", "Detector", "Example", "Regions", "Vocabulary"]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``python -m ovd.NAME --help`` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
