# SPDX-License-Identifier: Apache-2.0
"""A CLIP of random weights in open_clip's own files, small enough for a test, and photos with boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


def save_clip(folder: Path, *, suffix: str = "safetensors") -> Path:
    """Write a random CLIP as open_clip does for the hub; returns its weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**MODEL)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    if suffix == "safetensors":
        from safetensors.torch import save_file

        path = folder / "open_clip_model.safetensors"
        save_file(state, path)
    else:
        path = folder / f"open_clip_pytorch_model.{suffix}"
        torch.save(state, path)
    return path


def spec_of(path: Path) -> str:
    """How the command line names the model of `save_clip`."""
    return f"open_clip:{path.parent / 'open_clip_config.json'}:{path}"


def photo(seed: int = 0, size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """(H, W, 3) uint8: coloured rectangles on noise."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(90, 130, (*size, 3), dtype=np.uint8)
    picture[20:70, 10:60], picture[30:90, 70:120] = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    return picture


def write_photos(folder: Path, count: int) -> str:
    """Photos with two boxes each as COCO data; returns the ``--data`` of it."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        Image.fromarray(photo(number)).save(folder / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 128, "height": 96})
        for category, box in ((1, [10, 20, 50, 50]), (2, [70, 30, 50, 60])):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": n, "name": name} for n, name in enumerate(("dog", "lamp", "car", "guitar", "spoon"), 1)]
    (folder / "boxes.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return f"coco:{folder / 'images'}:{folder / 'boxes.json'}"
