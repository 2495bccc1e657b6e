# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.train`` for a region head on a frozen image tower (``model.arch: fvlm``).

All but the head is frozen, so every photo goes through the networks once; the head then learns from cached features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.config_fvlm import FvlmConfig, FvlmTrainConfig, PhotoDataConfig
from ovd.training.inputs import resolve_encoder
from pretrain.engine.files import sha256_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ovd.data.photo_words import PhotoLabels
    from ovd.data.pooled import PooledSource
    from ovd.inference.scoring import Calibration
    from ovd.modeling.fvlm.network import FvlmDetector
    from ovd.modeling.task import DetectionTask
    from ovd.regions.store import RegionStore
    from pretrain.nets.towers import JointEncoder

BATCH = 8  # photos between two writings of the cache

FeatureRows = Callable[[int], "dict[str, NDArray[Any]]"]


@dataclass(frozen=True, kw_only=True)
class FvlmParts:
    """Parts of a training of a region head; ``rows``: (V, D) text embeddings of the words."""

    encoder: JointEncoder
    model: FvlmDetector
    rows: Tensor
    proposals: Path
    photos: PhotoLabels
    task: DetectionTask
    source: PooledSource


def build(config: FvlmTrainConfig, *, check: bool = False) -> FvlmParts:
    """Everything a training needs, before the first step; features that are not cached yet are computed first.

    Args:
        config: of the training.
        check: for ``--check``: cache nothing.
    """
    import torch

    from ovd.data.pooled import OfflineRegions, PooledSource
    from ovd.modeling.fvlm.conse import RegionConse
    from ovd.modeling.fvlm.criterion import WordCriterion
    from ovd.modeling.fvlm.network import build_fvlm
    from ovd.modeling.proposals.build import load_proposals
    from ovd.modeling.task import DetectionTask
    from ovd.text import embed_vocabulary
    from ovd.vocabulary import TEMPLATE_SETS, Vocabulary
    from ovd.weights import detector_folder
    from pretrain.engine.distributed import seed_everything

    if check:  # features are computed for the batches that are looked at
        config = config.model_copy(update={"cache": None})
    seed_everything(config.loop.seed)
    photos = read_photos(config.data)
    for notice in photos.notices:
        print(notice)
    encoder = resolve_encoder(config.encoder)
    store = None if config.regions is None else open_store(Path(config.regions), photos, encoder, name=config.encoder)
    words = Vocabulary.of(photos.table.words, templates=TEMPLATE_SETS[config.templates])
    rows = torch.from_numpy(embed_vocabulary(words, encoder))
    proposals = detector_folder(config.proposals)
    conse = None if config.model.conse is None else RegionConse.from_package(config.model.conse, encoder)
    model = build_fvlm(config.model, proposer=load_proposals(proposals), encoder=encoder, conse=conse)
    key = {"encoder": encoder.fingerprint(), "proposals": _digest(proposals)}
    row = photo_features(config, model, photos, key=key)
    offline = None
    if store is not None:
        offline = OfflineRegions(
            store=store, row=offline_features(config, model, photos, store, encoder=encoder.fingerprint())
        )
    criterion = WordCriterion(
        model=model,
        rows=rows,
        always_labelled=photos.table.always_labelled,
        noun_weight=config.noun_weight,
        image_weight=None if store is None else config.image_weight,
    )
    return FvlmParts(
        encoder=encoder,
        model=model,
        rows=rows,
        proposals=proposals,
        photos=photos,
        task=DetectionTask(model=criterion, pretrained_prefixes=(), pretrained_lr_scale=1.0),
        source=PooledSource(photos=photos, row=row, offline=offline, with_boxes=model.quality is not None),
    )


def read_photos(data: PhotoDataConfig) -> PhotoLabels:
    """The photos and labels of a data section."""
    from ovd.data.photo_words import PhotoLabels, nouns_of
    from pretrain.data.lexicon import read_lexicon

    return PhotoLabels(
        folder=Path(data.images),
        annotations=[Path(path) for path in data.annotations],
        labels=Path(data.labels) if data.labels is not None else None,
        lexicon=read_lexicon(),
        part=data.part,
        min_score=data.min_score,
        not_things=nouns_of(data.not_things),
        leave_out=nouns_of(data.leave_out),
        withheld=data.withheld,
        novel=data.novel,
    )


def _digest(proposals: Path) -> str:
    return sha256_of(proposals / "model.safetensors") + sha256_of(proposals / "model.json")


def open_store(folder: Path, photos: PhotoLabels, encoder: JointEncoder, *, name: str) -> RegionStore:
    """The photos' offline regions.

    Args:
        folder: of the store.
        photos: that are trained on.
        encoder: of the training.
        name: the encoder's, for messages.

    Raises:
        UserError: a store of another encoder, or one that lacks a photo.
    """
    from ovd.regions.store import RegionStore

    image_ids = [photo.image_id for photo in photos.photos]
    return RegionStore.open(folder, encoder_fingerprint=encoder.fingerprint(), encoder_name=name, image_ids=image_ids)


def photo_features(
    config: FvlmTrainConfig, model: FvlmDetector, photos: PhotoLabels, *, key: Mapping[str, str]
) -> FeatureRows:
    """A function from a photo's index to its regions with pooled features; a cache is filled first.

    Args:
        config: of the training.
        model: whose proposals and tower give them.
        photos: one row each.
        key: digests of the networks.
    """
    import numpy as np

    regions = config.data.regions

    def compute(index: int) -> dict[str, NDArray[Any]]:
        return {"photo": np.array(index), **_region_features(model, photos.image(index), count=regions, seed=index)}

    more = {
        "model": config.model.model_dump(mode="json", include={"side", "known"}),
        "regions": regions,
        "of a picture": ["photo", "size"],  # what rows of earlier versions lack
    }
    return _from_cache(config, photos, compute, key={**key, **more})


