# SPDX-License-Identifier: Apache-2.0
"""An image-text encoder that learns from captioned pictures (CLIP), or its text tower from teacher embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.config import (
    CaptionedShards,
    CaptionTable,
    ClipMethod,
    CocoCaptions,
    PhraseTargets,
    PretrainConfig,
    StickerPairs,
    TextDistillMethod,
)
from pretrain.config_photos import PhotoWords, TimmTower
from pretrain.config_views import InputSpec
from pretrain.data.image_text import CaptionedSource, build_captioned
from pretrain.data.pairs import PairSource
from pretrain.data.photos import LabelledPhotos, PhotoWordSource, read_photo_words
from pretrain.data.phrases import read_phrases, read_targets
from pretrain.data.stickers import Stickers
from pretrain.data.targets import PhraseSource
from pretrain.engine.errors import UserError
from pretrain.engine.sampling import Source
from pretrain.methods.clip import Clip
from pretrain.methods.clip_words import WordClip
from pretrain.methods.text_distill import TextDistill
from pretrain.monitor import monitored
from pretrain.nets.encoders import load_encoder, read_config
from pretrain.nets.imagenet import read_imagenet, start_tower
from pretrain.nets.towers import JointEncoder, build_encoder, copy_tower
from pretrain.training.parts import PretrainingParts, require_distinct


def build_clip(cfg: PretrainConfig, method: ClipMethod) -> PretrainingParts:
    """CLIP on captions, or on the words of named photos and boxes.

    Raises:
        UserError: the data or a tower to take over are missing, or do not fit.
    """
    encoder = build_clip_encoder(method)
    task: Clip
    source: Source
    if isinstance(cfg.data, PhotoWords):
        words = read_photo_words(cfg.data)
        task = build_word_clip(method, encoder, words)
        source = PhotoWordSource(words, size=encoder.image_size, seed=cfg.loop.seed, config=cfg.data)
    else:
        task = build_caption_clip(cfg, method, encoder)
        source = build_captions(cfg, encoder)
    require_distinct(cfg.loop, source)
    inputs = InputSpec(encoder.image_size, encoder.image_mean, encoder.image_std)
    return PretrainingParts(
        task=monitored(task, cfg.watch, cfg.data, inputs), source=source, optim=cfg.optim, save=saver(encoder)
    )


def build_clip_encoder(method: ClipMethod) -> JointEncoder:
    """The encoder with the towers it takes over.

    Raises:
        UserError: a tower to take over is missing or built differently.
    """
    config = method.encoder
    if config.text is None and method.text_weights is not None:
        section = load_encoder(method.text_weights).config.get("encoder") or {}
        if not section.get("text"):
            raise UserError(f"method.text_weights: {method.text_weights} has no text tower of ours to take over")
        config = type(config).model_validate({**config.model_dump(), "text": section["text"]})
    encoder = build_encoder(config)
    if method.start is not None and isinstance(config.image, TimmTower):
        start_tower(encoder.visual, method.start, name=config.image.name)
    if method.text_weights is not None:
        read_config(method.text_weights)  # a folder of ours, no checkpoint of another library
        copy_tower(encoder, load_encoder(method.text_weights), which="text")
    if method.image_weights is not None:
        read_config(method.image_weights)
        copy_tower(encoder, load_encoder(method.image_weights), which="visual")
    return encoder


def build_caption_clip(cfg: PretrainConfig, method: ClipMethod, encoder: JointEncoder) -> Clip:
    """CLIP of pictures and their captions."""
    names = None
    if method.noun_negatives:
        names = Stickers.load(cfg.data.root if isinstance(cfg.data, StickerPairs) else None).nouns
    return Clip(
        encoder=encoder,
        names=names,
        freeze_text=method.freeze_text,
        same_noun_positive=method.same_noun_positive,
        augmentation=method.augment,
        chunk=method.chunk,
    )


def build_captions(cfg: PretrainConfig, encoder: JointEncoder) -> PairSource | CaptionedSource:
    """Captioned pictures: Sticker Scenes, or the user's."""
    data, seed, size = cfg.data, cfg.loop.seed, encoder.image_size
    if isinstance(data, StickerPairs):
        stickers = Stickers.load(data.root, extra_styles=data.extra_styles)
        return PairSource(stickers, split="train", size=size, seed=seed, length=data.length)
    if not isinstance(data, CaptionTable | CocoCaptions | CaptionedShards):
        raise TypeError(f"{data.kind} has no captions")
    return CaptionedSource(build_captioned(data), size=size, seed=seed)


def build_word_clip(method: ClipMethod, encoder: JointEncoder, words: LabelledPhotos) -> WordClip:
    """CLIP of named photos and boxes with a whole vocabulary.

    Raises:
        UserError: the image tower is not one of timm's, or ImageNet's network is missing.
    """
    if method.words is None or not isinstance(method.encoder.image, TimmTower):
        raise UserError("method.words needs method.encoder.image of kind timm")
    classifier = None
    if method.start is not None and method.words.conse:
        classifier = read_imagenet(method.start.package, method.encoder.image.name)
    return WordClip(
        encoder=encoder,
        words=words,
        loss=method.words,
        classifier=classifier,
        lr_scale=method.start.lr_scale if method.start else 1.0,
        augmentation=method.augment,
    )


def build_text_distillation(cfg: PretrainConfig, method: TextDistillMethod) -> PretrainingParts:
    """A text tower and a teacher's embeddings of phrases.

    Raises:
        UserError: the data are missing or do not fit the encoder.
    """
    data = cfg.data
    if not isinstance(data, PhraseTargets):
        raise TypeError(f"{data.kind} has no teacher embeddings")
    encoder = build_encoder(method.encoder)
    task = TextDistill(
        encoder=encoder,
        similarity_weight=method.similarity_weight,
        similarity_temperature=method.similarity_temperature,
    )
    targets = read_targets(data.targets)
    dim = targets.embeddings.shape[1]
    if dim != encoder.embed_dim:
        raise UserError(
            f"{data.targets}: embeddings of length {dim}, but method.encoder.embed_dim is {encoder.embed_dim}; set "
            f"method.encoder.embed_dim={dim}"
        )
    source = PhraseSource(
        targets,
        phrases=read_phrases(data.phrases) if data.phrases else None,
        tokenize=encoder.tokenize,
        held_out_share=data.held_out,
        seed=cfg.loop.seed,
    )
    return PretrainingParts(task=task, source=source, optim=cfg.optim, save=saver(encoder))


def saver(encoder: JointEncoder) -> Callable[[Path], str]:
    """What writes the encoder into a folder, in eval mode."""

    def save(folder: Path) -> str:
        encoder.eval().save(folder)
        return f"encoder {encoder.fingerprint()[:12]}"

    return save
