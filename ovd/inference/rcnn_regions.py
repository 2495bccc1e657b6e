# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN with embeddings for inference, run by torch.

Shapes: R regions, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ovd.inference.arrays import Floats, as_array, best_first, unit_rows
from ovd.inference.hints import unknown_word
from ovd.inference.known_words import WordList
from ovd.inference.region_model import RegionModel
from ovd.inference.scoring import Calibration, RegionSet
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN


class RCNNRegionModel(RegionModel):
    """A Mask R-CNN with embeddings (ViLD and its variants).

    Args:
        model: in eval mode.
        card: its card.
        background_words: (B, D) embeddings.
        top: regions kept per picture.
        masks: whether regions have masks, if the model has a mask head.
    """

    card: DetectorCard

    def __init__(
        self,
        *,
        model: OpenVocabularyRCNN,
        card: DetectorCard,
        background_words: Floats,
        top: int = 150,
        masks: bool = True,
    ) -> None:
        self.model, self.card, self.top, self.masks = model, card, top, masks
        self._class_names = frozenset(name.casefold() for name in (*card.classes, *card.background_words))
        self.background_words = unit_rows(as_array(background_words))
        self.calibration = Calibration(**card.calibration)
        classifier = model.roi_heads.classifier
        self.background = unit_rows(as_array(classifier.background)[None])[0] if classifier else None
        self.to_input = InputSize(card.short_side, card.long_side)

    def notices(self, phrases: Sequence[Sequence[str]], rows: Floats) -> tuple[str, ...]:
        """For words that are neither a class of the training nor a noun of WordNet: near words, or the language.

        An encoder by name (``open_clip:…``) knows more than these lists, and other languages: nothing is said of it.
        """
        if ":" in self.card.encoder or not len(self.background_words):
            return ()
        alone = {group[0]: row for group, row in zip(phrases, rows, strict=True) if len(group) == 1}
        unknown = [word for word in alone if not self._understands(word)]
        notices = []
        for word in unknown:
            near = best_first(self.background_words @ alone[word], 3)
            nearest = [self.card.background_words[i] for i in near.tolist()]
            misspelt = self._all_words.misspelt(word)
            notices.append(unknown_word(word, nearest, misspelt=misspelt, english=self._words.is_english))
        return tuple(notices)

    @cached_property
    def _words(self) -> WordList:
        return WordList(words=self.card.classes, lexicon=read_lexicon())

    @cached_property
    def _all_words(self) -> WordList:
        """The classes of the training, and its background words."""
        words = dict.fromkeys((*self.card.classes, *self.card.background_words))
        return WordList(words=tuple(words), lexicon=self._words.lexicon)

    def _understands(self, word: str) -> bool:
        if word.casefold() in self._class_names:
            return True
        return self._words.understands(word) or self._words.head_of(word) is not None

    @torch.no_grad()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionModel.regions`."""
        pixels = self.to_input(image)
        raw = self.model.regions([{"image": pixels}], top=self.top, masks=self.masks)[0]
        if raw.text is None:
            raise UserError("this detector is class-agnostic (variant agnostic): it proposes boxes but knows no words")
        return RegionSet(
            boxes=as_array(raw.boxes * scale_to(image, pixels, like=raw.boxes)),
            objectness=as_array(raw.objectness),
            text=as_array(raw.text),
            image=None if raw.image is None else as_array(raw.image),
            masks=None if raw.masks is None else as_array(raw.masks),
            size=(image.shape[0], image.shape[1]),
        )

    @torch.no_grad()
    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """Proposals after the class-agnostic box head; see `RegionModel.propose`."""
        pixels = self.to_input(image)
        raw = self.model.regions([{"image": pixels}], top=top, masks=False)[0]
        return as_array(raw.boxes * scale_to(image, pixels, like=raw.boxes)), as_array(raw.objectness)


class InputSize:
    """Resizes pictures to the size a network was trained at.

    Args:
        short_side: pixels the shorter side gets …
        long_side: … unless the longer one would exceed this.
    """

    def __init__(self, short_side: int, long_side: int) -> None:
        self.short_side, self.long_side = short_side, long_side

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 → (3, h, w) float, still in 0…255."""
        height, width = image.shape[:2]
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
        if size != (height, width):
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        return pixels


def scale_to(image: NDArray[np.uint8], pixels: Tensor, *, like: Tensor) -> Tensor:
    """(4,) factors from boxes in the network's input (3, h, w) to boxes in the picture (H, W, 3)."""
    scale_x, scale_y = image.shape[1] / pixels.shape[2], image.shape[0] / pixels.shape[1]
    return like.new_tensor([scale_x, scale_y, scale_x, scale_y])
