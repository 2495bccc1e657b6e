# SPDX-License-Identifier: Apache-2.0
"""Assembling, starting and loading detection transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ovd.config_detr import DetrConfig
from ovd.modeling.backbone import build_resnet, stage_channels, to_detectron2
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.network import Detr
from ovd.modeling.region_head import Tower
from ovd.modeling.vild.build import STRIDES, DetectorCard, exported_tensors, load_exported, read_card
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED
from pretrain.nets.checkpoints import read_tensors

OFFICIAL_BACKBONE = "backbone.0.body."  # of released DETR and UP-DETR checkpoints
DROPPED = ("class_embed.", "classifier.")  # what fine-tuning starts anew, as UP-DETR's paper does
REGION_RESOLUTION = 4  # side of the map a region tower reads: the encoder's own res4 at 64 pixels


def feature_channels(config: DetrConfig) -> int:
    """Channels of the joined feature maps: the width of a patch's feature in the backbone's own space."""
    bb = config.backbone
    return sum(stage_channels(depth=bb.depth, index=int(name[3:])) for name in bb.features)


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
    backbone = build_resnet(
        depth=bb.depth, stem=bb.stem, norm=bb.norm, out_features=bb.features, freeze_at=bb.freeze_at
    )
    return Detr(
        arch=config.arch,
        backbone=backbone,
        features=[(name, stage_channels(depth=bb.depth, index=int(name[3:])), STRIDES[name]) for name in bb.features],
        frozen=bb.frozen,
        width=config.width,
        heads=config.heads,
        ffn=config.ffn,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        queries=config.queries,
        dropout=config.dropout,
        pre_norm=config.pre_norm,
        embed_dim=embed_dim if config.embed_space == "clip" else feature_channels(config),
        classifier=EmbeddingClassifier(rows=rows, trainable=trainable, scale=config.scale)
        if config.variant == "text" and rows is not None
        else None,
        closed_classes=classes if config.variant == "closed" else None,
        unit_conditions=config.embed_space == "clip",
        denoising=config.denoising,
        box_noise=config.box_noise,
        label_noise=config.label_noise,
        conditioned=config.conditioned,
        region_tower=Tower(
            kind="res5",
            in_channels=stage_channels(depth=bb.depth, index=4),
            resolution=REGION_RESOLUTION,
            embed_dim=embed_dim,
            depth=bb.depth,
            norm=bb.norm,
            conv_dims=(),
            fc_dims=(),
        )
        if config.region_tower
        else None,
        scale=config.scale,
        loss=config.loss,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


@torch.no_grad()
def start_projections(
    model: Detr, *, tokens_SC: Tensor, embeddings_PD: Tensor | None = None, projection_DC: Tensor | None = None
) -> str:
    """Start ``input_proj`` and ``patch2query`` so that a patch's query already points at look-alike tokens.

    Features of a trained network share a large part that says nothing; what tells one place from another is the rest,
    and pooled patches have another shared part than tokens have. So both projections begin as the same matrix, and
    their biases take off the mean of what they are fed. (On Sticker Scenes the most similar token lies within the patch
    for 41 % of the patches by the raw features, for 52 % by centred ones; in the joint space 13 and 41 %; a patch
    covers 14 % of its picture: benchmarks/patch_start.py.)

    Args:
        model: with random weights.
        tokens_SC: joined features of some places of some pictures.
        embeddings_PD: of some patches; None: only ``input_proj`` is started.
        projection_DC: the linear map from the pooled last feature map to the joint space, where embeddings lie there.

    Returns:
        What was done, for the log.
    """
    weight = model.input_proj.weight[:, :, 0, 0]
    assert model.input_proj.bias is not None
    if len(tokens_SC) < 2 or (embeddings_PD is not None and len(embeddings_PD) < 2):
        return "input_proj starts at random: a single place tells no deviation"
    weight.div_((tokens_SC @ weight.T).std(0).mean().clamp(min=1e-6))
    model.input_proj.bias.copy_(-weight @ tokens_SC.mean(0))
    said = "input_proj starts centred on the tokens"
    if embeddings_PD is None:
        return said
    own = not model.patch2query.unit and model.patch2query.in_features == model.input_proj.in_channels
    if own:
        model.patch2query.weight.copy_(weight)
    elif projection_DC is not None:
        # Back from the joint space to the channels it was projected from, as far as that goes, then as the tokens.
        back = torch.linalg.pinv(projection_DC.double()).to(weight)
        model.patch2query.weight.copy_(weight[:, -len(back) :] @ back)
    else:
        return said + "; patch2query at random: its space is not the tokens'"
    model.patch2query.bias.zero_()
    found, wanted = model.patch2query(embeddings_PD), tokens_SC @ weight.T
    model.patch2query.weight.mul_(wanted.std(0).norm() / found.std(0).norm().clamp(min=1e-6))
    model.patch2query.bias.copy_(-model.patch2query(embeddings_PD).mean(0))
    return said + ", patch2query as the same map, centred on the patches"


# --- starting from other weights


@dataclass(frozen=True)
class Report:
    """What a start took from a checkpoint; names are those of our parameters.

    Attributes:
        matched: copied.
        missing: ours, not in the checkpoint; they keep their start.
        unexpected: the checkpoint's, not ours.
        dropped: left out on purpose (classification layers).
        other_shape: in both, but of another shape; they keep their start.
        queries: what happened to the query embeddings, or "" when they fitted.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]
    other_shape: tuple[str, ...]
    queries: str = ""

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for name in ("missing", "unexpected", "dropped", "other_shape"):
            keys = getattr(self, name)
            if keys:
                parts.append(
                    f"{name.replace('_', ' ')} {len(keys)}: {', '.join(keys[:6])}{' …' if len(keys) > 6 else ''}"
                )
        return "; ".join(parts) + (f"; {self.queries}" if self.queries else "")


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a released DETR or UP-DETR checkpoint → ours: only the backbone's differ."""
    body = {k.removeprefix(OFFICIAL_BACKBONE): v for k, v in state.items() if k.startswith(OFFICIAL_BACKBONE)}
    out = {k.removeprefix("module."): v for k, v in state.items() if not k.startswith(OFFICIAL_BACKBONE)}
    out.update({f"backbone.{k}": v for k, v in to_detectron2(body).items()})
    return out


