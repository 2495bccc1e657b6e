# SPDX-License-Identifier: Apache-2.0
"""Backbones by name, and the folder an exported one lives in.

    backbone = build_backbone(BackboneConfig(name="resnet18"))        # (N, 3, H, W) -> (N, backbone.width)
    backbone, info = load_backbone("runs/simsiam/exported")

Ours (`resnet18` … `resnet101`) have torchvision's parameter names; `detectron2:R50` is the same network under the name
that Detectron2's configs use (its stride stands in the 3x3 convolutions); `pretrain.export` renames the parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from pretrain.config_ssl import OWN_RESNETS, BackboneConfig
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.distributed import is_main
from pretrain.engine.errors import UserError, first_line, near_names
from pretrain.engine.files import read_json, write_atomically
from pretrain.engine.state import load_tensors
from pretrain.engine.stored import require_types, stored_section
from pretrain.nets.resnet import ResNet
from pretrain.nets.standardised import without_batch_norm

FORMAT = "backbone/1"
UNPLAIN = ("inception_v3", "googlenet", "maxvit_t")  # answer twice in training, or pool inside the classifier


class Pooled(nn.Module):
    """A network of another library without its classifier, as (N, 3, H, W) to (N, width)."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.width = network, width

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def build_backbone(config: BackboneConfig, *, sizes: Sequence[int] = (224,)) -> nn.Module:
    """The named network with fresh weights, drawn from torch's generator; its output length is `.width`.

    Args:
        config: name, stem, norm.
        sizes: sides in pixels of the pictures it will see. Networks with a place for each patch (vision transformers)
            are built for the first, and answer for the others where the library can move the places.

    Raises:
        UserError: unknown name, or the network cannot take pictures of these sizes.
    """
    library, _, name = config.name.rpartition(":")
    if config.name in OWN_RESNETS or library == "detectron2":
        depth = int(name.removeprefix("resnet").removeprefix("R"))
        backbone: nn.Module = ResNet(depth=depth, stem=config.stem, zero_init=config.zero_init)
    elif library == "torchvision":
        backbone = _torchvision(name, sizes, zero_init=config.zero_init)
    else:
        backbone = _timm(name, sizes, zero_init=config.zero_init)
    if isinstance(backbone, Pooled) and config.stem != "imagenet" and is_main():
        # no error: the small configurations have a stem, and who uses them changes the name alone
        print(f"method.backbone.stem: {config.stem} is for our ResNets; {config.name} has its own", file=sys.stderr)
    for size in sorted(set(sizes)) if isinstance(backbone, Pooled) else ():  # ours take any
        reason = problem_with(backbone, size)
        if reason is not None:
            raise _unfitting(config.name, size, reason)
    return without_batch_norm(backbone) if config.norm == "gn_ws" else backbone


def _torchvision(name: str, sizes: Sequence[int], *, zero_init: bool) -> nn.Module:
    from torchvision import models

    available = models.list_models(module=models)  # the rest detects, segments or reads videos, and some fetch weights
    if name not in available:
        raise UserError(
            f"method.backbone.name: torchvision has no image classifier {name!r}{near_names(name, available)}"
        )
    if name in UNPLAIN:
        raise UserError(f"method.backbone.name: torchvision's {name!r} returns no plain features; take another model")
    fixed: dict[str, int | bool] = {"image_size": sizes[0]} if name.startswith("vit_") else {}
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        fixed["zero_init_residual"] = zero_init
    try:
        network = models.get_model(name, weights=None, **fixed)
    except (AssertionError, ValueError, RuntimeError) as problem:
        raise _unfitting(f"torchvision:{name}", sizes[0], first_line(problem)) from problem
    layers = dict(network.named_children())
    for head in ("fc", "classifier", "heads", "head"):  # torchvision's four names for the classifier
        linears = [m for m in layers[head].modules() if isinstance(m, nn.Linear)] if head in layers else []
        if linears:
            network.register_module(head, nn.Flatten(1))
            return Pooled(network, linears[0].in_features)
    raise UserError(f"method.backbone.name: torchvision's {name!r} has no classifier to take off; take another model")


