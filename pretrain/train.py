# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.train --config pretrain/clip.yaml [key=value …] [--check] [--resume] [--overwrite]`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from pretrain.config import (
    CaptionedConfig,
    ClipMethod,
    PhraseTargets,
    PretrainConfig,
    StickerPairs,
    TextDistillMethod,
    extended,
)
from pretrain.config_photos import PhotoWords
from pretrain.config_ssl import SslMethod
from pretrain.config_views import ImageData, InputSpec
from pretrain.engine.cli import command_line
from pretrain.engine.config import config_hash, free_keys, keys_at_default, plain
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import EXPORTED
from pretrain.engine.stages import require_stages

if TYPE_CHECKING:
    from torch import nn

    from pretrain.data.images import Builders
    from pretrain.engine.config import OptimConfig
    from pretrain.engine.sampling import Source
    from pretrain.engine.task import Task
    from pretrain.health import Monitored
    from pretrain.methods.build import Methods
    from pretrain.methods.clip import Clip
    from pretrain.nets.towers import JointEncoder

DOC = (
    "Pretrain: a text tower from teacher embeddings, CLIP from captioned pictures, or a backbone\n"
    "from pictures alone (SimCLR, MoCo, BYOL, SwAV, SimSiam, Barlow Twins)."
)


def build_encoder_for(cfg: PretrainConfig) -> JointEncoder:
    """The encoder a run trains, with the towers it takes over.

    Raises:
        UserError: A tower to take over is missing or built differently.
    """
    from pretrain.nets.encoders import load_encoder, read_config
    from pretrain.nets.towers import build_encoder, copy_tower

    method = cfg.method
    if isinstance(method, TextDistillMethod):
        return build_encoder(method.encoder)
    if not isinstance(method, ClipMethod):
        raise TypeError(f"{method.name} trains a backbone, not an encoder")
    config = method.encoder
    if config.text is None and method.text_weights is not None:
        section = load_encoder(method.text_weights).config.get("encoder") or {}
        if not section.get("text"):
            raise UserError(f"method.text_weights: {method.text_weights} has no text tower of ours to take over")
        config = type(config).model_validate({**config.model_dump(), "text": section["text"]})
    encoder = build_encoder(config)
    if method.start is not None:
        from pretrain.config_photos import TimmTower
        from pretrain.nets.imagenet import start_tower

        if isinstance(config.image, TimmTower):
            start_tower(encoder.visual, method.start, name=config.image.name)
    if method.text_weights is not None:
        read_config(method.text_weights)
        copy_tower(encoder, load_encoder(method.text_weights), which="text")
    if method.image_weights is not None:
        read_config(method.image_weights)
        copy_tower(encoder, load_encoder(method.image_weights), which="visual")
    return encoder


def build_task(cfg: PretrainConfig) -> Task:
    """The module that `fit` trains for CLIP and text distillation; its `encoder` is what is exported."""
    encoder = build_encoder_for(cfg)
    method = cfg.method
    if isinstance(method, TextDistillMethod):
        from pretrain.methods.text_distill import TextDistill

        return TextDistill(
            encoder=encoder,
            similarity_weight=method.similarity_weight,
            similarity_temperature=method.similarity_temperature,
        )
    if not isinstance(method, ClipMethod):
        raise TypeError(f"{method.name} has a recipe of its own: build_self_supervised")
    if method.words is not None and isinstance(cfg.data, PhotoWords):
        return build_word_clip(cfg, cfg.data, encoder)
    from pretrain.methods.clip import Clip

    names = None
    if method.noun_negatives:
        from pretrain.data.stickers import Stickers

        names = Stickers.load(cfg.data.root if isinstance(cfg.data, StickerPairs) else None).nouns
    return Clip(
        encoder=encoder,
        names=names,
        freeze_text=method.freeze_text,
        same_noun_positive=method.same_noun_positive,
        augmentation=method.augment,
        chunk=method.chunk,
    )


