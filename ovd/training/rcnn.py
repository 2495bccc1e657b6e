# SPDX-License-Identifier: Apache-2.0
"""What ``python -m ovd.train`` does with the configuration of a Mask R-CNN: class-agnostic proposals, or ViLD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.config import TrainConfig
from ovd.training.inputs import PixelStats, backbone_tensors, resolve_encoder, training_transform
from ovd.training.parts import TrainingParts, label_set
from pretrain.engine.config import config_hash
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ovd.data.catalog import LabelledImages
    from ovd.data.mapper import DetectionSource
    from ovd.modeling.region_head import Tower
    from ovd.modeling.vild.rcnn import OpenVocabularyRCNN
    from pretrain.nets.towers import JointEncoder


def start_towers(model: OpenVocabularyRCNN, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load the body of each tower of kind c4 from the last stage of a torchvision-named ResNet; returns their names."""
    from ovd.modeling.region_head import start_body

    towers = towers_of(model)
    for tower in towers.values():
        start_body(tower, state, source=source)
    return list(towers)


def towers_of(model: OpenVocabularyRCNN) -> dict[str, Tower]:
    """The region towers that a model has, by name."""
    towers = {"tower": model.roi_heads.tower, "image_tower": model.roi_heads.image_tower}
    return {name: tower for name, tower in towers.items() if tower is not None}


def start_from_encoder(
    model: OpenVocabularyRCNN, encoder: JointEncoder, config: TrainConfig, backbone: Mapping[str, Tensor] | None
) -> list[str]:
    """Load the backbone (and, for c4, the towers) from the encoder; returns prefixes of what now is pretrained.

    Args:
        model: what is loaded into.
        encoder: gives the backbone where ``backbone`` is None.
        config: of the training.
        backbone: torchvision-named tensors of ``backbone_weights``.

    Raises:
        UserError: the encoder's image tower is no ResNet of the configured depth and stem, or the conversion is not
            exact.
    """
    import torch

    from ovd.modeling.backbone import load_resnet, verify_conversion
    from ovd.modeling.region_head import start_projection
    from pretrain.nets.towers import ResNetImage, export_backbone

    bb = config.model.backbone
    resnet: nn.Module = model.backbone if bb.kind == "c4" else model.backbone.bottom_up
    prefixes = ["backbone." if bb.kind == "c4" else "backbone.bottom_up."]
    if backbone is not None:
        source = str(config.backbone_weights)
        load_resnet(resnet, backbone, source=source)
        if bb.kind == "c4":  # the towers' body is the last stage; only the projection has to begin anew
            prefixes += [f"roi_heads.{name}.body." for name in start_towers(model, backbone, source=source)]
        print(f"backbone from {config.backbone_weights}")
        return prefixes
    if config.backbone_start == "scratch":
        return []
    if not isinstance(encoder.visual, ResNetImage):
        raise UserError(
            f"encoder {config.encoder}: its image tower is no ResNet, so no backbone can start from it; "
            "set backbone_weights=FILE (a torchvision-named ResNet) or backbone_start=scratch"
        )
    state = export_backbone(encoder)
    load_resnet(resnet, state, source=f"encoder {config.encoder}")
    pixels = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    difference = verify_conversion(encoder.visual.backbone.stages, resnet, pixels)
    print(f"backbone converted from encoder {config.encoder}; largest relative feature difference {difference:.1e}")
    if bb.kind == "c4" and config.model.encoder_start:
        for name in start_towers(model, state, source=f"encoder {config.encoder}"):
            tower = towers_of(model)[name]
            if tower.projection is not None:
                start_projection(tower, encoder.visual.proj.weight)
            prefixes.append(f"roi_heads.{name}.")
    return prefixes


def start_from_detector(model: OpenVocabularyRCNN, folder: Path) -> tuple[list[str], list[str]]:
    """Copy every tensor of an exported detector that fits; returns (loaded, left at their start) names.

    The class rows stay the new vocabulary's. A second tower (ensemble) starts from the first one's body.

    Raises:
        UserError: another architecture.
    """
    from ovd.modeling.vild.build import load_model
    from pretrain.engine.checkpoint import load_some

    other, _, _ = load_model(folder)
    own, source = model.state_dict(), other.state_dict()
    for key in list(source):
        if key.startswith("roi_heads.tower.body."):
            source.setdefault(key.replace("roi_heads.tower.", "roi_heads.image_tower."), source[key])
    skip = ("roi_heads.classifier.rows", "roi_heads.classifier.trainable")
    loaded = [k for k in own if k in source and source[k].shape == own[k].shape and k not in skip]
    needed = [k for k in own if k.startswith(("backbone.", "proposal_generator."))]
    lacking = [k for k in needed if k not in loaded]
    if lacking:
        raise UserError(
            f"weights={folder}: {len(lacking)} of {len(needed)} backbone and RPN tensors do not fit, "
            f"such as {lacking[0]}"
        )
    load_some(model, {k: source[k] for k in loaded})
    return loaded, [k for k in own if k not in loaded]


