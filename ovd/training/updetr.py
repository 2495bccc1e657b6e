# SPDX-License-Identifier: Apache-2.0
"""UP-DETR's pretext for ``python -m ovd.train``: its task, its patches, and the pictures it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ovd.config_detr import DetrTrainConfig, PretextConfig
from ovd.data.cached_features import CachedPatches, Readable
from ovd.data.mapper import TrainingTransform
from ovd.data.patches import PatchSource
from ovd.data.samples import PatchSample
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.updetr import PatchPretext
from ovd.regions.crops import embed_crops
from ovd.training.feature_cache import cached_patches
from pretrain.config_views import ImagesConfig
from pretrain.data.images import ImageSet, build_images
from pretrain.engine.distributed import world_size
from pretrain.engine.identity import identity_of
from pretrain.nets.towers import JointEncoder

CROP_SCALES = (1.0, 1.5)  # of the joint space's regions (ViLD §3.2)


def build_pretext(
    config: DetrTrainConfig, model: Detr, encoder: JointEncoder
) -> tuple[PatchPretext, PatchSource | CachedPatches]:
    """Task and source of the pretext."""
    pretext = config.pretext
    assert pretext is not None
    embed = patch_embedder(config, model, encoder)
    space = encoder.fingerprint() if config.model.embed_space == "clip" else "backbone"
    source: PatchSource | CachedPatches
    source = patches = patch_source(config, pretext.images, seed=config.loop.seed)
    if config.cache is not None:
        variants = pretext.patches.variants
        source = cached_patches(config, model, embed, patches, pretext.images, variants=variants, space=space)
    task = PatchPretext(
        model=model,
        embed=embed,
        grouped=pretext.grouped,
        attention_mask=pretext.attention_mask,
        shuffle=pretext.shuffle,
        mask_queries=pretext.mask_queries,
        held_out=held_out_batches(config, pretext, model, embed, space=space),
        evaluate_every=pretext.evaluate_every,
        pretrained_lr_scale=config.pretrained_lr_scale,
    )
    return task, source


def held_out_batches(
    config: DetrTrainConfig,
    pretext: PretextConfig,
    model: Detr,
    embed: Callable[[Tensor], Tensor],
    *,
    space: str,
) -> list[list[PatchSample]]:
    """Held-out pictures with their patches, in batches as large as a training step's."""
    if not pretext.held_out_count:
        return []
    source: PatchSource | CachedPatches
    source = patches = patch_source(
        config, pretext.held_out, seed=config.loop.seed + 1, count=pretext.held_out_count, augmented=False
    )
    if config.cache is not None:
        source = cached_patches(config, model, embed, patches, pretext.held_out, variants=1, space=space)
    readable = Readable(len(source))
    samples = [readable(index, lambda index: source.sample(index, 0)) for index in range(len(source))]
    size = max(1, config.loop.batch_size // (world_size() * config.loop.accumulate))
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def patch_embedder(config: DetrTrainConfig, model: Detr, encoder: JointEncoder) -> Callable[[Tensor], Tensor]:
    """(P, K, 3, S, S) uint8 → (P, D): by the frozen backbone, or by the joint space's image encoder."""
    if config.model.embed_space == "clip":
        return lambda patches: embed_crops(encoder, patches).to(model.device)
    return lambda patches: model.pooled(patches[:, 0])


@dataclass(frozen=True)
class UnlabelledSubset:
    """The first ``count`` pictures of a set, without labels."""

    images: ImageSet
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def identity(self) -> dict[str, str]:
        """Fingerprint of all the pictures."""
        return identity_of(self.images)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Picture ``index``."""
        return self.images.image(index)

    def label(self, index: int) -> int:
        """No label."""
        return -1


def patch_source(
    config: DetrTrainConfig, images: ImagesConfig, *, seed: int, count: int | None = None, augmented: bool = True
) -> PatchSource:
    """Patches of the pictures that a section describes; held-out ones are measured in one size and as they are."""
    assert config.pretext is not None
    patches, data = config.pretext.patches, config.data
    pictures = build_images(images)
    return PatchSource(
        images=pictures if count is None else UnlabelledSubset(pictures, count),
        transform=TrainingTransform(
            short_side=data.short_side,
            long_side=data.long_side,
            scale=data.scale if augmented else (1.0, 1.0),
            crop=None,
            flip=0.0,
        ),
        seed=seed,
        config=patches if augmented else patches.model_copy(update={"jitter": False}),
        crop_scales=CROP_SCALES if config.model.embed_space == "clip" else (1.0,),
    )
