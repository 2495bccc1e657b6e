# SPDX-License-Identifier: Apache-2.0
"""CLIP (Radford et al., arXiv:2103.00020): contrastive learning of pictures and captions.

Particular to it: two towers, linear projections into one space, symmetric InfoNCE over the global batch with a learnt
temperature whose scale is clamped at 100 after each step (§2.3, §2.5).

Three options differ from the paper: the text tower may come from `text_distill` and stay frozen with a linear layer on
top; captions of the same noun are all positives, because with a few hundred nouns a batch holds many of one; and
pictures are augmented by more than a random crop (`pretrain.clip_augment`), because there are few drawings of a noun. A
batch that is too large for memory is encoded in chunks, at the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.clip_augment import apply_augmentation, draw_parameters
from pretrain.config import AugmentConfig
from pretrain.data.pairs import PairBatch
from pretrain.engine.task import Task
from pretrain.losses import clip_contrastive_top1
from pretrain.nets.chunked import encode_in_chunks
from pretrain.nets.towers import JointEncoder, ProjectedText, image_features


class Clip(Task):
    """One step: captioned pictures in, contrastive loss out.

    Args:
        encoder: both towers.
        freeze_text: do not train the text tower (a projection on top of it is trained still). A frozen tower is left
            out of checkpoints, and loaded when the task is built.
        same_noun_positive: captions of the same main noun count as right in equal shares.
        names: the class names, in the order of ``class_id``; each is one more text for a picture to choose from. None:
            the captions of the batch only.
        augmentation: random changes of the pictures in training.
        chunk: encode so many pictures or texts at a time (`encode_in_chunks`); None: all at once.
    """

    def __init__(
        self,
        *,
        encoder: JointEncoder,
        freeze_text: bool = False,
        same_noun_positive: bool = True,
        names: Sequence[str] | None = None,
        augmentation: AugmentConfig | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if encoder.visual is None or encoder.text is None:
            raise ValueError("CLIP needs an encoder with an image tower and a text tower")
        self.encoder = encoder
        if names is not None and not same_noun_positive:
            raise ValueError("names need same_noun_positive: a picture's own name would be a negative")
        self.same_noun_positive = same_noun_positive
        self.names = None if names is None else [f"a {name}" for name in names]
        self.augmentation = augmentation or AugmentConfig()
        self.chunk = chunk
        self._last: dict[str, Tensor] = {}
        self._frozen: tuple[nn.Module, ...] = ()  # a tuple: a second registration would double its parameters
        self.untracked: tuple[str, ...] = ()
        if freeze_text:
            projected = isinstance(encoder.text, ProjectedText)
            frozen = encoder.text.trunk if isinstance(encoder.text, ProjectedText) else encoder.text
            self._frozen = (frozen.requires_grad_(False),)
            self.untracked = ("encoder.text.trunk." if projected else "encoder.text.",)

    def train(self, mode: bool = True) -> Clip:
        """A frozen tower stays in eval mode."""
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "image" (N, 3, h, w) uint8, "caption" list of N texts, "class_id" (N,) int64.
        """
        device = self.encoder.logit_scale.device
        images = batch["image"].to(device)
        parameters = draw_parameters(self.augmentation, len(images), device)

        def encode_image(images: Tensor, *values: Tensor) -> Tensor:
            # It also augments, so that only one chunk of the pictures is float at a time.
            with torch.autocast(device.type, enabled=False):
                drawn = dict(zip(parameters, values, strict=True))
                pixels = apply_augmentation(images.float() / 255, drawn, self.augmentation, self.encoder.image_size)
            pixels = self.encoder.normalise(pixels)
            if torch.is_autocast_enabled(device.type):  # on a CPU with bf16 units a fifth faster; in fp32 it is slower
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.encoder.encode_image(pixels)

        image = self._encode(encode_image, images, *parameters.values())
        text = self._encode(self.encoder.encode_text, self.encoder.tokenize(batch["caption"]).to(device))
        labels = batch["class_id"].to(device) if self.same_noun_positive else None
        names = None
        if self.names is not None:
            names = self._encode(self.encoder.encode_text, self.encoder.tokenize(self.names).to(device))
        self._last = {"image": image.detach(), "text": text.detach()}
        loss, right = clip_contrastive_top1(image, text, self.encoder.logit_scale, labels_N=labels, names_CD=names)
        return loss, {"batch_top1": right, "logit_scale": self.encoder.logit_scale.detach().exp()}

    def _encode(self, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.chunk is None:
            return encode(*inputs)
        return encode_in_chunks(encode, *inputs, chunk=self.chunk, module=self.encoder)

    @property
    def backbone(self) -> nn.Module:
        """The module that the kNN probe measures."""
        return image_features(self.encoder)

    def health(self) -> dict[str, Tensor]:
        """Pictures' embeddings, and cosines with the own caption and (mean) with those of other pictures."""
        image, text = (F.normalize(self._last[name].float(), dim=1) for name in ("image", "text"))
        positive = (image * text).sum(1)
        return {
            "projection": self._last["image"],
            "own_caption": positive,
            "other_captions": (image @ text.sum(0) - positive) / max(1, len(positive) - 1),
        }

    def after_step(self, step: int, total: int) -> None:
        """Clamp the temperature, after the optimiser's step so that the next forward pass sees it."""
        self.encoder.clamp_temperature()
