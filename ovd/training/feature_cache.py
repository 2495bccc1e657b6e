# SPDX-License-Identifier: Apache-2.0
"""Cached features of a frozen backbone for a transformer's training: feature maps, with labels or with patches.

`ovd.data.cached_features` keeps the arrays; here they are computed, under a key of all that determines them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.config_detr import DetrTrainConfig
from ovd.data.cached_features import CachedDetection, CachedPatches, FeatureCache, Readable, files_of, pad_objects
from ovd.data.catalog import Labelled, LabelledImages
from ovd.data.mapper import DetectionSource, TrainingTransform, map_sample
from ovd.data.patches import PatchSource
from ovd.data.samples import PatchSample
from ovd.modeling.detr.network import Detr
from pretrain.config_views import ImagesConfig
from pretrain.engine.errors import UserError
from pretrain.engine.identity import identity_of

BATCH = 16  # pictures per pass of the backbone


@dataclass(frozen=True)
class LabelledSubset:
    """The first ``count`` pictures of a labelled data set."""

    images: LabelledImages
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""
        return self.images.names

    @property
    def novel(self) -> frozenset[int]:
        """Novel classes."""
        return self.images.novel

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def identity(self) -> dict[str, str]:
        """Fingerprint of all the pictures."""
        return identity_of(self.images)

    def load(self, index: int) -> Labelled:
        """Picture ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.images.load(index)


def cached_detection(config: DetrTrainConfig, model: Detr, source: DetectionSource) -> CachedDetection:
    """The samples of ``source`` from cached features, with and without a flip."""
    images = source.images
    all_images = images.images if isinstance(images, LabelledSubset) else images  # fractions share one cache
    data = config.data
    described = data.model_dump(mode="json", exclude={"flip", "cut"})
    readable, files = Readable(len(all_images)), files_of(described)
    caches = []
    model.eval()
    for flip in (0.0, 1.0) if data.flip else (0.0,):
        transform = TrainingTransform(short_side=data.short_side, long_side=data.long_side, flip=flip)

        def compute(indices: list[int], transform: TrainingTransform = transform) -> dict[str, NDArray[Any]]:
            rng = np.random.default_rng(0)
            samples = []
            for index in indices:
                labelled = readable(index, all_images.load)
                # Masks are not learned here; empty ones would drop their boxes, so none are passed on.
                full = np.ones((len(labelled.boxes), *labelled.image.shape[:2]), dtype=bool)
                samples.append(
                    map_sample(
                        replace(labelled, masks=full), transform=transform, rng=rng, offline=None, regions_per_image=0
                    )
                )
            labels = [pad_objects(sample["instances"]) for sample in samples]
            return {
                **_maps(model, [sample["image"] for sample in samples], config.cache_precision),
                **{name: np.stack([row[name] for row in labels]) for name in labels[0]},
            }

        key = {**_model_key(config, model), "data": described, **files, "flip": flip, "agnostic": False}
        caches.append(
            FeatureCache.open(Path(config.cache or ""), key=key, count=len(all_images), compute=compute, batch=BATCH)
        )
    return CachedDetection(source=source, caches=caches, features=config.model.backbone.features)


def cached_patches(
    config: DetrTrainConfig,
    model: Detr,
    embed: Callable[[Tensor], Tensor],
    source: PatchSource,
    images: ImagesConfig,
    *,
    variants: int,
    space: str,
) -> CachedPatches:
    """The samples of ``source`` from cached features and embeddings.

    Args:
        config: of the training, with a pretext.
        model: whose backbone is frozen.
        embed: (P, K, 3, S, S) uint8 patches → (P, D).
        source: of pictures and patches.
        images: the section that ``source`` was built from.
        variants: sets of patches per picture.
        space: names the space of the embeddings.
    """
    assert config.pretext is not None
    readable = Readable(len(source))

    def variants_of(index: int) -> list[PatchSample]:
        return [source.variant(index, v) for v in range(variants)]

    def compute(indices: list[int]) -> dict[str, NDArray[Any]]:
        samples = [readable(index, variants_of) for index in indices]
        patches = torch.stack([sample["patches"] for group in samples for sample in group])  # (n·V, M, K, 3, S, S)
        with torch.no_grad():
            z = embed(patches.flatten(0, 1).to(model.device)).cpu()
        dtype = np.float16 if config.cache_precision == "float16" else np.float32
        return {
            **_maps(model, [group[0]["image"] for group in samples], config.cache_precision),
            "size": np.array([group[0]["size"] for group in samples]),
            "patch_boxes": np.stack([np.stack([sample["boxes"].numpy() for sample in group]) for group in samples]),
            "patch_embeddings": z.numpy().astype(dtype).reshape(len(indices), variants, source.config.count, -1),
        }

    patches = config.pretext.patches.model_dump(mode="json") | {"variants": variants}
    described = images.model_dump(mode="json")
    key = {
        **_model_key(config, model),
        "images": described,
        **files_of(described),
        "patches": patches,
        "seed": source.seed,
        "space": space,
    }
    model.eval()
    cache = FeatureCache.open(Path(config.cache or ""), key=key, count=len(source), compute=compute, batch=BATCH)
    return CachedPatches(cache=cache, features=config.model.backbone.features, source=source)


def _model_key(config: DetrTrainConfig, model: Detr) -> dict[str, object]:
    """Key of cached features beside the pictures: the backbone's weights and the input size."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    mean, std = model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()
    return {
        "backbone": digest.hexdigest(),
        "features": list(config.model.backbone.features),
        "pixels": [mean, std],
        "sides": [config.data.short_side, config.data.long_side],
        "precision": config.cache_precision,
    }


def _maps(model: Detr, images: Sequence[Tensor], precision: str) -> dict[str, NDArray[Any]]:
    """Feature maps of pictures of one size.

    Raises:
        UserError: pictures of several sizes.
    """
    if len({tuple(image.shape) for image in images}) > 1:
        raise UserError("cache: the pictures have different sizes after the resize; set cache=null")
    with torch.no_grad():
        maps = model.maps(model.normalised(torch.stack(list(images))))
    dtype = torch.float16 if precision == "float16" else torch.float32
    return {name: value.to(dtype).cpu().numpy() for name, value in maps.items()}
