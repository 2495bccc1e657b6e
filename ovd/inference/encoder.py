# SPDX-License-Identifier: Apache-2.0
"""The image-text encoder of a detector: its image tower, and loading the one the detector was trained against."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from ovd.text import TextEncoder
from ovd.weights import weights_folder
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from ovd.regions.cutting import CropEncoder
    from pretrain.nets.towers import JointEncoder


def image_tower(encoder: TextEncoder) -> CropEncoder | None:
    """The encoder as an encoder of crops, or None without an image tower."""
    return cast("CropEncoder", encoder) if encoder.has_image_tower else None


def load_encoder_of(folder: Path, card: DetectorCard) -> JointEncoder:
    """Load the encoder that the detector of a folder was trained against.

    Raises:
        UserError: none of that name, or another one than in training.
    """
    from pretrain.nets.encoders import load_encoder

    spec = card.encoder
    candidates = [folder / "encoder", folder / spec, Path(spec)]
    if spec.startswith("open_clip:"):
        encoder = load_encoder(spec)
    elif file := next((p for p in (folder / spec, Path(spec)) if p.is_file()), None):
        encoder = load_encoder(file)
    elif exported := next((p for p in candidates if (p / "config.json").is_file()), None):
        encoder = load_encoder(exported)
    else:
        encoder = load_encoder(weights_folder(spec))
    if encoder.fingerprint() != card.encoder_fingerprint:
        raise UserError(
            f"{folder}: trained against another text encoder than {spec!r} is now "
            f"({card.encoder_fingerprint[:12]}, found {encoder.fingerprint()[:12]}); its embeddings would not match"
        )
    return encoder
