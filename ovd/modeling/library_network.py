# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and torchvision as chains of parts, with stages called by their stride.

Any image classifier whose convolutional part runs as a chain (each part reads the output of the one before) gives a
feature pyramid: `res2` … `res5` are its maps of stride 4, 8, 16 and 32. The chain is traced in one forward pass, then
run on its own and compared, so that a network of another structure (branches, attention over tokens, a fixed input
size) is refused when built instead of computing something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.engine.errors import UserError, first_line, near_names
from pretrain.engine.files import EXPORTED, read_json

PROBE = 128  # pixels; four cells at stride 32
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB, torchvision's for all its weights

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class Chain(nn.Module):
    """Parts of a network, one after another; parameters keep the names that they have in their library."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.paths = tuple(parts)
        for path, part in parts.items():
            *parents, last = path.split(".")
            owner: nn.Module = self
            for name in parents:
                if name not in dict(owner.named_children()):
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(last, part)

    def part(self, path: str) -> nn.Module:
        """One of the parts, by its name in the library."""
        return self.get_submodule(path)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.paths:
            x = self.part(path)(x)
        return x


@dataclass(frozen=True, kw_only=True)
class NetworkPart:
    """A part of a network and the map that it gives.

    Attributes:
        path: its name in the library.
        module: itself, with random weights.
        channels, side: of its map, for pictures of `PROBE` pixels.
        intact: no later part writes into the map.
    """

    path: str
    module: nn.Module
    channels: int
    side: int
    intact: bool


@dataclass(frozen=True, kw_only=True)
class LibraryNetwork:
    """A network with random weights, as a chain of parts.

    Attributes:
        name: `timm:NAME` or `torchvision:NAME`.
        parts: in order; the classifier is not among them.
        ends: of the stages `res2` … `res5`, as far as there are such maps: the number of parts that make each.
        statistics: mean and deviation of RGB in [0, 1] that the library trains this network with.
    """

    name: str
    parts: tuple[NetworkPart, ...]
    ends: dict[str, int]
    statistics: Statistics

    def end(self, stage: str) -> int:
        """The number of parts that make the map of a stage.

        Raises:
            UserError: this network has none of that stride.
        """
        if stage in self.ends:
            return self.ends[stage]
        has = ", ".join(f"{name} (stride {STRIDES[name]})" for name in self.ends)
        raise UserError(
            f"model.backbone.name: {self.name} has no map of stride {STRIDES[stage]} ({stage}); it has {has}. Take "
            "another network, or use these stages"
        )

    def frozen_parts(self, freeze_at: int) -> int:
        """The number of parts up to a stage: 1 is what comes before stride 4, 2 is res2, …; 0 is nothing."""
        if freeze_at > 1:
            return self.end(f"res{freeze_at}")
        stem = next(n for n, part in enumerate(self.parts) if part.side <= PROBE // 4)
        return max(stem, 1) if freeze_at else 0


def open_network(name: str) -> LibraryNetwork:
    """Build a network by its name, with random weights; nothing is ever downloaded.

    Raises:
        UserError: unknown name, or it gives no feature pyramid.
    """
    library, _, model = name.partition(":")
    network, statistics, preferred = (_torchvision if library == "torchvision" else _timm)(model)
    try:
        parts = _chain(network)
    except Exception as problem:  # of any kind: the network is another library's
        raise _no_pyramid(name, first_line(problem).rstrip(".!")) from problem
    ends = {}
    for stage, stride in STRIDES.items():
        levels = [n for n, part in enumerate(parts) if part.intact and part.side == PROBE // stride]
        named = [n for n in levels if any(f"{parts[n].path}.".startswith(f"{path}.") for path in preferred)]
        if levels:
            ends[stage] = (named or levels)[-1] + 1
    if "res4" not in ends:
        raise _no_pyramid(name, "no part of it has a map of stride 16 that all later ones are computed from")
    return LibraryNetwork(name=name, parts=tuple(parts), ends=ends, statistics=statistics)


def _no_pyramid(name: str, reason: str) -> UserError:
    return UserError(
        f"model.backbone.name: {name} gives no feature pyramid ({reason}). A detector needs a network that takes "
        "pictures of any size and gives maps of stride 8, 16 and 32, such as timm:tf_efficientnet_lite2, "
        "timm:mobilenetv3_large_100, timm:convnext_tiny or torchvision:regnet_y_400mf"
    )


def _timm(name: str) -> tuple[nn.Module, Statistics, list[str]]:
    """(network, pixel statistics, parts that timm calls the ends of its stages)."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"model.backbone.name: timm has no network {name!r}{near_names(name, timm.list_models())}")
    try:
        network = timm.create_model(name, pretrained=False)
    except RuntimeError as problem:  # a tag behind a dot that timm does not know
        raise UserError(f"model.backbone.name: timm:{name}: {first_line(problem)}") from problem
    config = cast(Any, network.pretrained_cfg)
    if config.get("fixed_input_size"):
        raise _no_pyramid(f"timm:{name}", f"it takes pictures of {config['input_size'][-1]} pixels only")
    info = cast(Any, network.feature_info)  # a list, or timm's FeatureInfo around one
    ends = [entry["module"] for entry in (info if isinstance(info, list) else info.info)]
    return network, (tuple(config["mean"]), tuple(config["std"])), ends


