# SPDX-License-Identifier: Apache-2.0
"""What ``python -m ovd.train`` does with the configuration of a Mask R-CNN: class-agnostic proposals, or ViLD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.config import TrainConfig
from ovd.training.inputs import (
    backbone_tensors,
    labelled_images,
    library_start,
    no_backbone_weights,
    pixel_statistics,
    resolve_encoder,
)
from pretrain.engine.config import config_hash
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
    from pretrain.engine.state import LoadReport
    from pretrain.nets.towers import JointEncoder


def start_bodies(model: OpenVocabularyRCNN, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load the body of each region head of kind c4 from the last stage of the whole network; returns their names."""
    from ovd.modeling.region_head import start_body

    for head in model.roi_heads.region_heads.values():
        start_body(head, state, source=source)
    return list(model.roi_heads.region_heads)


def start_from_encoder(
    model: OpenVocabularyRCNN, encoder: JointEncoder, config: TrainConfig, own: Mapping[str, Tensor] | None
) -> list[str]:
    """Load the backbone (and, for c4, the region heads) from the encoder; returns prefixes of what now is pretrained.

    Args:
        model: what is loaded into.
        encoder: gives the backbone where ``own`` is None.
        config: of the training.
        own: tensors of ``backbone_weights``, under the names of the network's library.

    Raises:
        UserError: the encoder's image tower is no ResNet of the configured depth and stem, or the conversion is not
            exact.
    """
    import torch

    from ovd.modeling.backbone import load_bottom_up, verify_conversion
    from ovd.modeling.region_head import start_projection
    from pretrain.nets.towers import ResNetImage, export_backbone

    bb = config.model.backbone
    resnet: nn.Module = model.backbone if bb.kind == "c4" else model.backbone.bottom_up
    prefixes = ["backbone." if bb.kind == "c4" else "backbone.bottom_up."]
    if own is not None:
        source = str(config.backbone_weights)
        report = load_bottom_up(resnet, own, source=source)
        if bb.kind == "c4":  # the heads' body is the last stage; only the projection has to begin anew
            prefixes += [f"roi_heads.{name}.body." for name in start_bodies(model, own, source=source)]
        print(f"backbone from {config.backbone_weights}" + ("" if bb.is_resnet else f": {report}"))
        return prefixes
    if config.backbone_start == "scratch":
        return []
    if not bb.is_resnet:
        if config.weights is not None:  # the detector brings its backbone
            return prefixes
        raise no_backbone_weights(bb, ", or begin with backbone_start=scratch")
    if not isinstance(encoder.visual, ResNetImage):
        raise UserError(
            f"encoder {config.encoder}: its image tower is no ResNet, so no backbone can start from it; "
            "set backbone_weights=FILE (a torchvision-named ResNet) or backbone_start=scratch"
        )
    state = export_backbone(encoder)
    load_bottom_up(resnet, state, source=f"encoder {config.encoder}")
    pixels = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    difference = verify_conversion(encoder.visual.backbone.stages, resnet, pixels)
    print(f"backbone converted from encoder {config.encoder}; largest relative feature difference {difference:.1e}")
    if bb.kind == "c4" and config.model.encoder_start:
        for name in start_bodies(model, state, source=f"encoder {config.encoder}"):
            head = model.roi_heads.region_heads[name]
            if head.projection is not None:
                start_projection(head, encoder.visual.proj.weight)
            prefixes.append(f"roi_heads.{name}.")
    return prefixes


def start_from_detector(model: OpenVocabularyRCNN, folder: Path) -> LoadReport:
    """Copy every tensor of an exported detector that fits.

    The class rows stay the new vocabulary's. A second head (ensemble) starts from the first one's body.

    Raises:
        UserError: another architecture.
    """
    from ovd.modeling.vild.build import load_model
    from ovd.modeling.vild.roi_heads import STORED_NAMES
    from pretrain.engine.state import load_tensors

    other, _, _ = load_model(folder)
    own, source = model.state_dict(), other.state_dict()
    for key in list(source):
        first, second = (f"roi_heads.{STORED_NAMES[name]}." for name in ("region_head", "image_head"))
        if key.startswith(f"{first}body."):
            source.setdefault(second + key.removeprefix(first), source[key])
    needed = [k for k in own if k.startswith(("backbone.", "proposal_generator."))]
    lacking = [k for k in needed if k not in source or source[k].shape != own[k].shape]
    if lacking:
        raise UserError(
            f"weights={folder}: {len(lacking)} of {len(needed)} backbone and RPN tensors do not fit, "
            f"such as {lacking[0]}"
        )
    rows = ("roi_heads.classifier.rows", "roi_heads.classifier.trainable")
    return load_tensors(model, source, source=folder, strict="no", skip=rows)


