# SPDX-License-Identifier: Apache-2.0
"""Parts of a detector's training, whatever the architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pretrain.engine.config import config_hash

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ovd.config import DataConfig, TrainConfig
    from ovd.config_detr import DetrTrainConfig
    from ovd.data.catalog import LabelledImages
    from ovd.inference.scoring import Calibration
    from ovd.modeling.export import DetectorCard
    from ovd.modeling.task import DetectionTask
    from pretrain.engine.sampling import Source
    from pretrain.nets.towers import JointEncoder

ModelT = TypeVar("ModelT", bound="nn.Module")


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """Labelled pictures and the text embeddings of their classes.

    Attributes:
        images: the training pictures.
        rows: (C, D) text embeddings, in the order of ``images.names``.
        novel: classes that training must not see; none where novel classes are labelled too.
        trainable: (C,) bool, False for those.
    """

    images: LabelledImages
    rows: Tensor
    novel: frozenset[int]
    trainable: Tensor

    @property
    def background_words(self) -> list[int]:
        """Base classes, also where novel ones are labelled: the words that a detector's scores always compete with."""
        return [i for i in range(len(self.images.names)) if i not in self.images.novel]


@dataclass(frozen=True, kw_only=True)
class TrainingParts(Generic[ModelT]):
    """Model, task and source of a training, and the inputs of the exported card.

    Attributes:
        encoder: the image-text encoder whose space regions are embedded in.
        labels: None for a pretext without labels.
        model: the detector, also within ``task``.
        task: of the training loop.
        source: its samples.
        pixel_mean, pixel_std: RGB in 0…255.
    """

    encoder: JointEncoder
    labels: LabelSet | None
    model: ModelT
    task: DetectionTask
    source: Source
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]


def detector_card(
    config: TrainConfig | DetrTrainConfig,
    parts: TrainingParts[ModelT],
    *,
    model: Mapping[str, object],
    classes: Sequence[str],
    novel: Collection[int],
    background: Sequence[str],
    calibration: Calibration,
    templates: str = "sticker",
) -> DetectorCard:
    """The card of a trained detector.

    Args:
        config: of the training.
        parts: what it trained.
        model: the architecture as plain values.
        classes, novel, background, templates: see `DetectorCard`.
        calibration: until ``python -m ovd.calibrate`` fits one.
    """
    from ovd.modeling.export import DetectorCard, architecture_record

    return DetectorCard(
        model=architecture_record(model),
        embed_dim=parts.encoder.embed_dim,
        pixel_mean=tuple(parts.pixel_mean),
        pixel_std=tuple(parts.pixel_std),
        encoder=config.encoder,
        encoder_fingerprint=parts.encoder.fingerprint(),
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        classes=tuple(classes),
        novel=tuple(sorted(novel)),
        background_words=tuple(background),
        calibration=calibration.record(),
        config_hash=config_hash(config),
        templates=templates,
    )


def label_set(data: DataConfig, encoder: JointEncoder, *, templates: str = "sticker") -> LabelSet:
    """The pictures of a data section, with their classes embedded.

    Args:
        data: of the configuration.
        encoder: of the texts.
        templates: name of the prompts.
    """
    import torch

    from ovd.text import embed_vocabulary
    from ovd.training.inputs import labelled_images
    from ovd.vocabulary import TEMPLATE_SETS, Vocabulary

    images = labelled_images(data)
    rows = torch.from_numpy(embed_vocabulary(Vocabulary.of(images.names, templates=TEMPLATE_SETS[templates]), encoder))
    novel = images.novel if data.labels == "base" else frozenset()
    trainable = torch.ones(len(images.names), dtype=torch.bool)
    trainable[sorted(novel)] = False
    return LabelSet(images=images, rows=rows, novel=novel, trainable=trainable)
