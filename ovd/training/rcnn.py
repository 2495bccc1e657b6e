# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train`` for Mask R-CNN: class-agnostic proposals, or ViLD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.config import TrainConfig
from ovd.training.inputs import (
    initial_backbone,
    no_backbone_weights,
    pixel_stats_of,
    require_data,
    resnet_tower,
    resolve_encoder,
    training_transform,
)
from ovd.training.parts import TrainingParts, detector_card, label_set
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ovd.data.catalog import LabelledImages
    from ovd.data.mapper import DetectionSource
    from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
    from pretrain.engine.state import LoadReport
    from pretrain.nets.towers import JointEncoder


def init_bodies(model: OpenVocabularyRCNN, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load the body of each region head of kind c4 from the last stage of the whole network; returns their names."""
    from ovd.modeling.region_head import init_body

    for head in model.roi_heads.region_heads.values():
        init_body(head, state, source=source)
    return list(model.roi_heads.region_heads)


def init_from_encoder(
    model: OpenVocabularyRCNN, encoder: JointEncoder, config: TrainConfig, backbone: Mapping[str, Tensor] | None
) -> list[str]:
    """Load the backbone (and, for c4, the region heads) from the encoder; returns prefixes of what now is pretrained.

    Args:
        model: what is loaded into.
        encoder: gives the backbone where ``backbone`` is None.
        config: of the training.
        backbone: tensors of ``backbone_weights``, under the names of the network's library.

    Raises:
        UserError: the encoder's image tower is no ResNet of the configured depth and stem, or the conversion is not
            exact.
    """
    import torch

    from ovd.modeling.backbone import load_bottom_up, verify_conversion
    from ovd.modeling.region_head import init_projection
    from pretrain.nets.towers import export_backbone

    bb = config.model.backbone
    resnet: nn.Module = model.backbone if bb.kind == "c4" else model.backbone.bottom_up
    prefixes = ["backbone." if bb.kind == "c4" else "backbone.bottom_up."]
    if backbone is not None:
        source = str(config.backbone_weights)
        report = load_bottom_up(resnet, backbone, source=source)
        if bb.kind == "c4":  # the heads' body is the last stage; only the projection has to begin anew
            prefixes += [f"roi_heads.{name}.body." for name in init_bodies(model, backbone, source=source)]
        print(f"backbone from {config.backbone_weights}" + ("" if bb.is_resnet else f": {report}"))
        return prefixes
    if config.backbone_start == "scratch":
        return []
    if not bb.is_resnet:
        if config.weights is not None:  # the detector brings its backbone
            return prefixes
        raise no_backbone_weights(bb, ", or begin with backbone_start=scratch")
    tower = resnet_tower(
        encoder,
        config.encoder,
        otherwise="backbone_weights=FILE (a torchvision-named ResNet) or backbone_start=scratch",
    )
    state = export_backbone(encoder)
    load_bottom_up(resnet, state, source=f"encoder {config.encoder}")
    pixels = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    difference = verify_conversion(tower.backbone.stages, resnet, pixels)
    print(f"backbone converted from encoder {config.encoder}; largest relative feature difference {difference:.1e}")
    if bb.kind == "c4" and config.model.encoder_start:
        for name in init_bodies(model, state, source=f"encoder {config.encoder}"):
            head = model.roi_heads.region_heads[name]
            if head.projection is not None:
                init_projection(head, tower.proj.weight)
            prefixes.append(f"roi_heads.{name}.")
    return prefixes


def init_from_detector(model: OpenVocabularyRCNN, folder: Path) -> LoadReport:
    """Copy every tensor of an exported detector that fits.

    The class rows stay the new vocabulary's. A second head (ensemble) starts from the first one's body.

    Raises:
        UserError: another architecture.
    """
    from ovd.modeling.export import read_card
    from ovd.modeling.vild.build import load_model
    from ovd.modeling.vild.roi_heads import STORED_NAMES
    from pretrain.engine.state import load_tensors

    other, _ = load_model(folder, read_card(folder))
    target, source = model.state_dict(), other.state_dict()
    for key in list(source):
        first, second = (f"roi_heads.{STORED_NAMES[name]}." for name in ("region_head", "image_head"))
        if key.startswith(f"{first}body."):
            source.setdefault(second + key.removeprefix(first), source[key])
    needed = [k for k in target if k.startswith(("backbone.", "proposal_generator."))]
    missing = [k for k in needed if k not in source or source[k].shape != target[k].shape]
    if missing:
        raise UserError(
            f"weights={folder}: {len(missing)} of {len(needed)} backbone and RPN tensors do not fit, "
            f"such as {missing[0]}"
        )
    rows = ("roi_heads.classifier.rows", "roi_heads.classifier.trainable")
    return load_tensors(model, source, source=folder, strict="no", skip=rows)


def build(config: TrainConfig) -> TrainingParts[OpenVocabularyRCNN]:
    """Everything a training needs, before the first step."""
    from ovd.modeling.export import read_card
    from ovd.modeling.task import DetectionTask
    from ovd.modeling.vild.build import build_model
    from pretrain.engine.distributed import seed_everything

    require_data(config.data)
    seed_everything(config.loop.seed)  # the first weights; the loop seeds everything later
    encoder = resolve_encoder(config.encoder)
    labels = label_set(config.data, encoder, templates=config.templates)
    bb = config.model.backbone
    norms: dict[str, str] = {"model.backbone.norm": bb.norm}
    if bb.kind == "c4" and config.model.variant != "agnostic":  # whose region heads start from the last stage
        norms["model.head.norm"] = config.model.head.norm
    backbone, pixel_stats = initial_backbone(bb, config.backbone_weights, encoder, norms=norms)
    mean, std = pixel_stats_of(bb, pixel_stats)
    if not bb.is_resnet and config.weights is not None and bb.pixel_mean is None:
        card = read_card(Path(config.weights))  # its backbone replaces the one named here
        mean, std = list(card.pixel_mean), list(card.pixel_std)
    model = build_model(
        config.model,
        embed_dim=encoder.embed_dim,
        rows=labels.rows,
        trainable=labels.trainable,
        pixel_mean=mean,
        pixel_std=std,
    )
    prefixes = init_from_encoder(model, encoder, config, backbone)
    if config.weights is not None:
        print(f"weights={config.weights}: {init_from_detector(model, Path(config.weights))}")
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
    from ovd.regions.images import ScenePictures
    from ovd.regions.store import RegionStore

    store = None
    if config.distils:
        store = RegionStore.open(Path(config.regions or ""))
        pictures = ScenePictures(images.source).fingerprint() if isinstance(images, StickerImages) else None
        # A store of other scenes would silently give every picture the regions of another.
        store.require(
            encoder_fingerprint=encoder.fingerprint(),
            encoder_name=config.encoder,
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
    import torch

    from ovd.inference.scoring import Calibration
    from ovd.modeling.export import save_detector

    labels = parts.labels
    assert labels is not None
    names, background = labels.images.names, labels.background_words
    has_rows = parts.model.roi_heads.classifier is not None
    card = detector_card(
        config,
        parts,
        model=config.model.model_dump(mode="json"),
        classes=names if has_rows else (),
        novel=labels.novel if has_rows else (),
        background=[names[i] for i in background],
        calibration=Calibration(logit_scale=config.model.head.scale),
        templates=config.templates,
    )
    save_detector(folder, parts.model, card, background_words=labels.rows[torch.tensor(background)])
