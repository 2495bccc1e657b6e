# SPDX-License-Identifier: Apache-2.0
"""Inputs of every training of a detector: labelled pictures, the image-text encoder, a backbone's tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ovd.config import DataConfig, DetectorBackboneConfig
from ovd.config_backbone import BATCH_NORMS, NetworkConfig
from ovd.config_detr import DetrBackboneConfig
from pretrain.engine.errors import UserError, absent, did_you_mean, warn

if TYPE_CHECKING:
    from torch import Tensor

    from ovd.data.catalog import LabelledImages
    from ovd.data.mapper import TrainingTransform
    from pretrain.nets.towers import JointEncoder, ResNetImage


class PixelStats(NamedTuple):
    """Mean and standard deviation of RGB in [0, 1] that a network's inputs are normalised by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def in_bytes(self) -> tuple[list[float], list[float]]:
        """Both for RGB in 0…255."""
        return [255.0 * v for v in self.mean], [255.0 * v for v in self.std]


def require_exists(path: str | Path, *, named: str, give: str = "") -> None:
    """Refuse a path that is not there; ``named`` is how the configuration names it, ``give`` what belongs there.

    Raises:
        UserError: it is not there.
    """
    if not Path(path).exists():
        raise UserError(f"{named}: {absent(path)}" + (f"; give {give}" if give else ""))


def require_data(data: DataConfig) -> None:
    """Refuse missing pictures or labels before an encoder is fetched or anything is built.

    Raises:
        UserError: naming the key and what it names.
    """
    for key, path in (("data.annotations", data.annotations), ("data.images", data.images)):
        if data.kind != "stickers" and path:
            require_exists(path, named=f"{key}: {path}")


def labelled_images(data: DataConfig) -> LabelledImages:
    """The training pictures that a data section describes."""
    from ovd.data.catalog import CocoImages, StickerImages
    from ovd.data.lvis import split_of
    from ovd.formats.read import read_labels
    from pretrain.data.stickers import Stickers
    from pretrain.engine.distributed import is_main

    if data.kind == "stickers":
        return StickerImages(
            stickers=Stickers.load(extra_styles=data.extra_styles),
            split="train",
            seed=data.seed,
            length=data.length,
            size=data.size,
            labels=data.labels,
        )
    labels = read_labels(
        data.annotations or "",
        kind=None if data.kind == "auto" else data.kind,
        images=Path(data.images) if data.images else None,
        part=data.part,
        prefer=() if data.kind == "coco" else ("train",),
    )
    photos = CocoImages(
        images=labels.root,
        annotations=labels.truth(),
        split=split_of(data.split, labels.content, where=labels.where),
        labels=data.labels,
    )
    if is_main():
        for notice in photos.notices:
            warn(notice)
    return photos


def training_transform(data: DataConfig) -> TrainingTransform:
    """The augmentation that a data section describes."""
    from ovd.data.mapper import TrainingTransform

    return TrainingTransform(
        short_side=data.short_side,
        long_side=data.long_side,
        scale=data.scale,
        crop=data.crop,
        cut=data.cut,
        flip=data.flip,
    )


def resolve_encoder(spec: str) -> JointEncoder:
    """An encoder by its name under ``weights/``, its folder, a CLIP checkpoint, or ``open_clip:MODEL:TAG``.

    Raises:
        UserError: none of that name, or one that cannot be loaded.
    """
    from ovd.weights import read_manifest, weights_folder
    from pretrain.nets.encoders import load_encoder

    if spec.startswith("open_clip:") or Path(spec).exists():
        return load_encoder(spec)
    entries = read_manifest()
    if spec not in entries:
        encoders = [name for name, entry in entries.items() if (entry.folder / "config.json").is_file()]
        raise UserError(
            f"no encoder {spec!r}{did_you_mean(spec, encoders)}; there is: {', '.join(encoders)}, open_clip:MODEL:TAG, "
            "a folder, or a checkpoint's file"
        )
    return load_encoder(weights_folder(spec))


