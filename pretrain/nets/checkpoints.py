# SPDX-License-Identifier: Apache-2.0
"""Backbones from other repositories' checkpoints: recognised by their keys, read without running code, loaded in full.

The official repositories wrap the same torchvision ResNet in different names:

============== =============================================================================
MoCo v1, v2    ``state_dict`` → ``module.encoder_q.…`` (the query encoder is the trained one)
MoCo v3        ``state_dict`` → ``module.base_encoder.…``
SimSiam        ``state_dict`` → ``module.encoder.…``
SwAV           ``module.…`` in the file itself, heads beside it
Barlow Twins   plain names, or ``model`` → ``module.backbone.…`` in a whole checkpoint
DINO           ``teacher`` → ``backbone.…``, or plain names
BYOL ports     ``online_network.…``, ``online_encoder.net.…``, ``backbone.…``
============== =============================================================================

CLIP's modified ResNet has three stem convolutions and attention pooling: it is recognised, and refused as a torchvision
network.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.engine.checkpoint import is_safetensors, load_weights, refuse_lfs_pointer
from pretrain.engine.errors import UserError
from pretrain.engine.state import COUNTER, require_weights
from pretrain.nets.resnet import LAYERS, ResNet

Stem = Literal["small", "imagenet", "cifar"]

CONTAINERS = ("state_dict", "model", "teacher", "student", "online_network_state_dict", "model_state_dict")
"""Keys under which a checkpoint may keep the network, first found wins; DINO evaluates the teacher."""

PREFIXES = (
    "encoder_q.", "base_encoder.", "online_network.encoder.", "online_network.", "online_encoder.net.",
    "online_encoder.", "encoder.", "backbone.", "visual.backbone.", "visual.", "",
)  # fmt: skip
"""Where the backbone may hang. Key encoders, targets and momentum copies are not in the list: they are not exported."""

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, of torch.compile

_SCALAR: Any = np.float64().__reduce__()[0]  # makes numpy's numbers out of a type and bytes
_NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # numpy 1
]

_RENAMES = (
    (re.compile(r"^layer(\d)\."), lambda m: f"res{int(m[1]) + 1}."),
    (re.compile(r"downsample\.0\."), lambda m: "shortcut."),
    (re.compile(r"downsample\.1\."), lambda m: "shortcut.norm."),
    (re.compile(r"(^|\.)bn(\d)\."), lambda m: f"{m[1]}conv{m[2]}.norm."),
)


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision ResNet names → Detectron2 names (``layer1.0.bn2`` → ``res2.0.conv2.norm``); heads are left out."""
    converted = {}
    for key, value in state.items():
        if key.startswith("fc.") or key.endswith(COUNTER):
            continue
        name = key
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        converted[name if name.startswith("res") else f"stem.{name}"] = value
    return converted


