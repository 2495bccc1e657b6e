# SPDX-License-Identifier: Apache-2.0
"""Open-vocabulary detection: type class names, get boxes. ``from ovd import Detector``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovd.detector import Detections, Detector, Regions
    from ovd.examples import Crop, Example
    from ovd.vocabulary import Vocabulary

__all__ = ["Crop", "Detections", "Detector", "Example", "Regions", "Vocabulary"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: ``python -m ovd.NAME --help`` must not wait for torch."""
    if name in ("Detections", "Detector", "Regions"):
        from ovd import detector

        return getattr(detector, name)
    if name in ("Crop", "Example"):
        from ovd import examples

        return getattr(examples, name)
    if name == "Vocabulary":
        from ovd.vocabulary import Vocabulary

        return Vocabulary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