def backbone_tensors(
    spec: str, *, stem: str, norms: Mapping[str, str]
) -> tuple[Mapping[str, Tensor], PixelStats | None]:
    """(torchvision-named tensors, pixel statistics where they are known) of ``backbone_weights``.

    Args:
        spec: the ``exported/`` folder of a run of pretrain.train, a folder written by ``pretrain.export --to
            torchvision``, an encoder folder, or a safetensors file of torchvision's names.
        stem: of ``model.backbone``.
        norms: key of the configuration → its value, of every part that takes over the tensors.

    Raises:
        UserError: another stem, or another kind of norm, whose tensors would load and be silently wrong.
    """
    from pretrain.engine.checkpoint import load_weights

    path = Path(spec)
    pixel_stats: PixelStats | None = None
    if not path.is_dir():
        tensors = load_weights(path)[0]
        has_stem, groups = stem, not any(name.endswith("running_var") for name in tensors)
    elif (path / "settings.json").is_file():
        try:
            settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
            kind, has_stem, groups = settings["format"], settings["stem"], settings["norm"] != "BN"
            pixel_stats = PixelStats(tuple(settings["mean"]), tuple(settings["std"]))
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(
                f"backbone_weights={spec}: not written by pretrain.export --to torchvision ({problem!r}); give the "
                "exported/ folder of the pretraining itself"
            ) from problem
        if kind != "export-torchvision/1":
            raise UserError(f"backbone_weights={spec}: has format {kind}; export it --to torchvision")
        tensors = load_weights(path / "model.safetensors")[0]
    else:
        from pretrain.export import read_source

        source = read_source(spec)
        tensors, has_stem, groups = source.state, source.stem, source.groups is not None
        pixel_stats = PixelStats(source.mean, source.std)
    for key, norm in norms.items():
        fitting = ("GN16",) if groups else BATCH_NORMS
        if norm not in fitting:
            has, expected = f"{'group' if groups else 'batch'} norms", " or ".join(fitting)
            raise UserError(f"backbone_weights={spec}: it has {has}; set {key}={expected} instead of {norm}")
    if has_stem != stem:
        raise UserError(f"backbone_weights={spec}: its stem is {has_stem}; set model.backbone.stem={has_stem}")
    return tensors, pixel_stats


def initial_library_backbone(
    network: NetworkConfig, spec: str | None
) -> tuple[Mapping[str, Tensor] | None, PixelStats]:
    """(tensors or None, pixel statistics) that a network of timm or torchvision starts with.

    Args:
        network: a section with a library's ``name``.
        spec: ``backbone_weights``, see :func:`ovd.modeling.library_network.read_library_weights`.

    Raises:
        UserError: no such network, or weights of another.
    """
    from ovd.modeling.library_network import open_network, read_library_weights

    statistics = PixelStats(*open_network(network.name).statistics)
    if spec is None:
        return None, statistics
    tensors, trained_on = read_library_weights(spec, network.name)
    return tensors, PixelStats(*trained_on) if trained_on else statistics


def initial_backbone(
    network: DetectorBackboneConfig | DetrBackboneConfig,
    spec: str | None,
    encoder: JointEncoder,
    *,
    norms: Mapping[str, str],
) -> tuple[Mapping[str, Tensor] | None, PixelStats]:
    """(tensors of ``backbone_weights``, or None; pixel statistics): a backbone gets pictures normalised as in its own
    training.

    Args:
        network: the backbone's section.
        spec: ``backbone_weights``.
        encoder: whose pixel statistics count where the weights name none.
        norms: see `backbone_tensors`.

    Raises:
        UserError: no such weights; see also `backbone_tensors` and `initial_library_backbone`.
    """
    if spec is not None:
        require_exists(
            spec,
            named=f"backbone_weights={spec}",
            give="a folder written by `wordbox pretrain` or by `python -m pretrain.export … --to torchvision`, or a "
            "file with the network's own names",
        )
    if not network.is_resnet:
        return initial_library_backbone(network, spec)
    statistics = PixelStats(encoder.image_mean, encoder.image_std)
    if spec is None:
        return None, statistics
    tensors, trained_on = backbone_tensors(spec, stem=network.stem, norms=norms)
    return tensors, trained_on or statistics


def resnet_tower(encoder: JointEncoder, spec: str, *, otherwise: str) -> ResNetImage:
    """The image tower that a backbone can start from.

    Args:
        encoder: of the configuration.
        spec: its name there.
        otherwise: what else the configuration can say, for the message.

    Raises:
        UserError: it is no ResNet.
    """
    from pretrain.nets.towers import ResNetImage

    if not isinstance(encoder.visual, ResNetImage):
        raise UserError(
            f"encoder {spec}: its image tower is not a ResNet, so no backbone can start from it; set {otherwise}"
        )
    return encoder.visual


def pixel_stats_of(network: NetworkConfig, trained_on: PixelStats) -> tuple[list[float], list[float]]:
    """(mean, deviation) of RGB in 0…255: as configured, else those of the weights."""
    if network.pixel_mean is not None and network.pixel_std is not None:
        return list(network.pixel_mean), list(network.pixel_std)
    return trained_on.in_bytes()


def no_backbone_weights(network: NetworkConfig, otherwise: str = "") -> UserError:
    """The error of a library's network without weights to start from."""
    return UserError(
        f"model.backbone.name {network.name}: nothing is downloaded, so its weights must be given: set "
        f"backbone_weights to a file of tensors with {network.name.partition(':')[0]}'s names, to a folder of timm's, "
        f"or to exported/ of a pretrain.train run on this network{otherwise}"
    )
