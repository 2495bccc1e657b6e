# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train`` for a detection transformer: UP-DETR's pretraining, or training on labels.

python -m ovd.train --config updetr.yaml                                   patches, no labels
python -m ovd.train --config detr.yaml weights=runs/updetr/exported       fine-tune on labels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.config_detr import DetrTrainConfig
from ovd.training.inputs import (
    PixelStats,
    initial_backbone,
    no_backbone_weights,
    pixel_stats_of,
    require_data,
    resnet_tower,
    resolve_encoder,
    training_transform,
)
from ovd.training.parts import LabelSet, TrainingParts, detector_card, label_set
from pretrain.engine.errors import BadImageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ovd.data.catalog import LabelledImages
    from ovd.modeling.detr.network import Detr
    from ovd.modeling.detr.task import DetrTask
    from ovd.modeling.region_head import RegionHead
    from pretrain.engine.sampling import Source
    from pretrain.nets.towers import JointEncoder

INIT_SAMPLES = 32  # pictures whose features the projections are initialised from
CHECK_HELD_OUT = 2  # held-out pictures that --check prepares; it measures nothing on them


def for_check(config: DetrTrainConfig) -> DetrTrainConfig:
    """The configuration for ``--check``: features are computed for its batches, not cached ahead."""
    checked = config.model_copy(update={"cache": None})
    if config.pretext is None:
        return checked
    held_out = min(config.pretext.held_out_count, CHECK_HELD_OUT)
    return checked.model_copy(update={"pretext": config.pretext.model_copy(update={"held_out_count": held_out})})


def build(config: DetrTrainConfig, *, check: bool = False) -> TrainingParts[Detr]:
    """Everything a training needs, before the first step.

    Args:
        config: of the training.
        check: for ``--check``: cache nothing, and measure on few held-out pictures.
    """
    from ovd.modeling.detr.build import build_detr
    from pretrain.engine.distributed import pick_device, seed_everything

    if check:
        config = for_check(config)
    if config.pretext is None:
        require_data(config.data)
    seed_everything(config.loop.seed)
    encoder = resolve_encoder(config.encoder)
    pixel_stats, backbone = read_backbone(config, encoder)
    mean, std = pixel_stats_of(config.model.backbone, pixel_stats)
    labels = None if config.pretext is not None else training_labels(config, encoder)
    model = build_detr(
        config.model,
        embed_dim=encoder.embed_dim,
        rows=labels.rows if labels is not None else None,
        trainable=labels.trainable if labels is not None else None,
        classes=len(labels.images.names) if labels is not None else 0,
        pixel_mean=mean,
        pixel_std=std,
    )
    load_initial_weights(config, model, encoder, backbone)
    # Before the loop does it: what is cached or embedded ahead of the first step is computed there too.
    device = pick_device(config.loop.device)
    model.to(device)
    encoder.to(device)
    task: DetrTask
    source: Source
    if labels is None:
        from ovd.training.updetr import build_pretext

        task, source = build_pretext(config, model, encoder)
    else:
        task, source = build_training(config, model, labels.images)
    parts = TrainingParts(
        encoder=encoder, labels=labels, model=model, task=task, source=source, pixel_mean=mean, pixel_std=std
    )
    if config.weights is None and config.model.arch == "conditional":  # the original starts as its authors had it
        print(init_projections_from_samples(config, parts))
    return parts


def training_labels(config: DetrTrainConfig, encoder: JointEncoder) -> LabelSet:
    """The labelled pictures, or the first ``images_limit`` of them.

    Raises:
        UserError: fewer classes can be trained than each picture's queries are conditioned on.
    """
    from ovd.training.feature_cache import LabelledSubset

    labels = label_set(config.data, encoder)
    trainable = int(labels.trainable.sum())
    if config.model.conditioned > trainable:
        raise UserError(
            f"model.conditioned: queries of each picture are conditioned on {config.model.conditioned} classes, but "
            f"only {trainable} can be trained; set model.conditioned to at most that"
        )
    if config.images_limit is not None:
        labels = replace(labels, images=LabelledSubset(labels.images, config.images_limit))
    return labels


def build_training(config: DetrTrainConfig, model: Detr, images: LabelledImages) -> tuple[DetrTask, Source]:
    """Task and source of training on labels."""
    from ovd.data.mapper import DetectionSource
    from ovd.modeling.detr.task import DetrTask
    from ovd.training.feature_cache import cached_detection

    source = DetectionSource(
        images=images,
        transform=training_transform(config.data),
        seed=config.loop.seed,
        agnostic=config.model.variant == "agnostic",
    )
    task = DetrTask(model=model, pretrained_lr_scale=config.pretrained_lr_scale)
    return task, source if config.cache is None else cached_detection(config, model, source)


# --- where weights start


