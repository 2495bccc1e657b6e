# SPDX-License-Identifier: Apache-2.0
"""Starting a detection transformer from other weights: an exported folder, or a released DETR or UP-DETR checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ovd.config_detr import DetrConfig
from ovd.modeling.backbone import to_detectron2
from ovd.modeling.detr.network import Detr
from ovd.modeling.vild.build import exported_tensors, read_card
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED
from pretrain.nets.checkpoints import read_tensors

OFFICIAL_BACKBONE = "backbone.0.body."  # of released DETR and UP-DETR checkpoints
DROPPED = ("class_embed.", "classifier.")  # what fine-tuning starts anew, as UP-DETR's paper does


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
        UserError: another number of heads, or norms elsewhere in the layers.
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
