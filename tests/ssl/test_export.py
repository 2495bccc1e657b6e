# SPDX-License-Identifier: Apache-2.0
"""Handing a backbone over: names, numbers, settings; other people's checkpoints; what is refused."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from pretrain.config_ssl import BackboneConfig
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import alone_in
from pretrain.export import detectron2_network, export, main, read_source
from pretrain.nets.backbones import build_backbone, save_backbone
from pretrain.nets.checkpoints import find_resnet, read_tensors, to_detectron2
from pretrain.nets.same_function import real_pictures, require_same

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and gains, so that a norm that is left out or swapped shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise * 0.5 + 0.5 if name.endswith(("running_var", "weight")) else noise * 0.2 - 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return real_pictures(None, count=2, side=96)


def folder_of(path: Path, **config: Any) -> tuple[Path, nn.Module]:
    section = BackboneConfig(**config)
    torch.manual_seed(1)
    network = randomised(build_backbone(section))
    return save_backbone(path, network, config=section, method="simsiam", size=64, mean=MEAN, std=STD), network


@pytest.mark.parametrize(
    "config",
    [
        {"name": "resnet18", "stem": "small"},
        {"name": "resnet18", "stem": "imagenet"},
        {"name": "resnet50", "stem": "imagenet"},
        {"name": "resnet18", "stem": "small", "norm": "gn_ws"},
        {"name": "torchvision:resnet18"},
    ],
    ids=lambda c: "-".join(c.values()),
)
@pytest.mark.parametrize("to", ["torchvision", "detectron2"])
def test_backbone_export__features_in_the_target_library_are_those_of_the_run(
    tmp_path: Path, pictures: Tensor, config: dict[str, str], to: Any
) -> None:
    folder, network = folder_of(tmp_path / "run", **config)
    settings = export(read_source(str(folder)), to=to, out=tmp_path / "out", pictures=pictures)
    assert settings["largest_difference"] <= 1e-5
    tensors, _ = load_weights(tmp_path / "out" / "model.safetensors")
    assert not any(k.startswith("fc.") or "num_batches" in k for k in tensors)
    # Once more, from what was written, against the run's own network and normalisation.
    pixels = (pictures / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = network(pixels)
        if to == "torchvision" and config["name"] == "resnet50":
            other = resnet50()
            other.fc = nn.Identity()
            assert not other.load_state_dict(tensors, strict=False).unexpected_keys
            got = other.eval()(pixels)
        elif to == "detectron2":
            other = detectron2_network(read_source(str(folder)))
            for value in other.state_dict().values():
                value.zero_()
            other.load_state_dict(tensors, strict=False)
            got = other(pixels)["res5"].mean(dim=(2, 3))
        else:
            return
    assert float((got - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_detectron2_export__keys_build_the_backbone(tmp_path: Path, pictures: Tensor) -> None:
    import yaml
    from detectron2.config import get_cfg

    folder, _ = folder_of(tmp_path / "run", name="resnet50")
    export(read_source(str(folder)), to="detectron2", out=tmp_path / "out", pictures=pictures)
    keys = yaml.safe_load((tmp_path / "out" / "detectron2.yaml").read_text())
    assert keys["INPUT"]["FORMAT"] == "RGB" and keys["MODEL"]["PIXEL_MEAN"] == [127.5, 102.0, 76.5]
    assert keys["MODEL"]["PIXEL_STD"] == [63.75, 51.0, 76.5]
    assert keys["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False and keys["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
    # Detectron2 knows every key, and builds the backbone whose names the file has.
    from detectron2.modeling import build_backbone as build

    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "out" / "detectron2.yaml"))
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.OUT_FEATURES = "BN", ["res5"]
    tensors, _ = load_weights(tmp_path / "out" / "model.safetensors")
    built = build(cfg)
    assert {k for k in built.state_dict() if "num_batches" not in k} == set(tensors)


@pytest.mark.parametrize("norm", ["bn", "gn_ws"])
def test_detectron2_export__names_the_norms_that_train_on(tmp_path: Path, pictures: Tensor, norm: str) -> None:
    import yaml

    folder, _ = folder_of(tmp_path / "run", name="resnet18", stem="small", norm=norm)
    export(read_source(str(folder)), to="detectron2", out=tmp_path / "out", pictures=pictures)
    text = (tmp_path / "out" / "detectron2.yaml").read_text()
    keys = yaml.safe_load(text)
    model = keys["MODEL"]
    assert model["RESNETS"] == {
        "DEPTH": 18, "RES2_OUT_CHANNELS": 64, "STRIDE_IN_1X1": False, "NORM": "SyncBN" if norm == "bn" else "GN",
    }  # fmt: skip
    assert model.get("FPN") == ({"NORM": "SyncBN"} if norm == "bn" else None)
    assert {key for key, value in model.items() if isinstance(value, dict) and "NORM" in value} == (
        {"RESNETS", "FPN"} if norm == "bn" else {"RESNETS"}
    )
    assert keys["TEST"] == {"PRECISE_BN": {"ENABLED": True}}
    assert "stem is 3x3 with stride 2" in text
    assert ("GroupNorm has 16 groups" in text) == (norm == "gn_ws")


def test_backbone_export__a_wrong_conversion_is_noticed_and_nothing_is_written(
    tmp_path: Path, pictures: Tensor
) -> None:
    folder, _ = folder_of(tmp_path / "run", name="resnet18", stem="small")
    source = read_source(str(folder))
    stages = source.network.stages  # type: ignore[operator]
    source.network.stages = lambda x: {k: v + 1e-3 * v.abs().max() for k, v in stages(x).items()}  # type: ignore[assignment]
    for to in ("torchvision", "detectron2"):
        with pytest.raises(UserError, match="Nothing was written"):
            export(source, to=to, out=tmp_path / "out", pictures=pictures)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_require_same__nan_is_a_difference() -> None:
    with pytest.raises(UserError, match="differs"):
        require_same({"a": torch.ones(2)}, {"a": torch.tensor([1.0, float("nan")])}, target="x")


def test_export__cifar_stem_is_refused_for_detectron2(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "run", name="resnet18", stem="cifar")
    with pytest.raises(UserError, match="stride 4"):
        detectron2_network(read_source(str(folder)))


def test_backbone_export__takes_the_image_tower_of_a_clip_folder(tmp_path: Path, pictures: Tensor) -> None:
    from pretrain.nets.encoders import load_encoder
    from tests.clip.test_towers import make

    folder = make().save(tmp_path / "clip")
    settings = export(read_source(str(folder)), to="detectron2", out=tmp_path / "out", pictures=pictures)
    assert settings["stem"] == "small" and settings["largest_difference"] <= 1e-5
    assert load_encoder(folder).image_mean is not None


# ---- checkpoints of official repositories ------------------------------------------------------------------------


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def body() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {k: v for k, v in randomised(resnet18()).state_dict().items() if not k.startswith("fc.")}


def other() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {k: v for k, v in resnet18().state_dict().items() if not k.startswith("fc.")}


HEAD = {"0.weight": torch.ones(4, 4), "2.bias": torch.ones(4)}
CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def numbered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {".".join([CHILDREN[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}


CHECKPOINTS: dict[str, Any] = {
    "moco": lambda: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **prefixed(body(), "module.encoder_q."), **prefixed(HEAD, "module.encoder_q.fc."),
            **prefixed(other(), "module.encoder_k."), "module.queue": torch.ones(4, 8),
        },
    },
    "moco_v3": lambda: {"state_dict": {**prefixed(body(), "module.base_encoder."),
                                       **prefixed(other(), "module.momentum_encoder.")}},
    "simsiam": lambda: {"state_dict": {**prefixed(body(), "module.encoder."), **prefixed(HEAD, "module.predictor.")}},
    "swav": lambda: {**prefixed(body(), "module."), **prefixed(HEAD, "module.projection_head."),
                     "module.prototypes.weight": torch.ones(5, 4)},
    "barlow_twins": lambda: {"epoch": 9, "model": {**prefixed(body(), "module.backbone."),
                                                   **prefixed(HEAD, "module.projector.")}},
    "dino": lambda: {"student": prefixed(other(), "module.backbone."), "epoch": 1, "args": argparse.Namespace(lr=0.1),
                     "teacher": {**prefixed(body(), "backbone."), **prefixed(HEAD, "head.")}},
    "byol": lambda: {"state_dict": {**prefixed(numbered(body()), "online_encoder.net."),
                                    **prefixed(numbered(other()), "target_encoder.net.")}},
    "byol_network": lambda: {"state_dict": {**prefixed(body(), "online_network."),
                                            **prefixed(other(), "target_network.")}},
    "plain": body,
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_official_checkpoints__are_recognised_by_their_keys(tmp_path: Path, name: str) -> None:
    torch.save(CHECKPOINTS[name](), tmp_path / "file.pth")
    found = find_resnet(read_tensors(tmp_path / "file.pth"), source="file.pth")
    assert found.depth == 18 and found.stem == "imagenet" and found.missing == ()
    truth = {k: v for k, v in body().items() if "num_batches" not in k}
    assert set(found.state) == set(truth)
    assert all(torch.equal(found.state[k], v) for k, v in truth.items()), "the trained network, and not its slow copy"
    assert not {k for k in found.unexpected if k.endswith("num_batches_tracked")}
    if name == "swav":
        assert set(found.unexpected) == {"projection_head.0.weight", "projection_head.2.bias", "prototypes.weight"}
        assert "100 tensors matched, 0 missing, 3 left out" in found.report


@pytest.mark.parametrize("drop", ["layer4.1.bn2.running_var", "layer3.", "conv1.weight"])
def test_export__incomplete_checkpoint_is_refused(drop: str) -> None:
    state = {k: v for k, v in body().items() if not k.startswith(drop)}
    with pytest.raises(UserError, match="too little matches|no ResNet"):
        find_resnet(prefixed(state, "module.encoder_q."), source="file.pth")


def test_backbone_export__a_wide_network_is_refused() -> None:
    from torchvision.models import wide_resnet50_2

    with pytest.raises(UserError, match="too little matches"):
        find_resnet(wide_resnet50_2().state_dict(), source="wide.pth")


def test_official_checkpoints__clips_modified_resnet_is_distinguished() -> None:
    state = prefixed(resnet50().state_dict(), "visual.")
    state |= {
        "visual.conv3.weight": torch.ones(64, 32, 3, 3),
        "visual.attnpool.positional_embedding": torch.ones(50, 8),
    }
    state["visual.conv1.weight"] = torch.ones(32, 3, 3, 3)
    with pytest.raises(UserError, match="CLIP's modified ResNet.*--to open_clip"):
        find_resnet(state, source="RN50.pt")


def test_official_checkpoints__a_three_by_three_stem_needs_a_flag(tmp_path: Path) -> None:
    _, network = folder_of(tmp_path / "run", name="resnet18", stem="cifar")
    with pytest.raises(UserError, match="conv1.weight"):
        find_resnet(network.state_dict(), source="file.pth")
    assert find_resnet(network.state_dict(), source="file.pth", stem="cifar").stem == "cifar"


def test_official_checkpoints__one_with_code_in_it_is_not_opened(tmp_path: Path) -> None:
    class Thing:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": body(), "thing": Thing()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="cannot be read as weights only"):
        read_tensors(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "text.pth")


def test_export__keys_are_renamed() -> None:
    one = torch.zeros(1)
    names = ["conv1.weight", "bn1.bias", "layer1.0.conv2.weight", "layer4.2.bn3.running_mean",
             "layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "fc.weight",
             "bn1.num_batches_tracked"]  # fmt: skip
    assert list(to_detectron2(dict.fromkeys(names, one))) == [
        "stem.conv1.weight", "stem.conv1.norm.bias", "res2.0.conv2.weight", "res5.2.conv3.norm.running_mean",
        "res3.0.shortcut.weight", "res3.0.shortcut.norm.bias",
    ]  # fmt: skip


# ---- open_clip and the command ------------------------------------------------------------------------------------


def test_open_clip_export__is_read_back_by_open_clip(tmp_path: Path, pictures: Tensor) -> None:
    import open_clip

    from pretrain.export import export_open_clip
    from pretrain.nets.clip_files import build_open_clip

    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    encoder = build_open_clip({"name": "tiny", "model": model, "mean": [0.5] * 3, "std": [0.25] * 3}).eval()
    settings = export_open_clip(encoder, out=tmp_path / "out", pictures=pictures)
    assert settings["largest_difference"] <= 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        pixels = encoder.prepare(pictures)
        torch.testing.assert_close(again.encode_image(pixels), encoder.encode_image(pixels), rtol=1e-5, atol=1e-6)


def test_backbone_export__the_command_writes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "run" / "exported", name="resnet18", stem="small")
    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), "--to", "torchvision", "--out", str(out)]) == 0
    assert "simsiam, resnet18: ResNet-18, small stem" in capsys.readouterr().out
    settings = json.loads((out / "settings.json").read_text())
    assert settings["mean"] == list(MEAN) and settings["channels"] == "RGB" and settings["stem"] == "small"
    with pytest.raises(UserError, match="not empty"):
        main([str(tmp_path / "run"), "--to", "torchvision", "--out", str(out)])
    with pytest.raises(UserError, match="exported: is a backbone without a text tower"):
        main([str(tmp_path / "run"), "--to", "open_clip", "--out", str(tmp_path / "other")])
    with pytest.raises(UserError, match="neither a backbone nor an encoder folder"):
        main([str(out), "--to", "torchvision", "--out", str(tmp_path / "other")])


def test_export__two_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    folder_of(tmp_path / "run" / "exported", name="resnet18", stem="small")
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="out: another command writes there"):
        main([str(tmp_path / "run"), "--to", "torchvision", "--out", str(tmp_path / "out")])
    assert not any((tmp_path / "out").iterdir())


def test_export__a_failed_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder_of(tmp_path / "run" / "exported", name="resnet18", stem="small")
    monkeypatch.setattr("pretrain.export.write_atomically", full)  # of the last file
    with pytest.raises(UserError, match="out: No space left"):
        main([str(tmp_path / "run"), "--to", "torchvision", "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export__own_towers_are_refused_for_open_clip(tmp_path: Path, pictures: Tensor) -> None:
    from pretrain.export import export_open_clip
    from tests.clip.test_towers import make

    with pytest.raises(UserError, match="towers of its own"):
        export_open_clip(make(), out=tmp_path / "out", pictures=pictures)


def test_export__a_tower_that_neither_library_reads_is_not_sent_from_one_to_the_other(tmp_path: Path) -> None:
    folder = str(Path(__file__).resolve().parents[2] / "weights/clip-photo")
    with pytest.raises(UserError, match="is TimmImage, not a ResNet; use it through pretrain.nets.encoders"):
        main([folder, "--to", "torchvision", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("model", ["seresnet18", "resnetaa50"])
def test_official_checkpoints__a_network_that_only_looks_like_a_resnet_is_refused(tmp_path: Path, model: str) -> None:
    config = BackboneConfig(name=f"timm:{model}")
    save_backbone(
        tmp_path / "it", build_backbone(config), config=config, method="x", size=64, mean=[0.5] * 3, std=[0.2] * 3
    )
    with pytest.raises(UserError, match="not a plain ResNet|differs from the source|of its stages have no place"):
        read_source(tmp_path / "it")