def offline_features(
    config: FvlmTrainConfig, model: FvlmDetector, photos: PhotoLabels, store: RegionStore, *, encoder: str
) -> FeatureRows:
    """A function from a photo's index to the features of its offline regions; see `photo_features`.

    Args:
        config: of the training.
        model: whose tower gives them.
        photos: one row each.
        store: of the regions.
        encoder: fingerprint of the tower's encoder.
    """
    import numpy as np

    count = store.settings.proposals_per_image

    def compute(index: int) -> dict[str, NDArray[Any]]:
        boxes = store[photos.photos[index].image_id][0]
        return {"features": _padded(model.tower.pooled(photos.image(index), boxes), count, np.float16)}

    more = {"side": config.model.side, "offline regions": store.identity()}
    return _from_cache(config, photos, compute, key={"encoder": encoder, **more})


def _from_cache(
    config: FvlmTrainConfig,
    photos: PhotoLabels,
    compute: Callable[[int], dict[str, NDArray[Any]]],
    *,
    key: Mapping[str, object],
) -> FeatureRows:
    """`compute`, or the rows of a cache, which is filled first."""
    import numpy as np

    from ovd.data.cached_features import FeatureCache, Readable, files_of

    if config.cache is None:
        return compute
    readable = Readable(len(photos))

    def several(indices: list[int]) -> dict[str, NDArray[Any]]:
        rows = [readable(index, compute) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    described: dict[str, object] = {
        **key,
        "photos": [str(photo.file.relative_to(config.data.images)) for photo in photos.photos],
        **files_of({"images": config.data.images}),
        "pool": [config.model.head.pool, config.model.head.context],
    }
    return FeatureCache.open(Path(config.cache), key=described, count=len(photos), compute=several, batch=BATCH).row


def _region_features(
    model: FvlmDetector, image: NDArray[np.uint8], *, count: int, seed: int
) -> dict[str, NDArray[Any]]:
    """A cache's row of a picture: half of the regions are the best ones, the others drawn from the rest."""
    import numpy as np
    import torch

    proposals = model.proposer.regions(image, top=300)
    half = count // 2
    sampled = np.random.default_rng([7, seed]).permutation(np.arange(half, len(proposals.boxes)))[: count - half]
    chosen = torch.from_numpy(np.concatenate([np.arange(min(half, len(proposals.boxes))), np.sort(sampled)]))
    pooled = model.pooled(image, proposals[chosen])
    return {
        "features": _padded(pooled.features, count, np.float16),
        "known": _padded(pooled.word_scores, count, np.float16),
        "boxes": _padded(pooled.boxes, count, np.float32),
        "size": np.array(image.shape[:2], np.float32),
        "regions": np.array(len(chosen)),
    }


def _padded(values: Tensor, count: int, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """As many rows as a cache has for every photo."""
    import numpy as np

    rows = np.zeros((count, *values.shape[1:]), dtype=dtype)
    rows[: len(values)] = values.cpu().float().numpy()
    return rows


def start_calibration(model: FvlmConfig, logit_scale: float) -> Calibration:
    """Calibration before anything is fitted, with the ranking parameters of words without labels.

    Its values were chosen on photos of `data.part: val` (docs/reports/photographs.md).

    Args:
        model: of the detector.
        logit_scale: the encoder's inverse temperature.
    """
    from ovd.inference.scoring import Calibration

    if not model.known:
        return Calibration(open_scale=0.4 * logit_scale, open_objectness=1.5, open_unknown=2.0)
    has_conse, has_quality = model.conse is not None, model.quality is not None
    return Calibration(
        open_scale=(2.0 if has_conse else 1.6) * logit_scale,
        open_objectness=1.5 if has_quality else 3.0,
        open_quality=4.0 if has_quality else 0.0,
        open_area=0.8 if has_quality else 0.6,
        open_unknown=0.75 if has_conse else 1.5,
        open_conse=0.5 if has_conse else 0.0,
        open_fallback=0.5,
    )


def export(config: FvlmTrainConfig, parts: FvlmParts, folder: Path) -> None:
    """Write the trained head with its card and the proposal network; scores are uncalibrated."""
    import shutil

    from ovd.modeling.export import DetectorCard, architecture_record, save_detector
    from ovd.modeling.fvlm.conse import save_conse
    from ovd.modeling.fvlm.network import PROPOSALS
    from ovd.modeling.fvlm.quality import save_quality
    from pretrain.engine.config import config_hash

    table = parts.photos.table
    card = DetectorCard(
        model=architecture_record(config.model.model_dump(mode="json")),
        embed_dim=parts.encoder.embed_dim,
        pixel_mean=tuple(255 * v for v in parts.encoder.image_mean),
        pixel_std=tuple(255 * v for v in parts.encoder.image_std),
        encoder=config.encoder,
        encoder_fingerprint=parts.encoder.fingerprint(),
        short_side=config.model.side,
        long_side=config.model.side,
        classes=table.words[: table.always_labelled],
        novel=(),
        background_words=table.words,
        calibration=start_calibration(config.model, float(parts.encoder.logit_scale.detach().exp())).record(),
        config_hash=config_hash(config),
        templates=config.templates,
    )
    save_detector(folder, parts.model, card, background_words=parts.rows)
    if parts.model.conse is not None:
        save_conse(folder, parts.model.conse)
    if parts.model.quality is not None:
        save_quality(folder, parts.model.quality)
    shutil.copytree(parts.proposals, folder / PROPOSALS)