def _timm(name: str, sizes: Sequence[int], *, zero_init: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"method.backbone.name: timm has no model {name!r}{near_names(name, timm.list_models())}")
    options: dict[str, int | bool] = {}
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as problem:  # a tag behind a dot that timm does not know
        raise UserError(f"method.backbone.name: timm:{name}: {first_line(problem).rstrip('.!')}") from problem
    if published is not None and published.fixed_input_size:
        options = {"img_size": sizes[0], **({"dynamic_img_size": True} if len(set(sizes)) > 1 else {})}
    try:
        network = _created(name, zero_init=zero_init, **options)
    except TypeError as problem:
        if len(options) < 2:
            raise _unfitting(f"timm:{name}", sizes[0], first_line(problem)) from problem
        raise UserError(
            f"method.backbone.name: timm's {name!r} takes pictures of one size only; method.views has "
            f"{sorted(set(sizes))}"
        ) from problem
    except (AssertionError, ValueError, RuntimeError) as problem:
        raise _unfitting(f"timm:{name}", sizes[0], first_line(problem)) from problem
    # Some of timm's networks, of no common class, have a layer behind their `num_features`.
    width = getattr(network, "head_hidden_size", None) or network.num_features
    return Pooled(network, cast(int, width))


def _created(name: str, *, zero_init: bool, **options: Any) -> nn.Module:
    """timm's network without a classifier; residual networks take ``zero_init``, others have no use for it."""
    import timm

    state = torch.get_rng_state()
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, zero_init_last=zero_init, **options)
    except TypeError as problem:
        if "zero_init_last" not in str(problem):
            raise
    torch.set_rng_state(state)  # whatever the first try has drawn
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


@torch.no_grad()
def problem_with(backbone: nn.Module, size: int) -> str | None:
    """Why a network cannot take pictures of ``size`` pixels, in one line; None if it can. Tested with a black
    picture."""
    training, device = backbone.training, next(backbone.parameters()).device
    try:
        shape = tuple(backbone.eval()(torch.zeros(1, 3, size, size, device=device)).shape)
    except Exception as problem:  # of any kind: the network is another library's
        return first_line(problem).rstrip(".!")
    finally:
        backbone.train(training)
    expected = (1, backbone.width if isinstance(backbone, Pooled | ResNet) else shape[-1])
    return None if shape == expected else f"its features have shape {shape}, not {expected}"


def _unfitting(name: str, size: int, reason: str) -> UserError:
    return UserError(
        f"method.backbone.name: {name} cannot take pictures of {size} pixels ({reason.rstrip('.!')}). Give views of "
        "another size (size, in method.views), or take another backbone"
    )


def save_backbone(
    folder: str | Path,
    backbone: nn.Module,
    *,
    config: BackboneConfig,
    method: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Path:
    """Write `config.json` and `model.safetensors`.

    Args:
        folder: created if it is missing.
        backbone: from `build_backbone`, of this config.
        config: what it was built from.
        method: name of the method that trained it.
        size: side of the (first) pictures it was trained on, pixels.
        mean, std: of RGB in [0, 1], what its input was normalised with.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in backbone.state_dict().items()}
    save_weights(folder / "model.safetensors", tensors, {"format": FORMAT})
    info = {
        "format": FORMAT, "backbone": config.model_dump(mode="json"), "method": method, "size": size,
        "mean": list(mean), "std": list(std),
    }  # fmt: skip
    write_atomically(folder / "config.json", (json.dumps(info, indent=2) + "\n").encode())
    return folder


class BackboneInfo(TypedDict):
    """``config.json`` of an exported backbone.

    Attributes:
        format: version of the folder.
        backbone: its configuration as plain values.
        method: that trained it.
        size: side of the pictures in pixels.
        mean, std: of RGB in [0, 1].
    """

    format: str
    backbone: dict[str, object]
    method: str
    size: int
    mean: list[float]
    std: list[float]


def load_backbone(folder: str | Path) -> tuple[nn.Module, BackboneInfo]:
    """(backbone in eval mode, the content of its ``config.json``).

    Raises:
        UserError: something is missing, is of another format or does not fit; never falls back to random weights.
    """
    folder = Path(folder)
    path = folder / "config.json"
    info = read_json(path, hint="a backbone folder is what pretrain.train exports")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path}: not a backbone of format {FORMAT}; export it again with this version")
    config = stored_section(BackboneConfig, info.get("backbone"), where=f"{path}: backbone")
    try:
        require_types(BackboneInfo, {key: info.get(key) for key in BackboneInfo.__annotations__})
    except TypeError as error:
        raise UserError(f"{path}: {error}; export it again with this version") from error
    backbone = build_backbone(config, sizes=[info["size"]])
    tensors, _ = load_weights(folder / "model.safetensors")
    load_tensors(backbone, tensors, source=folder / "model.safetensors", hint="Its config.json describes another model")
    return backbone.eval(), cast(BackboneInfo, info)