def build_word_clip(cfg: PretrainConfig, data: PhotoWords, encoder: JointEncoder) -> Clip:
    """The module that learns named photos and boxes."""
    from pretrain.config_photos import TimmTower
    from pretrain.data.photos import read_photo_words
    from pretrain.methods.clip_words import WordClip
    from pretrain.nets.imagenet import read_imagenet

    method = cfg.method
    if not isinstance(method, ClipMethod) or method.words is None or not isinstance(method.encoder.image, TimmTower):
        raise UserError("method.words needs method.encoder.image of kind timm")
    classifier = None
    if method.start is not None and method.words.conse:
        classifier = read_imagenet(method.start.package, method.encoder.image.name)
    return WordClip(
        encoder=encoder,
        words=read_photo_words(data),
        loss=method.words,
        classifier=classifier,
        lr_scale=method.start.lr_scale if method.start else 1.0,
        augmentation=method.augment,
    )


def build_source(cfg: PretrainConfig, encoder: JointEncoder) -> Source:
    """Where the samples come from.

    Raises:
        UserError: The data are missing or do not fit the encoder.
    """
    if isinstance(cfg.data, StickerPairs):
        from pretrain.data.pairs import PairSource
        from pretrain.data.stickers import Stickers

        stickers = Stickers.load(cfg.data.root, extra_styles=cfg.data.extra_styles)
        size = encoder.image_size
        return PairSource(stickers, split="train", size=size, seed=cfg.loop.seed, length=cfg.data.length)
    if isinstance(cfg.data, PhotoWords):
        from pretrain.data.photos import PhotoWordSource, read_photo_words

        words = read_photo_words(cfg.data)
        return PhotoWordSource(words, size=encoder.image_size, seed=cfg.loop.seed, config=cfg.data)
    if isinstance(cfg.data, CaptionedConfig):
        from pretrain.data.image_text import CaptionedSource, build_captioned

        return CaptionedSource(build_captioned(cfg.data), size=encoder.image_size, seed=cfg.loop.seed)
    if not isinstance(cfg.data, PhraseTargets):
        raise TypeError(f"no source for {type(cfg.data).__name__}")
    from pretrain.data.phrases import read_phrases, read_targets
    from pretrain.data.targets import PhraseSource

    targets = read_targets(cfg.data.targets)
    if targets.embeddings.shape[1] != encoder.embed_dim:
        raise UserError(
            f"{cfg.data.targets}: embeddings of length {targets.embeddings.shape[1]}, but method.encoder.embed_dim is "
            f"{encoder.embed_dim}; set method.encoder.embed_dim={targets.embeddings.shape[1]}"
        )
    return PhraseSource(
        targets,
        phrases=read_phrases(cfg.data.phrases) if cfg.data.phrases else None,
        tokenize=encoder.tokenize,
        held_out_share=cfg.data.held_out,
        seed=cfg.loop.seed,
    )


def main(argv: list[str], *, methods: Methods | None = None, data: Builders | None = None) -> int:
    """Train, then write `exported/` (an encoder folder, or a backbone folder) into the run's folder.

    Args:
        argv: Arguments after the program name.
        methods: Further self-supervised methods that the configuration may name, by the class of their section.
        data: What opens further sets of pictures, by the class of their section.
    """
    model = extended(methods=list(methods or {}), data=list(data or {}))
    cfg, options = command_line(model, argv, prog="wordbox pretrain", doc=DOC)
    require_stages(cfg)

    from pretrain.engine import distributed
    from pretrain.engine.loop import fit

    warning = smaller_comparison(cfg)
    if warning and distributed.is_main():
        print(f"warning: {warning}", file=sys.stderr)
    distributed.seed_everything(cfg.loop.seed)  # the first weights; the loop seeds everything later
    optim = cfg.optim
    task: Task
    if isinstance(cfg.method, ClipMethod | TextDistillMethod):
        task = build_task(cfg)
        encoder = cast("JointEncoder", task.encoder)
        source = build_source(cfg, encoder)
        if isinstance(cfg.method, ClipMethod):
            _require_distinct(cfg, source)
            from pretrain.monitor import monitored

            task = monitored(
                task, cfg.watch, cfg.data, InputSpec(encoder.image_size, encoder.image_mean, encoder.image_std)
            )
    else:
        task, source, optim = build_self_supervised(cfg, methods=methods, data=data)
    report = fit(
        task,
        source,
        loop=cfg.loop,
        optim=optim,
        out=cfg.out,
        record=plain(cfg),
        free_keys=free_keys(model),
        at_default=keys_at_default(cfg),
        resume=options.resume,
        overwrite=options.overwrite,
        check=options.check,
    )
    if not options.check and distributed.is_main():
        print(f"{export(cfg, task)} after {report.step} steps, config {config_hash(cfg)}")
    return 0


