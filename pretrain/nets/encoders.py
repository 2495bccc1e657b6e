# SPDX-License-Identifier: Apache-2.0
"""Loads trained encoders: a folder of ours, open_clip's models by name, a CLIP checkpoint.

encoder = load_encoder("weights/clip-sticker")              # a folder written by JointEncoder.save
encoder = load_encoder("open_clip:ViT-B-32:openai")         # open_clip's name and tag (it downloads once)
encoder = load_encoder("open_clip:ViT-B-32:clip.safetensors")
encoder = load_encoder("ViT-B-32.pt")                       # a CLIP checkpoint, recognised by its keys
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import EncoderConfig
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.engine.state import load_tensors
from pretrain.engine.stored import stored_section
from pretrain.nets.clip_files import build_open_clip, load_clip_file, load_open_clip
from pretrain.nets.towers import FORMAT, JointEncoder, build_encoder


def load_encoder(spec: str | Path) -> JointEncoder:
    """Load an encoder in eval mode.

    Args:
        spec: a folder written by `JointEncoder.save` (or the `model.safetensors` in it);
            `open_clip:MODEL:WEIGHTS`, where MODEL is one of open_clip's names or a model configuration file (`.json`),
            and WEIGHTS one of its tags (fetched once) or a local `.safetensors`, `.pt` or `.bin` file;
            or a CLIP checkpoint that describes itself (`clip_files.load_clip_file`).

    Raises:
        UserError: something is missing, does not fit, or cannot be read; never falls back to random weights.
    """
    return read_encoder(spec)[0]


def read_encoder(spec: str | Path) -> tuple[JointEncoder, str]:
    """`load_encoder`, and a line on what was found where."""
    if str(spec).startswith("open_clip:"):
        return load_open_clip(str(spec).removeprefix("open_clip:"))
    folder = Path(spec)
    if folder.is_file() and not (folder.suffix == ".safetensors" and (folder.parent / "config.json").is_file()):
        return load_clip_file(folder)
    if folder.suffix == ".safetensors":
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"no encoder at {folder}: expected a folder with config.json and model.safetensors")
    if (folder / "model.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is a detector; give an encoder: its folder, or a name such as clip-photo")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an encoder folder: {name} is missing")
    config = read_config(folder)
    if "open_clip" in config:
        encoder = build_open_clip(config["open_clip"])
    else:
        encoder = build_encoder(
            stored_section(EncoderConfig, config.get("encoder"), where=f"{folder / 'config.json'}: encoder")
        )
    tensors, _ = load_weights(folder / "model.safetensors")
    load_tensors(encoder, tensors, source=folder / "model.safetensors")
    return encoder.eval(), f"{folder}: encoder {encoder.fingerprint()[:12]}"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of an encoder folder.

    Raises:
        UserError: it is unreadable or of another format.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        if isinstance(config, dict) and str(config.get("format")).startswith("backbone/"):
            raise UserError(f"{folder}: is a backbone without a text tower, not an image-text encoder")
        raise UserError(f"{path}: expected format {FORMAT!r}; was it written by another version?")
    return config
