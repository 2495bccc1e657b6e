# SPDX-License-Identifier: Apache-2.0
"""A network and an encoder that know colours: flat rectangles are found exactly, words are bags of random vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.detector import Detector
from ovd.inference.arrays import unit_rows
from ovd.inference.everything import PromptFreeWords
from ovd.inference.region_model import RegionModel
from ovd.inference.scoring import Calibration, RegionSet

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
}
GREY = (128, 128, 128)
DIM = 64
# Words of the templates say nothing about a class.
FILLER = {"a", "an", "the", "photo", "picture", "of", "sticker", "in", "scene", "there", "is", "drawing", "this"}


class WordEncoder(nn.Module):
    """Text encoder: the sum of a fixed random vector per word, fillers left out. Counts the texts it encodes.

    Its image side names each pixel's colour and sums the words, so a crop of a red rectangle is embedded as "red".
    """

    has_image_tower = True
    image_size = 16
    image_mean = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.crops = 0  # that were encoded
        self.encoded: list[str] = []
        self._texts: list[str] = []

    def fingerprint(self) -> str:
        return "f" * 64

    def token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        start = len(self._texts)
        self._texts.extend(texts)
        return np.arange(start, start + len(texts))[:, None]

    def text_rows(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.encoded.extend(texts)
        return np.stack([self.vector(t).numpy() for t in texts])

    def vector(self, text: str) -> Tensor:
        words = [w for w in text.lower().replace(".", " ").replace(",", " ").split() if w not in FILLER] or ["nothing"]
        total = torch.zeros(DIM)
        for word in words:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
            total += F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)), dim=0)
        return total

    def prepare(self, images: Tensor) -> Tensor:
        return images.float()

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.crops += len(pixels)
        names = [*COLOURS, "grey"]
        palette = torch.tensor([*COLOURS.values(), GREY], dtype=torch.float32)
        nearest = (pixels.permute(0, 2, 3, 1)[..., None, :] - palette).norm(dim=-1).argmin(dim=-1)
        share = F.one_hot(nearest, len(names)).float().mean(dim=(1, 2))
        return share @ torch.stack([F.normalize(self.vector(name), dim=0) for name in names])

    def crop_rows(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.encode_image(self.prepare(torch.from_numpy(crops))).numpy()

    def word(self, text: str) -> NDArray[np.float32]:
        return F.normalize(self.vector(text), dim=0).numpy()


class ColourModel(RegionModel):
    """Finds flat rectangles of the known colours; the embedding of a region is the word of its colour."""

    def __init__(self, encoder: WordEncoder, *, masks: bool = True, threshold: float = 0.3) -> None:
        self.encoder = encoder
        self.runs = 0
        self.with_masks = masks
        self.background_words = np.stack([encoder.word(f"bank{i}") for i in range(12)])
        self.background = encoder.word("background")
        self.calibration = Calibration(
            logit_scale=20.0, threshold=threshold, example_logit_scale=20.0, example_threshold=threshold
        )

    def prompt_free_words(self) -> PromptFreeWords:
        return PromptFreeWords.plain([*COLOURS, "red thing", "unicorn"])

    def regions(self, image: np.ndarray) -> RegionSet:
        self.runs += 1
        pixels = image
        height, width = pixels.shape[:2]
        boxes, text, masks = [], [], []
        for name, colour in COLOURS.items():
            inside = (np.abs(pixels.astype(int) - colour).max(axis=2) <= 12).astype(np.uint8)
            import cv2

            count, _, stats, _ = cv2.connectedComponentsWithStats(inside)
            for x, y, w, h, area in stats[1:count]:
                if area < 30:
                    continue
                boxes.append([x, y, x + w, y + h])
                text.append(self.encoder.word(name))
                part = torch.from_numpy(inside[y : y + h, x : x + w]).float()
                masks.append(F.interpolate(part[None, None], size=(28, 28), mode="area")[0, 0].numpy())
        # One region that is nothing in particular, as every real detector has.
        boxes.append([0, 0, width, height])
        text.append(self.background)
        masks.append(np.ones((28, 28), np.float32))
        return RegionSet(
            boxes=np.array(boxes, np.float32),
            objectness=np.full(len(boxes), 0.9, np.float32),
            text=unit_rows(np.stack(text)),
            image=None,
            masks=np.stack(masks) if self.with_masks else None,
            size=(height, width),
        )


def make_detector(*, masks: bool = True, cache_size: int = 8, threshold: float = 0.3) -> Detector:
    encoder = WordEncoder()
    model = ColourModel(encoder, masks=masks, threshold=threshold)
    card = {"name": "colour-fake", "sha256": "0" * 64, "data": "flat rectangles", "purpose": "Tests only."}
    return Detector(model=model, encoder=encoder, cache_size=cache_size, card=card)


def picture(
    rectangles: list[tuple[str, int, int, int, int]] | None = None, size: tuple[int, int] = (120, 160)
) -> np.ndarray:
    """(H, W, 3) grey picture with filled rectangles given as (colour, x1, y1, x2, y2)."""
    canvas = np.full((*size, 3), GREY, dtype=np.uint8)
    for name, x1, y1, x2, y2 in rectangles or [("red", 10, 20, 50, 70), ("blue", 80, 30, 150, 110)]:
        canvas[y1:y2, x1:x2] = COLOURS[name]
    return canvas
