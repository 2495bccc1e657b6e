# SPDX-License-Identifier: Apache-2.0
"""CLIP (`pretrain.methods.clip`) on labelled photos, with contrast over a whole vocabulary.

Particular to it: the caption is drawn from the class's word, its synonyms and its hypernyms, so that a photo of a
golden retriever is also a dog and an animal. All other words are negatives, except synonyms, hypernyms and hyponyms. A
second target keeps the knowledge of the ImageNet network that the image tower starts from: the sum of the words of its
classes, weighted by their probabilities (ConSE, arXiv:1312.5650). Training on names alone made words without photos
worse.

Shapes: `N` pictures, `V` words, `C` classes, `K` classes of ImageNet, `D` joint embedding.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.clip_augment import apply_augmentation, draw_parameters
from pretrain.config import AugmentConfig
from pretrain.config_photos import WordsLoss
from pretrain.data.pairs import PairBatch
from pretrain.data.photos import LabelledPhotos, vocabulary_of
from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import UserError
from pretrain.engine.optim import ParamGroup, default_groups
from pretrain.methods.clip import Clip
from pretrain.nets.conse import ConseProjection, conse_embedding, conse_targets, embed_words
from pretrain.nets.timm_tower import TimmImage, pooled
from pretrain.nets.towers import JointEncoder


class WordClip(Clip):
    """One step: pictures of named things in, contrastive loss over the vocabulary and ConSE's distillation out.

    Args:
        encoder: image tower of timm, trained text tower; the text is frozen.
        words: classes and their lexicon.
        loss: weights.
        classifier: the ImageNet network that the image tower started from, with its classifier; None without ConSE.
        lr_scale: learning rate of the image network as a share of the projection's.
        augmentation: augmentation of the pictures.
    """

    def __init__(
        self,
        *,
        encoder: JointEncoder,
        words: LabelledPhotos,
        loss: WordsLoss,
        classifier: nn.Module | None,
        lr_scale: float = 0.1,
        augmentation: AugmentConfig | None = None,
    ) -> None:
        super().__init__(encoder=encoder, freeze_text=True, augmentation=augmentation)
        if not isinstance(encoder.visual, TimmImage):
            raise ValueError("WordClip needs an image tower of timm")
        self.loss, self.lr_scale = loss, lr_scale
        vocabulary, not_negative, self.captions = vocabulary_of(words)
        self.register_buffer("not_negative_CV", torch.from_numpy(not_negative), persistent=False)
        self.register_buffer("word_VD", embed_words(encoder, vocabulary), persistent=False)
        self._teacher: tuple[nn.Module, ...] = ()  # a tuple: it is no part of what is trained or stored
        if classifier is not None and loss.conse:
            self._teacher = (copy.deepcopy(classifier).requires_grad_(False).eval(),)
            targets = conse_targets(words.lexicon, encoder, levels=loss.conse_levels, decay=loss.conse_decay)
            self.register_buffer("target_KD", targets, persistent=False)
        if isinstance(encoder.visual.proj, ConseProjection):
            self._init_conse(encoder.visual, encoder.visual.proj)

    def _init_conse(self, tower: TimmImage, projection: ConseProjection) -> None:
        """Give the ensemble's fixed part ImageNet's classifier and its words.

        Raises:
            UserError: without a classifier, of other classes, or where the features that it reads are trained.
        """
        if not self._teacher:
            raise UserError("method.encoder.image.conse needs method.start and method.words.conse above 0")
        if tower.frozen_stages <= len(tower.stages):
            raise UserError(
                "method.encoder.image.conse reads the features of the network as it is; "
                "set method.start.frozen_stages=99"
            )
        state = cast(nn.Linear, cast(Any, self._teacher[0]).classifier).state_dict()
        if state["weight"].shape != projection.classifier.weight.shape:
            raise UserError(f"method.encoder.image.conse.classes: the network has {len(state['weight'])}")
        projection.classifier.load_state_dict(state)
        projection.words_KD.copy_(cast(Tensor, self.target_KD))

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "image" (N, 3, h, w) uint8, "class_id" (N,) int64.
        """
        device = self.encoder.logit_scale.device
        images = batch["image"].to(device)
        with torch.autocast(device.type, enabled=False):
            parameters = draw_parameters(self.augmentation, len(images), device)
            pixels = apply_augmentation(images.float() / 255, parameters, self.augmentation, self.encoder.image_size)
            pixels = self.encoder.normalise(pixels).contiguous(memory_format=torch.channels_last)
        tower = cast(TimmImage, self.encoder.visual)
        lower = tower.lower(pixels)
        features = tower.upper(lower)
        image_ND = F.normalize(tower.learned(features).float(), dim=1)
        target_ND = self.conse(lower) if self._teacher else None
        class_N = batch["class_id"].to(device)
        caption_N = self.draw_captions(class_N)
        with torch.autocast(device.type, enabled=False):
            word_VD = cast(Tensor, self.word_VD)
            logits_NV = self.encoder.logit_scale.exp() * image_ND @ word_VD.T
            others = cast(Tensor, self.not_negative_CV)[class_N].scatter(1, caption_N[:, None], False)
            logits_NV = logits_NV.masked_fill(others, -torch.inf)
            loss = F.cross_entropy(logits_NV, caption_N)
            right = (logits_NV.argmax(1) == caption_N).float().mean()
            metrics = {"word_top1": right.detach(), "logit_scale": self.encoder.logit_scale.detach().exp()}
            if target_ND is not None:
                distance = 1 - (image_ND * target_ND).sum(1).mean()
                loss = loss + self.loss.conse * distance
                metrics["conse_cosine"] = 1 - distance.detach()
        self._last = {"image": image_ND.detach(), "text": word_VD[caption_N]}
        return loss, metrics

    def draw_captions(self, class_N: Tensor) -> Tensor:
        """(N,) words of the vocabulary: the class's own, a synonym or a hypernym, drawn from torch's generator."""
        draw_N2 = torch.rand(len(class_N), 2).tolist()
        chosen = []
        for number, (kind, which) in zip(class_N.tolist(), draw_N2, strict=True):
            row = self.captions[number]
            names: tuple[int, ...] = ()
            if kind < self.loss.hypernym:
                names = row.hypernyms
            elif kind < self.loss.hypernym + self.loss.synonym:
                names = row.synonyms
            chosen.append(names[int(which * len(names))] if names else row.word)
        return torch.tensor(chosen, device=class_N.device)

    @torch.no_grad()
    def conse(self, lower: Tensor) -> Tensor:
        """The map after the frozen stages -> (N, D) unit rows: the words of the most probable classes of ImageNet."""
        network = cast(Any, self._teacher[0])
        tower = cast(TimmImage, self.encoder.visual)
        features = pooled(network, lower, first_stage=tower.frozen_stages)
        return conse_embedding(network.classifier(features), cast(Tensor, self.target_KD), top=self.loss.conse_classes)

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """The network's stages with their own learning rate, beside projection and temperature."""
        inside = {id(p) for p in cast(TimmImage, self.encoder.visual).backbone.parameters()}
        named = list(self.named_parameters())
        groups = default_groups([(n, p) for n, p in named if id(p) not in inside], weight_decay=optim.weight_decay)
        network = default_groups([(n, p) for n, p in named if id(p) in inside], weight_decay=optim.weight_decay)
        for group in network:
            group["lr_scale"] = self.lr_scale
        return groups + network
