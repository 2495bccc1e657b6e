# SPDX-License-Identifier: Apache-2.0
"""Starting a detection transformer from other weights: an exported folder, or a released DETR or UP-DETR checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ovd.config_detr import DetrConfig
from ovd.modeling.detr.network import Detr
from ovd.modeling.export import exported_tensors, read_card
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED
from pretrain.engine.state import LoadReport, load_tensors
from pretrain.nets.checkpoints import read_tensors, to_detectron2

OFFICIAL_BACKBONE = "backbone.0.body."  # of released DETR and UP-DETR checkpoints
DROPPED = ("class_embed.", "classifier.")  # fine-tuning initialises these, as UP-DETR's paper does


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


def read_initial_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
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
        raise UserError(f"weights={path}: is not a detection transformer; give exported/ of a DETR or UP-DETR run")
    trained = card.architecture
    assert isinstance(trained, DetrConfig)
    return exported_tensors(folder, card)[0], not trained.backbone.frozen


def _exported_of(path: Path) -> Path:
    """The exported folder of a run, or the folder itself."""
    return path / EXPORTED if (path / EXPORTED / "model.json").is_file() else path


def refuse_other_attention(path: Path, state: Mapping[str, Tensor], config: DetrConfig) -> None:
    """Refuse weights whose shapes fit but which compute something else here.

    Args:
        path: of `read_initial_weights`.
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
    trained = read_card(_exported_of(path)).architecture
    assert isinstance(trained, DetrConfig)  # read_initial_weights refuses others
    if trained.heads != config.heads:
        raise UserError(f"weights={path}: trained with model.heads={trained.heads}, not {config.heads}; set it so here")


def init_detr(model: Detr, state: Mapping[str, Tensor], *, source: str, backbone: bool = True) -> LoadReport:
    """Copy what fits; classification layers start anew, query embeddings are kept and cut to the number of queries.

    Args:
        model: to be started.
        state: under our names.
        source: for messages.
        backbone: take the backbone too.

    Raises:
        UserError: less than half of the transformer fits, so this is another architecture.
    """
    expected = model.state_dict()
    transformer = [k for k in expected if k.startswith("transformer.")]
    fitting = sum(k in state and state[k].shape == expected[k].shape for k in transformer)
    if 2 * fitting < len(transformer):  # a bias or two always fit
        raise UserError(
            f"weights={source}: {fitting} of {len(transformer)} transformer tensors fit; "
            "model.arch, width and ffn must be those it was trained with"
        )
    queries: dict[str, Tensor] = {}
    notes = ""
    for key in ("query_embed.weight", "query_anchor"):
        if key in expected and key in state and expected[key].shape != state[key].shape:
            loaded, initial = state[key], expected[key]
            if loaded.shape[1:] == initial.shape[1:]:
                count = min(len(loaded), len(initial))
                queries[key] = torch.cat([loaded[:count].to(initial), initial[count:]])
                notes = f"query embeddings: the first {count} of {len(loaded)} are kept"
                if len(initial) > count:
                    notes += f", the other {len(initial) - count} start anew"
    skip = DROPPED if backbone else (*DROPPED, "backbone.")
    report = load_tensors(model, {**state, **queries}, source=source, strict="no", skip=skip)
    return replace(report, notes=notes)