def build(config: TrainConfig) -> dict[str, Any]:
    """Everything a training needs: model, task, source, encoder and the pieces of the card."""
    import torch

    from ovd.data.catalog import CocoImages, StickerImages
    from ovd.data.mapper import DetectionSource, TrainingTransform
    from ovd.modeling.export import read_card
    from ovd.modeling.task import DetectionTask
    from ovd.modeling.vild.build import build_model
    from ovd.regions.images import SceneImages
    from ovd.regions.store import RegionStore
    from ovd.text import embed_vocabulary
    from ovd.vocabulary import TEMPLATE_SETS, Vocabulary
    from pretrain.engine.distributed import seed_everything

    seed_everything(config.loop.seed)  # the first weights; the loop seeds everything later
    encoder = resolve_encoder(config.encoder)
    images = labelled_images(config.data)
    vocabulary = Vocabulary.of(images.names, templates=TEMPLATE_SETS[config.templates])
    rows = embed_vocabulary(vocabulary, encoder)
    novel = images.novel if config.data.labels == "base" else frozenset()
    trainable = torch.ones(len(images.names), dtype=torch.bool)
    trainable[sorted(novel)] = False
    look: tuple[tuple[float, ...], tuple[float, ...]] = encoder.image_mean, encoder.image_std
    own: Mapping[str, Tensor] | None = None
    bb = config.model.backbone
    if not bb.is_resnet:
        own, look = library_start(bb, config.backbone_weights)
    elif config.backbone_weights is not None:
        norms: dict[str, str] = {"model.backbone.norm": bb.norm}
        if bb.kind == "c4" and config.model.variant != "agnostic":  # whose region heads start from the last stage
            norms["model.head.norm"] = config.model.head.norm
        own, trained_on = backbone_tensors(config.backbone_weights, stem=bb.stem, norms=norms)
        look = trained_on or look  # a backbone sees pictures as it was trained to
    mean, std = pixel_statistics(bb, look)
    if not bb.is_resnet and config.weights is not None and bb.pixel_mean is None:
        card = read_card(Path(config.weights))  # its backbone replaces the one named here
        mean, std = list(card.pixel_mean), list(card.pixel_std)
    model = build_model(
        config.model, embed_dim=encoder.embed_dim, rows=rows, trainable=trainable, pixel_mean=mean, pixel_std=std
    )
    prefixes = start_from_encoder(model, encoder, config, own)
    if config.weights is not None:
        print(f"weights={config.weights}: {start_from_detector(model, Path(config.weights))}")
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
    source = DetectionSource(
        images=images,
        transform=TrainingTransform(
            short_side=config.data.short_side,
            long_side=config.data.long_side,
            scale=config.data.scale,
            crop=config.data.crop,
            cut=config.data.cut,
            flip=config.data.flip,
        ),
        seed=config.loop.seed,
        store=store,
        regions_per_image=config.regions_per_image,
        agnostic=config.model.variant in ("agnostic", "image"),
    )
    return {
        "encoder": encoder,
        "images": images,
        "rows": rows,
        "novel": novel,
        "model": model,
        "task": DetectionTask(
            model=model, pretrained_prefixes=tuple(prefixes), pretrained_lr_scale=config.pretrained_lr_scale
        ),
        "source": source,
        "mean": mean,
        "std": std,
    }


def export(config: TrainConfig, parts: dict[str, Any], folder: Path) -> None:
    """Write the trained detector with its card; scores are uncalibrated until ``python -m ovd.calibrate``."""
    from dataclasses import asdict

    import torch

    from ovd.inference.scoring import Calibration
    from ovd.modeling.export import DetectorCard, save_detector

    names = parts["images"].names
    bank = [i for i in range(len(names)) if i not in parts["images"].novel]
    has_rows = parts["model"].roi_heads.classifier is not None
    card = DetectorCard(
        model=config.model.model_dump(mode="json"),
        embed_dim=parts["encoder"].embed_dim,
        pixel_mean=tuple(parts["mean"]),
        pixel_std=tuple(parts["std"]),
        encoder=config.encoder,
        encoder_fingerprint=parts["encoder"].fingerprint(),
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        classes=names if has_rows else (),
        novel=tuple(sorted(parts["novel"])) if has_rows else (),
        bank=tuple(names[i] for i in bank),
        calibration=asdict(Calibration(logit_scale=config.model.head.scale)),
        config_hash=config_hash(config),
        templates=config.templates,
    )
    save_detector(folder, parts["model"], card, bank=parts["rows"][torch.tensor(bank)])
