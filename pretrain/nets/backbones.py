# SPDX-License-Identifier: Apache-2.0
"""Backbones by name, (N, 3, H, W) → (N, width) with `.width`, and the folder in which a pretrained one is kept.

A folder holds `config.json` (format "backbone/1": how to build it, the method, the pixels' mean and deviation) and
`model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from pretrain.config_ssl import BackboneConfig
from pretrain.engine.errors import UserError, did_you_mean
from pretrain.engine.files import write_atomically
from pretrain.nets.norms import without_batch_statistics
from pretrain.nets.resnet import LAYERS, ResNet

FORMAT = "backbone/1"
DETECTRON2 = {f"R{depth}": depth for depth in LAYERS}
NOT_POOLED = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")  # more outputs than one, or no last layer


def build_backbone(config: BackboneConfig) -> nn.Module:
    """A new network with random weights.

    Raises:
        UserError: There is none of that name.
    """
    kind, _, name = config.name.rpartition(":")
    if kind == "torchvision":
        net = _torchvision(name)
    elif kind == "timm":
        net = _timm(name)
    elif kind == "detectron2":
        if name not in DETECTRON2:
            raise UserError(f"method.backbone.name: detectron2:{name} is none of {', '.join(DETECTRON2)}")
        net = ResNet(depth=DETECTRON2[name], stem=config.stem, zero_init=False)
        for module in net.modules():
            if type(module).__name__ == "Bottleneck":  # the stride where He et al. had it
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    else:
        net = ResNet(depth=int(name.removeprefix("resnet")), stem=config.stem, zero_init=False)
    for gain in last_gains(net):
        nn.init.constant_(gain, 0.0 if config.zero_init else 1.0)
    return without_batch_statistics(net) if config.norm == "gn_ws" else net


def last_gains(net: nn.Module) -> list[nn.Parameter]:
    """The gain of the last norm of every residual block of a ResNet of torchvision or timm; empty for other kinds."""
    blocks = [module for module in net.modules() if type(module).__name__ in ("BasicBlock", "Bottleneck")]
    norms = [getattr(block, "bn3", getattr(block, "bn2", None)) for block in blocks]
    return [norm.weight for norm in norms if norm is not None and getattr(norm, "weight", None) is not None]


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    names = [known for known in models.list_models(module=models) if known not in NOT_POOLED]
    if name not in names:
        raise UserError(
            f"method.backbone.name: torchvision has no classifier '{name}'{did_you_mean(name, names)}; "
            "torchvision.models.list_models() has the names"
        )
    net: nn.Module = models.get_model(name, weights=None)
    where, last = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = where.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    net.width = last.in_features  # type: ignore[assignment]
    return net


def _timm(name: str) -> nn.Module:
    import timm

    names = timm.list_models()
    if name not in names:
        raise UserError(
            f"method.backbone.name: timm {timm.__version__} has no model '{name}'{did_you_mean(name, names)}; "
            "timm.list_models() has the names"
        )
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    net.width = getattr(net, "head_hidden_size", None) or net.num_features  # type: ignore[assignment]
    return net


def save_backbone(
    folder: Path,
    backbone: nn.Module,
    *,
    config: BackboneConfig,
    method: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Path:
    """Write a backbone folder.

    Args:
        folder: Where; it is created.
        backbone: The network, without head.
        config: What it was built from.
        method: Name of the method that trained it.
        mean: Of the pixels (RGB, 0 to 1) that was subtracted; None: 0.
        std: Standard deviation that was divided by; None: 1.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.state_dict().items()}
    info = {
        "format": FORMAT,
        "backbone": config.model_dump(mode="json"),
        "width": int(backbone.width),  # type: ignore[arg-type]
        "method": method,
        "mean": list(mean) if mean is not None else [0.0, 0.0, 0.0],
        "std": list(std) if std is not None else [1.0, 1.0, 1.0],
    }
    write_atomically(folder / "model.safetensors", save(tensors))
    write_atomically(folder / "config.json", (json.dumps(info, indent=1) + "\n").encode())
    return folder


def load_backbone(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a backbone folder: the network in eval mode, and its `config.json`.

    Raises:
        UserError: It is none, or its parts do not belong together.
    """
    folder = Path(folder)
    where = folder / "config.json"
    try:
        info = json.loads(where.read_text(encoding="utf-8"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise UserError(f"{where}: is not of format {FORMAT}; give the exported/ folder of a self-supervised run")
        config = BackboneConfig.model_validate(info.get("backbone"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give the exported/ folder of a self-supervised run") from error
    except (ValueError, ValidationError) as error:
        raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0]}); export the backbone again") from error
    net = build_backbone(config)
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: cannot be read ({error}); export the backbone again") from error
    wanted = net.state_dict()
    wrong = [
        name
        for name in sorted(wanted.keys() | tensors.keys())
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UserError(
            f"{weights}: {len(wrong)} of {len(wanted)} tensors do not fit {config.name}, for example {wrong[0]}; "
            "export the backbone again"
        )
    net.load_state_dict(tensors)
    return net.eval(), info
