# SPDX-License-Identifier: Apache-2.0
"""Files of a user outside of the repository: embeddings of words, and calibrations of other encoders.

``WORDBOX_HOME`` is the folder of both; without it the cache is under ``XDG_CACHE_HOME`` (``~/.cache/wordbox``), the
calibrations under ``XDG_DATA_HOME`` (``~/.local/share/wordbox``). A calibration of shipped boxes with another encoder
is stored with neither of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.embed import detector_fingerprint
from ovd.inference.scoring import Calibration
from ovd.weights import user_folder
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json, write_atomically
from pretrain.engine.stored import require_types

if TYPE_CHECKING:
    from ovd.text import TextEncoder

FORMAT = "encoder-calibration/1"


@dataclass(frozen=True, kw_only=True)
class StoredCalibration:
    """Scores of one encoder on the boxes of one detector, as they were fitted.

    Attributes:
        weights: name of the detector's folder.
        encoder: as it was named.
        key: of both, by content.
        data: what it was fitted on.
        scenes: pictures of the fit.
        calibration: fields of `Calibration`.
        figures: what was measured on the other half.
        format: of the file.
    """

    weights: str
    encoder: str
    key: str
    data: str
    scenes: int
    calibration: dict[str, float]
    figures: dict[str, float]
    format: str = FORMAT


def text_cache() -> Path | None:
    """Folder for embeddings of words; None where nothing can be written."""
    folder = user_folder("text", "XDG_CACHE_HOME", ".cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def calibration_file(folder: Path, spec: str, encoder: TextEncoder) -> Path:
    """Where the calibration of an encoder on the boxes of a folder is kept."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{folder.resolve().name}-{spec}")[-80:].strip("-")
    return _calibrations() / f"{readable}-{calibration_key(folder, encoder)}.json"


def calibration_key(folder: Path, encoder: TextEncoder) -> str:
    """16 digits of what decides scores: the bytes of the boxes' network and of the encoder."""
    return hashlib.sha256(f"{detector_fingerprint(folder)} {encoder.fingerprint()}".encode()).hexdigest()[:16]


def read_calibration(folder: Path, encoder: TextEncoder) -> StoredCalibration | None:
    """The calibration that was fitted for an encoder on the boxes of a folder; None: none was.

    Raises:
        UserError: a file that is damaged, with its name.
    """
    key = calibration_key(folder, encoder)
    file = next(iter(sorted(_calibrations().glob(f"*-{key}.json"))), None)
    if file is None:
        return None
    raw = read_json(file)
    names = {field.name for field in fields(Calibration)}
    try:
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or not set(raw["calibration"]) <= names:
            raise TypeError(f"not of format {FORMAT}")
        require_types(StoredCalibration, raw)
        return StoredCalibration(**raw)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: no calibration ({error}); remove it, and run wordbox calibrate again") from error


def write_calibration(file: Path, stored: StoredCalibration) -> None:
    """Keep a calibration."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(asdict(stored), indent=1, ensure_ascii=False) + "\n").encode())


def _calibrations() -> Path:
    return user_folder("calibrations", "XDG_DATA_HOME", ".local/share")