def _torchvision(name: str) -> tuple[nn.Module, Statistics, list[str]]:
    from torchvision import models

    available = models.list_models(module=models)  # the rest detects, segments or reads videos
    if name not in available:
        raise UserError(f"model.backbone.name: torchvision has no network {name!r}{near_names(name, available)}")
    return models.get_model(name, weights=None), IMAGENET, []


def _units(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's children, and those of its containers, by name."""
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child


@torch.no_grad()
def _chain(network: nn.Module) -> list[NetworkPart]:
    """The parts, as far as each one's input is the output of the one before.

    They are run once within the network and once by themselves; the first that differs ends the chain.
    """
    network.eval()
    called: list[tuple[str, nn.Module, Tensor]] = []

    def record(path: str, part: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            maps = output.clone() if isinstance(output, Tensor) else torch.empty(0)  # later parts work in place
            called.append((path, part, maps))

        return part.register_forward_hook(hook)

    pixels = torch.rand(1, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
    handles = [record(path, part) for path, part in _units(network)]
    try:
        network(pixels)
    finally:
        for handle in handles:
            handle.remove()
    links: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    x = pixels
    for path, part, expected in called:
        is_map = expected.ndim == 4 and expected.shape[2] == expected.shape[3] >= PROBE // STRIDES["res5"]
        if not is_map or any(path == other for other, *_ in links):
            break  # pooled, or tokens, or used twice
        try:
            x = part(x)
        except (RuntimeError, TypeError):  # it reads something else than the map before it
            break
        if not torch.equal(x, expected):
            break
        links.append((path, part, x, expected))
    network.train()
    return [
        NetworkPart(path=path, module=part, channels=y.shape[1], side=y.shape[2], intact=torch.equal(y, expected))
        for path, part, y, expected in links
    ]


def with_norms(module: nn.Module, norm: str) -> nn.Module:
    """The module with its batch norms as they are (`BN`), frozen (`FrozenBN`) or synchronised (`SyncBN`)."""
    from timm.layers import convert_sync_batchnorm
    from timm.utils.model import freeze_batch_norm_2d

    if norm == "FrozenBN":
        frozen: nn.Module = freeze_batch_norm_2d(module)
        return frozen
    if norm == "SyncBN":  # torch's own drops the activations inside timm's batch norms
        synchronised: nn.Module = convert_sync_batchnorm(module)
        return synchronised
    return module


def read_library_weights(spec: str, name: str) -> tuple[dict[str, Tensor], Statistics | None]:
    """(tensors under the library's own names, mean and deviation of RGB in [0, 1] where known) of a file or folder.

    Args:
        spec: a `.safetensors` or torch file of tensors; a folder of timm's (`config.json` with `architecture`, and
            `model.safetensors`); or a run of pretrain.train on this network, or its `exported/` folder.
        name: of the network, as in `model.backbone.name`.

    Raises:
        UserError: no such weights, or those of another network.
    """
    from pretrain.engine.checkpoint import load_weights
    from pretrain.nets.checkpoints import read_tensors

    path = Path(spec)
    if not path.is_dir():
        return read_tensors(path), None
    if not (path / "config.json").is_file() and (path / EXPORTED).is_dir():
        path = path / EXPORTED
    info = read_json(path / "config.json", hint="expected a folder of timm's, or exported/ of a pretrain.train run")
    info = info if isinstance(info, dict) else {}
    is_export = isinstance(info.get("backbone"), dict)
    trained = info["backbone"]["name"] if is_export else f"timm:{info.get('architecture')}"
    if trained.partition(".")[0] != name.partition(".")[0]:  # timm writes a tag of the weights behind a dot
        raise UserError(f"backbone_weights={spec}: weights of {trained}; set model.backbone.name={trained}")
    if is_export and info["backbone"]["norm"] != "bn":
        raise UserError(
            f"backbone_weights={spec}: pretrained with norm gn_ws; only norm bn can be a backbone of {name}"
        )
    tensors = load_weights(path / "model.safetensors")[0]
    pixel_stats = info if is_export else info.get("pretrained_cfg", {})
    statistics = (
        (tuple(pixel_stats["mean"]), tuple(pixel_stats["std"]))
        if "mean" in pixel_stats and "std" in pixel_stats
        else None
    )
    return {key.removeprefix("network."): value for key, value in tensors.items()}, statistics