@dataclass(frozen=True, kw_only=True)
class ResNetMatch:
    """A ResNet found in a checkpoint.

    Attributes:
        state: tensors under torchvision's names, without a head, in 32-bit floats.
        depth, stem: of the network.
        prefix: what stood in front of the names.
        missing: tensors of the network that the file lacks.
        surplus: tensors of the stem and the stages that the network has no place for: it is another one.
        unexpected: tensors of the file that the network has no place for, heads and other networks among them.
    """

    state: dict[str, Tensor]
    depth: int
    stem: Stem
    prefix: str
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def report(self) -> str:
        """Counts and first names, one line."""
        unused = ""
        if self.unexpected:
            more = ", …" if len(self.unexpected) > 4 else ""
            unused = f" ({', '.join(self.unexpected[:4])}{more})"
        return (
            f"ResNet-{self.depth}, {self.stem} stem, found under {self.prefix or 'no prefix'!r}: {len(self.state)} "
            f"tensors matched, {len(self.missing)} missing, {len(self.unexpected)} left out{unused}"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file (of any name), or of a torch checkpoint opened with ``weights_only=True``.

    Raises:
        UserError: no such file, one that would run code when opened, one without a table of tensors, or with tensors
            that are not plain (sparse, quantised, without data) or hold NaN.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; a run is given by its folder (its out=), a download by its file")
    if path.suffix.lower() == ".safetensors" or is_safetensors(path):
        return load_weights(path)[0]
    refuse_lfs_pointer(path)
    _refuse_torchscript(path)
    try:
        # Several repositories store their command line and figures beside the weights; a Namespace and numpy's numbers
        # hold values and run nothing.
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY_NUMBERS]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol, in damaged files above all
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds for a file that is none of its own
        raise UserError(f"{path}: cannot be read as weights only: {_why_unreadable(problem)}") from problem
    for name in CONTAINERS:
        inner = loaded.get(name) if isinstance(loaded, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            loaded = inner
            break
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no table of tensors, neither itself nor under {', '.join(CONTAINERS)}")
    _require_plain(tensors, path)
    if all(_WRAPPERS.match(key) for key in tensors):
        tensors = {_WRAPPERS.sub("", key): value for key, value in tensors.items()}
    return tensors


def _require_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    for key, value in tensors.items():
        kind = "quantised" if value.is_quantized else "without data (meta)" if value.is_meta else str(value.layout)
        if kind != str(torch.strided):
            raise UserError(f"{path}: {key} is {kind}; have it saved as a plain tensor")
        if value.is_floating_point() and bool(torch.isnan(value.to(torch.float32)).any()):
            raise UserError(f"{path}: {key} holds values that are no numbers (NaN); fetch or export it again")


def _refuse_torchscript(path: Path) -> None:
    """A network with its code, which no option of torch's opens without it."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(
                f"{path}: a TorchScript archive (as OpenAI's CLIP is published), which holds code. If you trust it, "
                'take its tensors out once:\n  python -c "import torch; torch.save(torch.jit.load('
                f"{str(path)!r}, map_location='cpu').state_dict(), {str(path.with_suffix('.tensors.pt'))!r})\""
            )


def _why_unreadable(problem: Exception) -> str:
    """The reason, without torch's own advice, which is to run the file's code."""
    stored = re.search(r"GLOBAL (\S+)", str(problem))
    if stored:
        return (
            f"it holds Python objects ({stored[1]}), which run code when they are opened. Have it converted to "
            "safetensors where it came from"
        )
    return f"it is not a checkpoint of torch, or damaged ({type(problem).__name__})"


def find_resnet(tensors: Mapping[str, Tensor], *, source: str, stem: Stem | None = None) -> ResNetMatch:
    """Find a torchvision-named ResNet by its keys.

    Args:
        tensors: any names, see the module.
        source: for messages.
        stem: what a 3×3 first convolution means, ``small`` (stride 2 and a max pool) or ``cifar`` (stride 1, no pool);
            None: it is refused, as its stride cannot be seen.

    Raises:
        UserError: too little matches (anything of the network is missing or has another shape), it is a deeper or
            another network, its numbers are no weights, or it is CLIP's modified ResNet. Nothing is ever filled with
            random numbers.
    """
    plain = {_WRAPPERS.sub("", key): value for key, value in tensors.items()}
    best: ResNetMatch | None = None
    for prefix in PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
        # lucidrains' BYOL numbers the children of a torchvision network.
        inner = {_numbered(k): v for k, v in inner.items()}
        match = _match(inner, plain, prefix, stem)
        if match is not None and (best is None or len(match.state) > len(best.state)):
            best = match
    if best is None and "visual.proj" in plain:
        raise UserError(f"{source}: this is CLIP with a vision transformer, not a ResNet. Use --to open_clip")
    if best is None:
        names = ", ".join(list(plain)[:3])
        raise UserError(f"{source}: no ResNet-18, 34, 50 or 101 of torchvision's names in it; its keys begin {names}")
    head = best.prefix
    if f"{head}attnpool.positional_embedding" in plain or f"{head}conv3.weight" in plain:
        raise UserError(
            f"{source}: this is CLIP's modified ResNet (three stem convolutions, attention pooling), no torchvision "
            "ResNet. Use --to open_clip"
        )
    if best.missing:
        raise UserError(
            f"{source}: too little matches. {best.report}; missing: {', '.join(best.missing[:4])}. Nothing is written, "
            "as the rest would be random"
        )
    if best.surplus:
        raise UserError(
            f"{source}: no ResNet-18, 34, 50 or 101, but a deeper network or one with more layers: "
            f"{len(best.surplus)} tensors of its stages have no place, such as {best.surplus[0]}"
        )
    require_weights(best.state, source=source)
    spoilt = next((key for key, value in best.state.items() if not bool(torch.isfinite(value).all())), None)
    if spoilt is not None:
        raise UserError(f"{source}: {spoilt} holds values that are not finite; fetch or export it again")
    return replace(best, state={key: value.float().contiguous() for key, value in best.state.items()})


_TRUNK = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _numbered(key: str) -> str:
    first, dot, suffix = key.partition(".")
    return f"{_CHILDREN[first]}{dot}{suffix}" if first in _CHILDREN and dot else key


def _match(
    inner: Mapping[str, Tensor], whole: Mapping[str, Tensor], prefix: str, stem: Stem | None
) -> ResNetMatch | None:
    """The ResNet among the tensors under a prefix; None without its first and last stage."""
    first = inner.get("conv1.weight")
    blocks = [len({k.split(".")[1] for k in inner if k.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4)]
    if first is None or first.ndim != 4 or not any(blocks):
        return None
    wide = "layer1.0.conv3.weight" in inner
    same = [d for d, (block, layers) in LAYERS.items() if layers == blocks and (block.expansion == 4) == wide]
    # Not all blocks there: compare with the depth that is nearest, so that the report can say what is missing.
    near = min(
        (d for d, (block, _) in LAYERS.items() if (block.expansion == 4) == wide),
        key=lambda d: sum(abs(a - b) for a, b in zip(LAYERS[d][1], blocks, strict=True)),
    )
    depth = same[0] if same else near
    kernel = first.shape[-1]
    kind: Stem | None = "imagenet" if kernel == 7 else stem
    with torch.device("meta"):
        expected = ResNet(depth=depth, stem=kind or "small").state_dict()
    expected = {k: v for k, v in expected.items() if not k.endswith(COUNTER)}
    matching = {k: inner[k] for k, v in expected.items() if k in inner and inner[k].shape == v.shape}
    if kind is None:
        matching.pop("conv1.weight", None)  # a 3×3 stem of unknown stride is no match
    unused = [k for k in whole if not (k.startswith(prefix) and _numbered(k.removeprefix(prefix)) in matching)]
    return ResNetMatch(
        state=matching,
        depth=depth,
        stem=kind or "small",
        prefix=prefix,
        missing=tuple(k for k in expected if k not in matching),
        surplus=tuple(k for k in inner if k.startswith(_TRUNK) and k not in expected and not k.endswith(COUNTER)),
        unexpected=tuple(k for k in unused if not k.endswith(COUNTER)),
    )
