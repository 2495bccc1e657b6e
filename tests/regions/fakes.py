# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins for the encoder, the pictures and the proposal model; real arithmetic, no trained weights."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


class TinyEncoder(torch.nn.Module):
    """A random convolution, global pooling and a projection, with the interface of ``JointEncoder``."""

    def __init__(self, *, embed_dim: int = 16, image_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.image_mean = (0.4, 0.5, 0.6)
        self.image_std = (0.2, 0.25, 0.3)
        self.crops_seen = 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = torch.nn.Conv2d(3, 12, 5, stride=2)
            self.project = torch.nn.Linear(12 * 4, embed_dim)
        self.eval()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float() / 255
        if pixels.shape[-1] != self.image_size:
            pixels = F.interpolate(pixels, (self.image_size,) * 2, mode="bilinear", antialias=True)
        return (pixels - torch.tensor(self.image_mean).view(3, 1, 1)) / torch.tensor(self.image_std).view(3, 1, 1)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.crops_seen += len(pixels)
        return self.project(F.adaptive_avg_pool2d(self.conv(pixels).relu(), 2).flatten(1))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()


class NoisePictures:
    """Smooth random pictures of different sizes; pure functions of (seed, index)."""

    def __init__(self, length: int, *, seed: int = 0) -> None:
        self.seed = seed
        self.ids = [1000 + 7 * i for i in range(length)]  # ids that are not positions
        self.opened = 0

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        self.opened += 1
        rng = np.random.default_rng((self.seed, index))
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return np.ascontiguousarray(np.kron(coarse, np.ones((10 + index % 3, 10, 1), dtype=np.uint8)))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"noise {self.seed}".encode()).hexdigest()


class RandomProposer:
    """Boxes drawn from the pixels' own hash: the same picture always gets the same proposals."""

    def __init__(self, *, count: int = 9) -> None:
        self.count = count

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little")
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, self.count + 1))
        height, width = image.shape[:2]
        low = rng.uniform(0, 0.7, (count, 2)) * (width, height) - 4
        high = low + rng.uniform(0.15, 0.5, (count, 2)) * (width, height)
        return torch.tensor(np.concatenate([low, high], 1)), torch.tensor(rng.uniform(0, 1, count))
