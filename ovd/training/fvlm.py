# SPDX-License-Identifier: Apache-2.0
"""What ``python -m ovd.train`` does with a region head on a frozen image tower (``model.arch: fvlm``).

All but the head is frozen, so every photo goes through the networks once; the head then learns from cached features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.config_fvlm import FvlmTrainConfig, PhotoDataConfig
from ovd.training.inputs import resolve_encoder
from pretrain.engine.files import sha256_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ovd.data.photo_words import PhotoWords
    from ovd.data.pooled import PooledSource
    from ovd.modeling.fvlm.network import FvlmDetector
    from ovd.modeling.task import DetectionTask
    from pretrain.nets.towers import JointEncoder

BATCH = 8  # photos between two writings of the cache


@dataclass(frozen=True, kw_only=True)
class FvlmParts:
    """What a training of a region head consists of."""

    encoder: JointEncoder
    model: FvlmDetector
    rows: Tensor
    proposals: Path
    photos: PhotoWords
    task: DetectionTask
    source: PooledSource


def for_check(config: FvlmTrainConfig) -> FvlmTrainConfig:
    """The configuration for ``--check``: features are computed for the batches that are looked at, not cached ahead."""
    return config.model_copy(update={"cache": None})


def build(config: FvlmTrainConfig) -> FvlmParts:
    """Everything a training needs, before the first step; features that are not cached yet are computed first."""
    from ovd.data.pooled import PooledSource
    from ovd.modeling.fvlm.criterion import WordCriterion
    from ovd.modeling.fvlm.network import build_fvlm
    from ovd.modeling.proposals.build import load_proposals
    from ovd.modeling.task import DetectionTask
    from ovd.text import embed_vocabulary
    from ovd.vocabulary import TEMPLATE_SETS, Vocabulary
    from ovd.weights import detector_folder
    from pretrain.engine.distributed import seed_everything

    seed_everything(config.loop.seed)
    photos = read_photos(config.data)
    for notice in photos.notices:
        print(notice)
    encoder = resolve_encoder(config.encoder)
    import torch

    words = Vocabulary.of(photos.table.words, templates=TEMPLATE_SETS[config.templates])
    rows = torch.from_numpy(embed_vocabulary(words, encoder))
    proposals = detector_folder(config.proposals)
    model = build_fvlm(config.model, proposer=load_proposals(proposals), encoder=encoder)
    key = {"encoder": encoder.fingerprint(), "proposals": _digest(proposals)}
    row = rows_of(config, model, photos, key=key)
    criterion = WordCriterion(
        head=model.head,
        rows=rows,
        everywhere=photos.table.everywhere,
        noun_weight=config.noun_weight,
    )
    return FvlmParts(
        encoder=encoder,
        model=model,
        rows=rows,
        proposals=proposals,
        photos=photos,
        task=DetectionTask(model=criterion, pretrained_prefixes=(), pretrained_lr_scale=1.0),
        source=PooledSource(photos=photos, row=row),
    )


def read_photos(data: PhotoDataConfig) -> PhotoWords:
    """The photos and labels of a data section."""
    from ovd.data.photo_words import PhotoWords, nouns_of
    from pretrain.data.lexicon import read_lexicon

    return PhotoWords(
        folder=Path(data.images),
        annotations=[Path(path) for path in data.annotations],
        labels=Path(data.labels) if data.labels is not None else None,
        lexicon=read_lexicon(),
        part=data.part,
        min_score=data.min_score,
        not_things=nouns_of(data.not_things),
        leave_out=nouns_of(data.leave_out),
        withheld=data.withheld,
    )


def _digest(proposals: Path) -> str:
    return sha256_of(proposals / "model.safetensors") + sha256_of(proposals / "model.json")


def rows_of(
    config: FvlmTrainConfig, model: FvlmDetector, photos: PhotoWords, *, key: Mapping[str, str]
) -> Callable[[int], dict[str, NDArray[Any]]]:
    """What gives a photo's regions with pooled features; where there is a cache, it is filled first.

    Args:
        config: of the training.
        model: whose proposals and tower give them.
        photos: one row each.
        key: digests of the networks.
    """
    import numpy as np

    from ovd.data.features import FeatureCache, Readable, files_of

    regions, readable = config.data.regions, Readable(len(photos))
    if config.cache is None:
        return lambda index: _regions_of(model, photos.image(index), count=regions, seed=index)

    def compute(indices: list[int]) -> dict[str, NDArray[Any]]:
        rows = [
            readable(index, lambda i: _regions_of(model, photos.image(i), count=regions, seed=i)) for index in indices
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    described: dict[str, object] = {
        **key,
        "photos": [str(photo.file.relative_to(config.data.images)) for photo in photos.photos],
        **files_of({"images": config.data.images}),
        "model": config.model.model_dump(mode="json", include={"side", "known"}),
        "pool": [config.model.head.pool, config.model.head.context],
        "regions": regions,
    }
    return FeatureCache.open(Path(config.cache), key=described, count=len(photos), compute=compute, batch=BATCH).row


def _regions_of(model: FvlmDetector, image: NDArray[np.uint8], *, count: int, seed: int) -> dict[str, NDArray[Any]]:
    """A cache's row of a picture: half of the regions are the best ones, the others drawn from the rest."""
    import numpy as np
    import torch

    proposals = model.proposer.regions(image, top=300)
    half = count // 2
    rest = np.random.default_rng([7, seed]).permutation(np.arange(half, len(proposals.boxes)))[: count - half]
    chosen = torch.from_numpy(np.concatenate([np.arange(min(half, len(proposals.boxes))), np.sort(rest)]))
    kept = model.pooled(image, proposals[chosen])

    def padded(values: Tensor, dtype: type[np.floating[Any]]) -> NDArray[Any]:
        rows = np.zeros((count, *values.shape[1:]), dtype=dtype)
        rows[: len(values)] = values.cpu().float().numpy()
        return rows

    return {
        "features": padded(kept.features, np.float16),
        "known": padded(kept.known, np.float16),
        "boxes": padded(kept.boxes, np.float32),
        "regions": np.array(len(chosen)),
    }


def export(config: FvlmTrainConfig, parts: FvlmParts, folder: Path) -> None:
    """Write the trained head with its card and the proposal network; scores are uncalibrated."""
    import shutil
    from dataclasses import asdict

    from ovd.inference.scoring import Calibration
    from ovd.modeling.export import DetectorCard, save_detector
    from ovd.modeling.fvlm.network import PROPOSALS
    from pretrain.engine.config import config_hash

    table = parts.photos.table
    card = DetectorCard(
        model=config.model.model_dump(mode="json"),
        embed_dim=parts.encoder.embed_dim,
        pixel_mean=tuple(255 * v for v in parts.encoder.image_mean),
        pixel_std=tuple(255 * v for v in parts.encoder.image_std),
        encoder=config.encoder,
        encoder_fingerprint=parts.encoder.fingerprint(),
        short_side=config.model.side,
        long_side=config.model.side,
        classes=table.words,
        novel=(),
        bank=table.words,
        calibration=asdict(Calibration(open_scale=float(parts.encoder.logit_scale.detach().exp()))),
        config_hash=config_hash(config),
        templates=config.templates,
    )
    save_detector(folder, parts.model, card, bank=parts.rows)
    target = folder / PROPOSALS
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(parts.proposals, target)