def read_backbone(config: DetrTrainConfig, encoder: JointEncoder) -> tuple[PixelStats, Mapping[str, Tensor]]:
    """Pixel statistics and torchvision-named tensors of the backbone that the configuration names.

    Raises:
        UserError: no ResNet there.
    """
    from pretrain.nets.towers import export_backbone

    bb = config.model.backbone
    norms = {"model.backbone.norm": bb.norm} if bb.is_resnet else {}
    state, pixel_stats = initial_backbone(bb, config.backbone_weights, encoder, norms=norms)
    if state is None:
        if not bb.is_resnet:
            raise no_backbone_weights(bb)
        resnet_tower(
            encoder, config.encoder, otherwise="backbone_weights=FILE or the exported/ folder of a pretrain run"
        )
        state = export_backbone(encoder)
    return pixel_stats, state


def load_initial_weights(
    config: DetrTrainConfig, model: Detr, encoder: JointEncoder, backbone: Mapping[str, Tensor]
) -> None:
    """Load what training starts from, the backbone, the region tower and ``weights``, and print a report."""
    from ovd.modeling.backbone import load_bottom_up
    from ovd.modeling.detr.checkpoints import init_detr, read_initial_weights, refuse_other_attention

    load_bottom_up(model.backbone, backbone, source=config.backbone_weights or f"encoder {config.encoder}")
    if model.region_tower is not None:
        print(init_region_tower(config, model.region_tower, encoder, backbone))
    if config.weights is not None:
        state, has_backbone = read_initial_weights(Path(config.weights))
        refuse_other_attention(Path(config.weights), state, config.model)
        report = init_detr(model, state, source=config.weights, backbone=has_backbone)
        print(f"weights={config.weights}: {report}")


def init_region_tower(
    config: DetrTrainConfig, tower: RegionHead, encoder: JointEncoder, backbone: Mapping[str, Tensor]
) -> str:
    """Start the region tower as the backbone's last stage and the encoder's projection; returns what was done."""
    from ovd.modeling.region_head import init_body, init_projection
    from pretrain.nets.towers import ResNetImage

    init_body(tower, backbone, source=config.backbone_weights or f"encoder {config.encoder}")
    if config.backbone_weights is not None:
        return "region_tower starts as the backbone's last stage, its projection at random"
    assert isinstance(encoder.visual, ResNetImage)  # read_backbone refuses others
    init_projection(tower, encoder.visual.proj.weight)
    return f"region_tower starts as the last stage and projection of encoder {config.encoder}"


def init_projections_from_samples(config: DetrTrainConfig, parts: TrainingParts[Detr]) -> str:
    """Initialise the projections of tokens and patches from the first samples; returns what was done, for the log."""
    import torch

    from ovd.modeling.detr.build import init_projections
    from ovd.modeling.detr.updetr import PatchPretext
    from pretrain.nets.towers import ResNetImage

    model, encoder = parts.model, parts.encoder
    was_training = model.training
    model.eval()
    embeddings = projection = None
    with torch.no_grad():
        batch = []
        for index in range(min(INIT_SAMPLES, len(parts.source))):
            try:
                batch.append(parts.source.sample(index, 0))
            except BadImageError:  # the loop lists it, and stops if there are too many
                continue
        if not batch:
            return f"input_proj starts at random: none of the first {INIT_SAMPLES} pictures can be read"
        # One by one: pictures may differ in size, and padding is no token.
        tokens = torch.cat([model.joined(model.maps_of([sample])[0])[0].flatten(1).T for sample in batch])
        if isinstance(parts.task, PatchPretext):
            embeddings = parts.task.patch_embeddings(batch).flatten(0, 1)
            if config.backbone_weights is None and isinstance(encoder.visual, ResNetImage):
                if config.model.embed_space == "clip" and config.model.backbone.features[-1] == "res5":
                    projection = encoder.visual.proj.weight
    model.train(was_training)
    return init_projections(model, tokens_SC=tokens, embeddings_PD=embeddings, projection_DC=projection)


# --- the exported card


def export(config: DetrTrainConfig, parts: TrainingParts[Detr], folder: Path) -> None:
    """Write the trained transformer with its card."""
    import torch

    from ovd.inference.scoring import Calibration
    from ovd.modeling.export import save_detector

    labels = parts.labels
    names = labels.images.names if labels is not None else ()
    variant = config.model.variant if labels is not None else "agnostic"
    words = labels if variant == "text" else None
    background = words.background_words if words is not None else []
    head = {"scale": config.model.scale}  # what commands read of any detector's card
    if config.pretext is not None:
        head |= {"patches": config.pretext.patches.count, "patch_size": config.pretext.patches.size}
    card = detector_card(
        config,
        parts,
        model={**config.model.model_dump(mode="json"), "variant": variant, "head": head},
        classes=names if variant != "agnostic" else (),
        novel=words.novel if words is not None else (),
        background=[names[i] for i in background],
        calibration=Calibration(logit_scale=config.model.scale, objectness_weight=1.0, example_objectness_weight=1.0),
    )
    rows = words.rows[torch.tensor(background)] if words is not None else torch.zeros(0, parts.encoder.embed_dim)
    save_detector(folder, parts.model, card, background_words=rows)