def build(config: TrainConfig) -> TrainingParts[OpenVocabularyRCNN]:
    """Everything a training needs, before the first step."""
    from ovd.modeling.task import DetectionTask
    from ovd.modeling.vild.build import build_model
    from pretrain.engine.distributed import seed_everything

    seed_everything(config.loop.seed)  # the first weights; the loop seeds everything later
    encoder = resolve_encoder(config.encoder)
    labels = label_set(config.data, encoder, templates=config.templates)
    pixel_stats = PixelStats(encoder.image_mean, encoder.image_std)
    backbone: Mapping[str, Tensor] | None = None
    if config.backbone_weights is not None:
        bb = config.model.backbone
        norms: dict[str, str] = {"model.backbone.norm": bb.norm}
        if bb.kind == "c4" and config.model.variant != "agnostic":  # whose towers start from the last stage
            norms["model.head.norm"] = config.model.head.norm
        backbone, trained_on = backbone_tensors(config.backbone_weights, stem=bb.stem, norms=norms)
        pixel_stats = trained_on or pixel_stats  # a backbone sees pictures as it was trained to
    mean, std = pixel_stats.in_bytes()
    model = build_model(
        config.model,
        embed_dim=encoder.embed_dim,
        rows=labels.rows,
        trainable=labels.trainable,
        pixel_mean=mean,
        pixel_std=std,
    )
    prefixes = start_from_encoder(model, encoder, config, backbone)
    if config.weights is not None:
        loaded, left = start_from_detector(model, Path(config.weights))
        print(f"weights={config.weights}: {len(loaded)} tensors loaded, {len(left)} keep their start")
    return TrainingParts(
        encoder=encoder,
        labels=labels,
        model=model,
        task=DetectionTask(
            model=model, pretrained_prefixes=tuple(prefixes), pretrained_lr_scale=config.pretrained_lr_scale
        ),
        source=training_source(config, labels.images, encoder),
        pixel_mean=mean,
        pixel_std=std,
    )


def training_source(config: TrainConfig, images: LabelledImages, encoder: JointEncoder) -> DetectionSource:
    """Augmented samples, with offline regions for the variants that distil.

    Raises:
        UserError: a region store of other pictures or of another encoder.
    """
    from ovd.data.catalog import CocoImages, StickerImages
    from ovd.data.mapper import DetectionSource
    from ovd.regions.images import SceneImages
    from ovd.regions.store import RegionStore

    store = None
    if config.model.variant in ("image", "vild", "ensemble"):
        store = RegionStore.open(Path(config.regions or ""))
        pictures = SceneImages(images.source).fingerprint() if isinstance(images, StickerImages) else None
        # A store of other scenes would give every picture somebody else's regions, silently.
        store.require(
            encoder_fingerprint=encoder.fingerprint(),
            source_fingerprint=pictures,
            image_ids=images.image_ids if isinstance(images, CocoImages) else range(len(images)),
        )
    return DetectionSource(
        images=images,
        transform=training_transform(config.data),
        seed=config.loop.seed,
        store=store,
        regions_per_image=config.regions_per_image,
        agnostic=config.model.variant in ("agnostic", "image"),
    )


def export(config: TrainConfig, parts: TrainingParts[OpenVocabularyRCNN], folder: Path) -> None:
    """Write the trained detector with its card; scores are uncalibrated until ``python -m ovd.calibrate``."""
    from dataclasses import asdict

    import torch

    from ovd.inference.scoring import Calibration
    from ovd.modeling.vild.build import DetectorCard, save_detector

    labels = parts.labels
    assert labels is not None
    names, bank = labels.images.names, labels.background_words
    has_rows = parts.model.roi_heads.classifier is not None
    card = DetectorCard(
        model=config.model.model_dump(mode="json"),
        embed_dim=parts.encoder.embed_dim,
        pixel_mean=tuple(parts.pixel_mean),
        pixel_std=tuple(parts.pixel_std),
        encoder=config.encoder,
        encoder_fingerprint=parts.encoder.fingerprint(),
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        classes=names if has_rows else (),
        novel=tuple(sorted(labels.novel)) if has_rows else (),
        bank=tuple(names[i] for i in bank),
        calibration=asdict(Calibration(logit_scale=config.model.head.scale)),
        config_hash=config_hash(config),
        templates=config.templates,
    )
    save_detector(folder, parts.model, card, bank=labels.rows[torch.tensor(bank)])
