# SPDX-License-Identifier: Apache-2.0
"""Building and loading detection transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ovd.config_detr import DetrConfig
from ovd.modeling.backbone import build_bottom_up
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.structures import FeatureMap
from ovd.modeling.export import DetectorCard, exported_tensors, load_exported
from ovd.modeling.region_head import last_stage_head

REGION_RESOLUTION = 4  # side of the map a region tower reads: the encoder's own res4 at 64 pixels


def build_detr(
    config: DetrConfig,
    *,
    embed_dim: int,
    rows: Tensor | None,
    trainable: Tensor | None,
    classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Detr:
    """A transformer with random weights.

    Args:
        config: architecture.
        embed_dim: D of the encoder; used with ``embed_space: clip``, else D is the backbone's own.
        rows: (C, D) text embeddings for variant ``text``.
        trainable: (C,) bool, False for novel classes.
        classes: C for variant ``closed``.
        pixel_mean, pixel_std: RGB in 0…255.
    """
    bb = config.backbone
    if config.variant == "text" and rows is None:
        raise ValueError("variant 'text' needs the text embeddings of its vocabulary")
    backbone = build_bottom_up(bb, out_features=bb.features)
    shapes = backbone.output_shape()
    features = [FeatureMap(name, shapes[name].channels, shapes[name].stride) for name in bb.features]
    classifier = region_tower = None
    if config.variant == "text" and rows is not None:
        classifier = EmbeddingClassifier(rows=rows, trainable=trainable, scale=config.scale)
    if config.region_tower:
        region_tower = last_stage_head(bb, resolution=REGION_RESOLUTION, norm=bb.norm, embed_dim=embed_dim)
    return Detr(
        config,
        backbone=backbone,
        features=features,
        embed_dim=embed_dim if config.embed_space == "clip" else sum(feature.channels for feature in features),
        classifier=classifier,
        num_classes=classes,
        region_tower=region_tower,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


@torch.no_grad()
def init_projections(
    model: Detr, *, tokens_SC: Tensor, embeddings_PD: Tensor | None = None, projection_DC: Tensor | None = None
) -> str:
    """Initialise ``input_proj`` and ``patch2query`` so that a patch's query already points at look-alike tokens.

    Features of a trained network have a large common component, and pooled patches another one than tokens. So both
    projections start as the same matrix, and their biases subtract the mean of their inputs. (On Sticker Scenes the
    most similar token lies within the patch for 41 % of the patches by the raw features, for 52 % by centred ones; in
    the joint space 13 and 41 %; a patch covers 14 % of its picture: benchmarks/patch_start.py.)

    Args:
        model: with random weights.
        tokens_SC: joined features of some positions of some pictures.
        embeddings_PD: of some patches; None: only ``input_proj`` is initialised.
        projection_DC: the linear map from the pooled last feature map to the joint space, where embeddings lie there.

    Returns:
        what was done, for the log.
    """
    weight = model.input_proj.weight[:, :, 0, 0]
    assert model.input_proj.bias is not None
    if len(tokens_SC) < 2 or (embeddings_PD is not None and len(embeddings_PD) < 2):
        return "input_proj starts at random: a single token has no deviation"
    weight.div_((tokens_SC @ weight.T).std(0).mean().clamp(min=1e-6))
    model.input_proj.bias.copy_(-weight @ tokens_SC.mean(0))
    done = "input_proj starts centred on the tokens"
    if embeddings_PD is None:
        return done
    same_space = not model.patch2query.unit and model.patch2query.in_features == model.input_proj.in_channels
    if same_space:
        model.patch2query.weight.copy_(weight)
    elif projection_DC is not None:
        # Back from the joint space to the channels it was projected from, as far as that goes, then as the tokens.
        back = torch.linalg.pinv(projection_DC.double()).to(weight)
        model.patch2query.weight.copy_(weight[:, -len(back) :] @ back)
    else:
        return done + "; patch2query at random: its space is not the tokens'"
    model.patch2query.bias.zero_()
    queries, keys = model.patch2query(embeddings_PD), tokens_SC @ weight.T
    model.patch2query.weight.mul_(keys.std(0).norm() / queries.std(0).norm().clamp(min=1e-6))
    model.patch2query.bias.copy_(-model.patch2query(embeddings_PD).mean(0))
    return done + ", patch2query as the same map, centred on the patches"


# --- loading


def load_detr(folder: Path, card: DetectorCard) -> tuple[Detr, Tensor]:
    """(model in eval mode, (B, D) embeddings of the background words) of an exported transformer.

    Args:
        folder: of the export.
        card: of the folder.

    Raises:
        UserError: missing file or tensors that do not fit the card.
    """
    state, background_words = exported_tensors(folder, card)
    config = card.architecture
    assert isinstance(config, DetrConfig)
    model = build_detr(
        config,
        embed_dim=card.embed_dim,
        rows=torch.ones(len(card.classes), card.embed_dim) if config.variant == "text" else None,
        trainable=card.trainable,
        classes=len(card.classes),
        pixel_mean=card.pixel_mean,
        pixel_std=card.pixel_std,
    )
    load_exported(model, state, folder)
    return model.eval(), background_words