def read_official(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pth`` file under our names; nothing in it is executed.

    Raises:
        UserError: no such file, or one that holds anything but tensors and plain values.
    """
    return official_names(read_tensors(path))


def read_start(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors of an exported folder, or of a released ``.pth`` file, and whether they bring a backbone of their own.

    A frozen backbone is the one the configuration names, in full precision; one that was trained belongs to its
    transformer.

    Raises:
        UserError: neither.
    """
    if path.suffix in (".pth", ".pt"):
        return read_official(path), True
    folder = _exported_of(path)
    card = read_card(folder)
    if not card.is_transformer:
        raise UserError(f"weights={path}: is no detection transformer; give exported/ of a DETR or UP-DETR run")
    return exported_tensors(folder)[0], not card.model["backbone"]["frozen"]


def _exported_of(path: Path) -> Path:
    """The exported folder of a run, or the folder itself."""
    return path / EXPORTED if (path / EXPORTED / "model.json").is_file() else path


def refuse_other_attention(path: Path, state: Mapping[str, Tensor], config: DetrConfig) -> None:
    """Refuse weights whose shapes fit but which compute something else here.

    Args:
        path: of `read_start`.
        state: what it read.
        config: of the model that is to start from them.

    Raises:
        UserError: another number of heads, or norms in another place.
    """
    pre_norm = "transformer.encoder.norm.weight" in state  # only where norms come first is there one at the end
    if pre_norm != config.pre_norm:
        raise UserError(f"weights={path}: trained with model.pre_norm={str(pre_norm).lower()}; set it so here")
    if path.suffix in (".pth", ".pt"):
        return  # a released file does not say how many heads it has: the papers' 8
    heads = int(read_card(_exported_of(path)).model["heads"])
    if heads != config.heads:
        raise UserError(f"weights={path}: trained with model.heads={heads}, not {config.heads}; set it so here")


def start_detr(model: Detr, state: Mapping[str, Tensor], *, source: str, backbone: bool = True) -> Report:
    """Copy what fits; classification layers start anew, query embeddings are kept and cut to the number of queries.

    Args:
        model: to be started.
        state: under our names.
        source: for messages.
        backbone: take the backbone too.

    Raises:
        UserError: less than half of the transformer fits, so this is another architecture.
    """
    own = model.state_dict()
    copied: dict[str, Tensor] = {}
    other, queries = [], ""
    for key, value in own.items():
        if key.startswith(DROPPED) or key not in state or (key.startswith("backbone.") and not backbone):
            continue
        given = state[key]
        if given.shape == value.shape:
            copied[key] = given
        elif key in ("query_embed.weight", "query_anchor") and given.shape[1:] == value.shape[1:]:
            kept = min(len(given), len(value))
            copied[key] = torch.cat([given[:kept].to(value), value[kept:]])
            queries = (
                f"query embeddings: the first {kept} of {len(given)} are kept"
                + (f", the other {len(value) - kept} start anew" if len(value) > kept else "")
            )  # fmt: skip
        else:
            other.append(key)
    transformer = [k for k in own if k.startswith("transformer.")]
    fitting = sum(k in copied for k in transformer)
    if 2 * fitting < len(transformer):  # a bias or two always fit
        raise UserError(
            f"weights={source}: {fitting} of {len(transformer)} transformer tensors fit; "
            "model.arch, width and ffn must be those it was trained with"
        )
    left = {k for k in own if k.startswith("backbone.")} if not backbone else set()
    model.load_state_dict({**own, **copied})
    return Report(
        matched=tuple(copied),
        missing=tuple(k for k in own if k not in state and not k.startswith(DROPPED) and k not in left),
        unexpected=tuple(k for k in state if k not in own and not k.startswith(DROPPED)),
        dropped=tuple(k for k in state if k.startswith(DROPPED)),
        other_shape=tuple(other),
        queries=queries,
    )


# --- loading


def load_detr(folder: Path) -> tuple[Detr, DetectorCard, Tensor]:
    """(model in eval mode, card, (B, D) bank) of an exported transformer.

    Raises:
        UserError: missing file or tensors that do not fit the card.
    """
    card = read_card(folder)
    state, bank = exported_tensors(folder)
    config = DetrConfig.model_validate({k: v for k, v in card.model.items() if k != "head"})
    trainable = torch.ones(len(card.classes), dtype=torch.bool)
    trainable[list(card.novel)] = False
    model = build_detr(
        config,
        embed_dim=card.embed_dim,
        rows=torch.ones(len(card.classes), card.embed_dim) if config.variant == "text" else None,
        trainable=trainable,
        classes=len(card.classes),
        pixel_mean=card.pixel_mean,
        pixel_std=card.pixel_std,
    )
    load_exported(model, state, folder)
    return model.eval(), card, bank
