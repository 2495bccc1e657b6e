# SPDX-License-Identifier: Apache-2.0
"""Duplicates of a photo, which must not be split between training and held-out data."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pretrain.engine.files import sha256_of

_AUGMENTED = re.compile(r"(.+)\.rf\.[0-9A-Za-z]{16,}")
"""Stem of what Roboflow makes of a photo: its own name, then a hash. Augmented photos have several of one name."""


def photo_groups(files: Sequence[Path]) -> list[int]:
    """For each file the first that shows the same photo: itself, one of the same content, or another augmentation.

    Only files of equal length are read; one that is not there is alone.
    """
    lengths: dict[int, list[int]] = {}
    for number, file in enumerate(files):
        if file.is_file():
            lengths.setdefault(os.stat(file).st_size, []).append(number)
    alike = {number for numbers in lengths.values() if len(numbers) > 1 for number in numbers}
    first: dict[str, int] = {}
    groups = []
    for number, file in enumerate(files):
        augmented = _AUGMENTED.fullmatch(file.stem)
        keys = [f"augmented {augmented[1]}"] if augmented else []
        if number in alike:
            keys.append(f"content {sha256_of(file)}")
        group = next((first[key] for key in keys if key in first), number)
        for key in keys:
            first.setdefault(key, group)
        groups.append(group)
    return groups