COMPARED_WITHIN_A_PASS = {
    "simclr": "negatives",
    "barlow_twins": "samples of the cross-correlation",
    "clip": "negatives",
}


def smaller_comparison(cfg: PretrainConfig) -> str | None:
    """The warning where `loop.accumulate` changes the loss: one that compares the samples of a pass."""
    what, parts = COMPARED_WITHIN_A_PASS.get(cfg.method.name), cfg.loop.accumulate
    if what is None or parts == 1:
        return None
    exact = (
        "; set method.chunk in place of it: the exact gradient of the whole batch" if cfg.method.name == "clip" else ""
    )
    return (
        f"loop.accumulate={parts}: the {what} of {cfg.method.name} are the {cfg.loop.batch_size // parts} samples of a "
        f"pass, not the {cfg.loop.batch_size} of a step, so this is another loss than that of the whole batch{exact}"
    )


def _require_distinct(cfg: PretrainConfig, source: Source) -> None:
    """Refuse batches larger than the data set, which would contain a picture twice.

    Raises:
        UserError: there are more samples to compare with each other than pictures.
    """
    batch_size, pictures = cfg.loop.batch_size, len(source)
    if pictures < batch_size // cfg.loop.accumulate:
        raise UserError(
            f"loop.batch_size: {batch_size} is more than the {pictures} pictures of data, so that a picture would be "
            "its own negative; take a smaller batch, or more pictures"
        )


def build_self_supervised(
    cfg: PretrainConfig, *, methods: Methods | None = None, data: Builders | None = None
) -> tuple[Monitored, Source, OptimConfig]:
    """The monitored method, the views it learns from, and the optimiser with the method's learning-rate rule."""
    from pretrain.data.crops import ViewSource
    from pretrain.data.images import build_images
    from pretrain.engine.distributed import pick_device
    from pretrain.methods.build import build_method, method_optim
    from pretrain.monitor import monitored

    if not isinstance(cfg.method, SslMethod) or not isinstance(cfg.data, ImageData):
        raise TypeError(f"{cfg.method.name} is not self-supervised")
    method, batch_size = cfg.method, cfg.loop.batch_size
    task = build_method(
        method,
        batch_size=batch_size // cfg.loop.accumulate,
        device=pick_device(cfg.loop.device),
        more=methods or {},
    )
    source = ViewSource(build_images(cfg.data, more=data or {}), method.views, cfg.loop.seed)
    _require_distinct(cfg, source)
    monitored_task = monitored(task, cfg.watch, cfg.data, method.inputs())
    return monitored_task, source, method_optim(method, cfg.optim, batch_size=batch_size, more=methods or {})


def export(cfg: PretrainConfig, task: Task) -> str:
    """Write `exported/`; returns a line that says what it is."""
    from pretrain.engine.folder import exported_folder
    from pretrain.health import Monitored

    target = cfg.out / EXPORTED
    if isinstance(cfg.method, ClipMethod | TextDistillMethod):
        inner = task.task if isinstance(task, Monitored) else task
        encoder = cast("JointEncoder", inner.encoder).eval()
        with exported_folder(cfg.out) as folder:
            encoder.save(folder)
        return f"{target}: encoder {encoder.fingerprint()[:12]}"
    from pretrain.nets.backbones import save_backbone

    size, mean, std = cfg.method.inputs()
    backbone, method = cast("nn.Module", task.backbone), cfg.method
    with exported_folder(cfg.out) as folder:
        save_backbone(folder, backbone, config=method.backbone, method=method.name, size=size, mean=mean, std=std)
    return f"{target}: backbone {method.backbone.name} by {method.name}"


if __name__ == "__main__":
    run_cli(main)
