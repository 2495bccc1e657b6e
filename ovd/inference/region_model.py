# SPDX-License-Identifier: Apache-2.0
"""A loaded detector for inference: a picture in, its regions out. One class for each kind of network.

Shapes: R regions, P proposals, D joint embedding, B background words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ovd.inference.everything import OwnWords
from ovd.inference.hints import unknown_word
from ovd.inference.known_words import WordList
from ovd.inference.scorers import CalibratedScorer, Scorer
from ovd.inference.scoring import Calibration, RegionSet
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
    from ovd.regions.crops import RegionEncoder


class RegionModel(ABC):
    """What `ovd.Detector` needs of a network; `ovd.modeling.load.load_detector_model` returns one.

    Attributes:
        card: what an exported detector says of itself; None for a network that was not loaded from a folder.
        background_words: (B, D) unit embeddings of the words that every class competes with.
        background: (D,) unit embedding of "nothing", or None.
        calibration: what turns cosines into scores.
        example_encoder: embeds a person's crops, where regions live in another image space than the text encoder's
            (a DETR pretrained on patches); None: the image tower of the text encoder does.
        objectness_weight: w of ``class^(1−w) · objectness^w`` in the published scores. 0 where the embedding itself
            says that a region is nothing.
        softmax: whether the published protocol, one softmax over the vocabulary, applies to its embeddings.
    """

    card: DetectorCard | None = None
    background_words: Tensor
    background: Tensor | None = None
    calibration: Calibration
    example_encoder: RegionEncoder | None = None
    objectness_weight: float = 0.0
    softmax: bool = True

    @abstractmethod
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """The regions of a uint8 (H, W, 3) RGB picture, embedded and in its pixels.

        Raises:
            UserError: a network that knows no words.
        """

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """((P, 4) boxes in pixels, (P,) objectness): class-agnostic proposals, best first."""
        regions = self.regions(image)
        best = regions.objectness.argsort(descending=True)[:top]
        return regions.boxes[best].cpu().numpy(), regions.objectness[best].cpu().numpy()

    def notices(self, phrases: Sequence[Sequence[str]], rows: Tensor) -> tuple[str, ...]:
        """What a person should know of how these classes are understood; arguments as those of `scorer`."""
        return ()

    def own_words(self) -> OwnWords:
        """The words that it can say unasked; none where nothing tells them."""
        return OwnWords.plain(() if self.card is None else self.card.classes)

    def scorer(self, rows: Tensor, phrases: Sequence[Sequence[str]], competitors: Tensor) -> Scorer:
        """What scores regions for typed classes, each alone, as a person sees them.

        Args:
            rows: (C, D) unit text embeddings.
            phrases: of each class its name and synonyms.
            competitors: (B, D) unit text embeddings: the background words, then the person's negative words.
        """
        background = None if self.background is None else self.background.to(rows)
        return CalibratedScorer(
            rows=rows, background_words=competitors, background=background, calibration=self.calibration
        )


class ConditionedBoxes(NamedTuple):
    """What conditioned queries found, in no order.

    Attributes:
        boxes: (K, 4) corners in pixels of the picture.
        score: (K,) how certain each query is.
        class_id: (K,) row of the embedding that conditioned it.
    """

    boxes: Tensor
    score: Tensor
    class_id: Tensor


class PatchLocator(RegionModel):
    """A network of UP-DETR's pretext: it knows no words, and finds what looks like a patch."""

    @abstractmethod
    def locate(self, image: NDArray[np.uint8], rows_CD: Tensor) -> ConditionedBoxes:
        """Search a uint8 (H, W, 3) RGB picture for patches.

        Args:
            image: the picture.
            rows_CD: `patch_rows`; without an ``example_encoder``, embeddings of the image-text encoder.
        """

    @abstractmethod
    def patch_rows(self, crops: Sequence[tuple[NDArray[np.uint8], Sequence[float]]]) -> Tensor:
        """(K, D) embeddings, not unit rows, of boxes (x1, y1, x2, y2) of pictures, as the pretext embeds its patches.

        Raises:
            UserError: no ``example_encoder``: the image-text encoder embeds the patches.
        """


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
        background_words: Tensor,
        top: int = 150,
        masks: bool = True,
    ) -> None:
        self.model, self.card, self.top, self.masks = model, card, top, masks
        self._class_names = frozenset(name.casefold() for name in (*card.classes, *card.bank))
        self.background_words = unit_rows(background_words)
        self.calibration = Calibration(**card.calibration)
        classifier = model.roi_heads.classifier
        self.background = F.normalize(classifier.background.detach().cpu(), dim=0) if classifier else None
        self.to_input = InputSize(card.short_side, card.long_side)

    def notices(self, phrases: Sequence[Sequence[str]], rows: Tensor) -> tuple[str, ...]:
        """Of words that no class of the training and no noun of WordNet's is: what is near, or which language it is.

        An encoder by name (``open_clip:…``) knows more than these lists, and other languages: nothing is said of it.
        """
        if ":" in self.card.encoder or not len(self.background_words):
            return ()
        alone = {group[0]: row for group, row in zip(phrases, rows, strict=True) if len(group) == 1}
        unknown = [word for word in alone if not self._understands(word)]
        found = []
        for word in unknown:
            near = (self.background_words.to(rows) @ alone[word]).topk(min(3, len(self.card.bank))).indices
            nearest = [self.card.bank[i] for i in near.tolist()]
            found.append(unknown_word(word, nearest, english=self._words.is_english))
        return tuple(found)

    @cached_property
    def _words(self) -> WordList:
        return WordList(words=self.card.classes, lexicon=read_lexicon())

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
            boxes=(raw.boxes * scale_to(image, pixels, like=raw.boxes)).cpu(),
            objectness=raw.objectness.cpu(),
            text=raw.text.cpu(),
            image=None if raw.image is None else raw.image.cpu(),
            masks=None if raw.masks is None else raw.masks.cpu(),
            size=(image.shape[0], image.shape[1]),
        )

    @torch.no_grad()
    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Proposals after the class-agnostic box head; see `RegionModel.propose`."""
        pixels = self.to_input(image)
        raw = self.model.regions([{"image": pixels}], top=top, masks=False)[0]
        return (raw.boxes * scale_to(image, pixels, like=raw.boxes)).cpu().numpy(), raw.objectness.cpu().numpy()


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


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length 1; no rows stay none."""
    return F.normalize(rows, dim=1) if len(rows) else rows
