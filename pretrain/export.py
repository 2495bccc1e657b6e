# SPDX-License-Identifier: Apache-2.0
"""``python -m pretrain.export SOURCE --to torchvision|detectron2|open_clip --out FOLDER``: export a backbone to another
library.

SOURCE is the ``exported/`` folder of a run of pretrain.train, an encoder folder (CLIP), or a checkpoint of an official
repository (MoCo, SwAV, SimSiam, Barlow Twins, BYOL ports, DINO, CLIP; ``open_clip:MODEL:WEIGHTS`` for open_clip's
models). Heads are dropped.

FOLDER gets ``model.safetensors`` under the target's names and ``settings.json`` with what the target needs to know
(pixel mean and std, channel order, stem, norm). For Detectron2 there is ``detectron2.yaml`` too.

Before anything is written the target library's own network is built, loaded, and compared with the source on real
pictures: a feature that differs by more than 1e-5 of the largest, or a tensor that has no place, ends the export with
status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import EXPORTED, alone_in, whole_folder, write_atomically
from pretrain.nets.same_function import real_pictures, require_same, require_same_function

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pretrain.nets.checkpoints import Stem
    from pretrain.nets.resnet import ResNet
    from pretrain.nets.towers import JointEncoder

Target = Literal["torchvision", "detectron2", "open_clip"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, used by all official codes


@dataclass(kw_only=True)
class ResNetSource:
    """A ResNet to export.

    Attributes:
        network: in eval mode; has `stages` (pretrain.nets.resnet.ResNet).
        depth, stem: of the network.
        groups: groups of its group norms by channels; None with batch norm.
        mean, std: RGB in [0, 1], what its input is normalised with.
        report: where it was found.
    """

    network: nn.Module
    depth: int
    stem: Stem
    groups: Callable[[int], int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    report: str

    @property
    def state(self) -> dict[str, Tensor]:
        """Torchvision's names, without counters."""
        return {k: v for k, v in self.network.state_dict().items() if not k.endswith("num_batches_tracked")}


class ExportSettings(TypedDict, total=False):
    """``settings.json`` of an export; ``largest_difference`` is that of `require_same`."""

    format: str
    depth: int
    stem: Stem
    norm: str
    channels: str
    source: str
    largest_difference: float
    mean: list[float]
    std: list[float]
    pixels: str
    yaml: str


def read_source(spec: str, *, stem: Stem | None = None) -> ResNetSource:
    """A ResNet from a backbone folder, an encoder folder or a checkpoint file.

    Raises:
        UserError: no ResNet of torchvision's kind is there, whole.
    """
    from pretrain.nets.checkpoints import find_resnet, read_tensors
    from pretrain.nets.resnet import ResNet

    path = _handed_over(spec)
    if path.is_dir():
        return _read_folder(path)
    match = find_resnet(read_tensors(path), source=spec, stem=stem)
    network = ResNet(depth=match.depth, stem=match.stem)
    network.load_state_dict(match.state, strict=False)  # all there: find_resnet refuses anything less
    return ResNetSource(network=network.eval(), depth=match.depth, stem=match.stem, groups=None, mean=IMAGENET_MEAN,
                  std=IMAGENET_STD, report=match.report)  # fmt: skip


def _handed_over(spec: str) -> Path:
    """The path, or of a run's folder what it exported."""
    path = Path(spec)
    return path / EXPORTED if not (path / "config.json").exists() and (path / EXPORTED).is_dir() else path


def _read_folder(folder: Path) -> ResNetSource:
    from torch import nn

    from pretrain.config_ssl import BackboneConfig
    from pretrain.nets.backbones import FORMAT, Pooled, load_backbone
    from pretrain.nets.encoders import load_encoder
    from pretrain.nets.resnet import ResNet
    from pretrain.nets.standardised import folded
    from pretrain.nets.towers import ResNetImage

    stem: Stem
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{folder}: neither a backbone nor an encoder folder (config.json: {problem})") from problem
    if kind == FORMAT:
        network, info = load_backbone(folder)
        config = BackboneConfig.model_validate(info["backbone"])
        mean, std, name = tuple(info["mean"]), tuple(info["std"]), f"{info['method']}, {config.name}"
        stem = config.stem
    else:
        encoder = load_encoder(folder)
        if not isinstance(encoder.visual, ResNetImage):
            use = (
                "--to open_clip" if "open_clip" in encoder.config else "it through pretrain.nets.encoders.load_encoder"
            )
            raise UserError(f"{folder}: its image tower is {type(encoder.visual).__name__}, not a ResNet; use {use}")
        network, name = encoder.visual.backbone, f"image tower of {folder.name}"
        mean, std = encoder.image_mean, encoder.image_std
        by_stem: dict[Any, Stem] = {((7, 7), (2, 2)): "imagenet", ((3, 3), (2, 2)): "small", ((3, 3), (1, 1)): "cifar"}
        stem = by_stem[network.conv1.kernel_size, network.conv1.stride]
    inner = network.network if isinstance(network, Pooled) else network
    if not {"conv1", "layer4"} <= dict(inner.named_children()).keys():
        raise UserError(f"{folder}: {name} is not a ResNet of torchvision's names and has no counterpart in the target")
    if not isinstance(inner, ResNet):
        state, stem = inner.state_dict(), "imagenet"
        from pretrain.nets.checkpoints import find_resnet

        match = find_resnet(state, source=str(folder))
        if match.unexpected:
            raise UserError(
                f"{folder}: {name} is not a plain ResNet ({match.report}) and has no counterpart in the target"
            )
        original = inner
        inner = ResNet(depth=match.depth, stem="imagenet")
        inner.load_state_dict(match.state, strict=False)
        require_same_function(original, inner, name=name)
    plain = cast("ResNet", folded(inner).eval())
    norms = [m for m in plain.modules() if isinstance(m, nn.GroupNorm)]
    by_channels = {m.num_channels: m.num_groups for m in norms}
    depth = _depth_of(plain)
    return ResNetSource(network=plain, depth=depth, stem=stem, groups=by_channels.__getitem__ if norms else None,
                  mean=mean, std=std, report=f"{name}: ResNet-{depth}, {stem} stem")  # fmt: skip


def _depth_of(network: ResNet) -> int:
    from pretrain.nets.resnet import LAYERS

    layers = [len(stage) for stage in (network.layer1, network.layer2, network.layer3, network.layer4)]
    return next(d for d, (block, counts) in LAYERS.items() if counts == layers and isinstance(network.layer1[0], block))


def torchvision_network(source: ResNetSource) -> nn.Module:
    """Torchvision's own ResNet with the source's tensors; returns pooled features."""
    from torch import nn
    from torchvision.models import get_model

    from pretrain.engine.state import load_tensors

    norm = {"norm_layer": _group_norm(source)} if source.groups else {}
    network = get_model(f"resnet{source.depth}", weights=None, **norm)
    network.fc = nn.Identity()
    if source.stem != "imagenet":
        network.conv1 = nn.Conv2d(3, 64, 3, stride=2 if source.stem == "small" else 1, padding=1, bias=False)
    if source.stem == "cifar":
        network.maxpool = nn.Identity()
    load_tensors(network, source.state, source=f"torchvision's ResNet-{source.depth}: {source.report}")
    return network.eval()


def detectron2_network(source: ResNetSource) -> nn.Module:
    """Detectron2's own ResNet with the source's tensors; returns ``res2`` … ``res5``.

    Raises:
        UserError: Detectron2 is not installed, or the network has no counterpart (a stem without stride 4).
    """
    if source.stem == "cifar":
        raise UserError(
            "a cifar stem has stride 1; Detectron2's ResNets begin with stride 4. Pretrain with stem: small or imagenet"
        )
    try:
        from detectron2.layers import Conv2d, get_norm
        from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
    except ImportError as problem:
        raise UserError(
            "--to detectron2 compares with Detectron2, which is not installed; see docs/guide/install.md"
        ) from problem
    from pretrain.engine.state import load_tensors
    from pretrain.nets.checkpoints import to_detectron2
    from pretrain.nets.resnet import LAYERS

    norm: Any = _group_norm(source) if source.groups else "BN"
    stem = BasicStem(3, 64, norm=norm)
    if source.stem == "small":
        stem.conv1 = Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False, norm=get_norm(norm, 64))
    stages, channels = [], 64
    block, layers = LAYERS[source.depth]
    for index, blocks in enumerate(layers):
        width, strides = 64 * 2**index, [1 if index == 0 else 2] + [1] * (blocks - 1)
        wide = block.expansion == 4
        kind = BottleneckBlock if wide else BasicBlock
        more = {"bottleneck_channels": width, "stride_in_1x1": False} if wide else {}
        stages.append(
            ResNet.make_stage(kind, blocks, in_channels=channels, out_channels=width * block.expansion,
                              stride_per_block=strides, norm=norm, **more)
        )  # fmt: skip
        channels = width * block.expansion
    network = ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"])
    load_tensors(network, to_detectron2(source.state), source=f"Detectron2's ResNet-{source.depth}: {source.report}")
    return network.eval()


def _group_norm(source: ResNetSource) -> Callable[[int], nn.Module]:
    from torch import nn

    groups = source.groups
    assert groups is not None
    return lambda channels: nn.GroupNorm(groups(channels), channels)


def export(
    source: ResNetSource, *, to: Literal["torchvision", "detectron2"], out: Path, pictures: Tensor
) -> ExportSettings:
    """Build the target network, compare, write; returns the settings written.

    Args:
        source: from `read_source`.
        to: the target library.
        out: folder to write.
        pictures: (N, 3, H, W) uint8 that the networks are compared on.

    Raises:
        UserError: the target's network says something else than the source; nothing is written then.
    """
    import torch

    from pretrain.engine.checkpoint import save_weights
    from pretrain.nets.checkpoints import to_detectron2

    network = torchvision_network(source) if to == "torchvision" else detectron2_network(source)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.mean, source.std))
    with torch.no_grad():
        expected = cast(Any, source.network).stages((pictures / 255 - mean) / std)
        if to == "torchvision":
            pooled = network((pictures / 255 - mean) / std)
            worst = require_same({"pooled": expected["layer4"].mean(dim=(2, 3))}, {"pooled": pooled}, target=to)
        else:
            # Detectron2 subtracts and divides pixels in 0…255.
            exported = network((pictures.float() - 255 * mean) / (255 * std))
            worst = require_same({f"res{n + 1}": expected[f"layer{n}"] for n in (1, 2, 3, 4)}, exported, target=to)
    settings: ExportSettings = {
        "format": f"export-{to}/1",
        "depth": source.depth,
        "stem": source.stem,
        "norm": "BN" if source.groups is None else "GN, groups: " + str(source.groups(64)),
        "channels": "RGB",
        "source": source.report,
        "largest_difference": worst,
    }
    if to == "torchvision":
        state = source.state
        settings["mean"], settings["std"], settings["pixels"] = list(source.mean), list(source.std), "0 to 1"
    else:
        state = to_detectron2(source.state)
        settings["pixels"], settings["yaml"] = "0 to 255", "detectron2.yaml"
    out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous() for k, v in state.items()}
    save_weights(out / "model.safetensors", tensors, {"format": settings["format"]})
    if to == "detectron2":
        write_atomically(out / "detectron2.yaml", detectron2_yaml(source).encode())
    write_atomically(out / "settings.json", (json.dumps(settings, indent=2) + "\n").encode())
    return settings


def detectron2_yaml(source: ResNetSource) -> str:
    """The keys of Detectron2's configuration that this backbone needs, with the reason of each."""
    mean, std = ([round(255 * v, 4) for v in values] for values in (source.mean, source.std))
    norm = "SyncBN" if source.groups is None else "GN"
    lines = [
        "# Trained with RGB pictures; Detectron2's own default is BGR.",
        "INPUT:",
        "  FORMAT: RGB",
        "MODEL:",
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {source.depth}",
        *(["    RES2_OUT_CHANNELS: 64"] if source.depth < 50 else []),
        "    STRIDE_IN_1X1: false  # torchvision's place of the stride: the 3x3 convolution",
        f"    NORM: {norm}  # trains on; FrozenBN with self-supervised statistics loses 1 to 2 AP",
        "  BACKBONE:",
        "    FREEZE_AT: 0  # self-supervised low layers are not ImageNet's: let them learn",
        *(["  FPN:", "    NORM: SyncBN"] if source.groups is None else []),
        "TEST:",
        "  PRECISE_BN:",
        "    ENABLED: true",
    ]
    if source.stem == "small":
        lines.insert(
            0, "# The stem is 3x3 with stride 2, not Detectron2's 7x7: set stem.conv1 in code (docs/guide/export.md)."
        )
    if source.groups is not None:
        lines.insert(0, f"# GroupNorm has {source.groups(64)} groups, Detectron2's GN 32: give `norm` as a callable.")
    return "\n".join(lines) + "\n"


def export_open_clip(encoder: JointEncoder, *, out: Path, pictures: Tensor) -> ExportSettings:
    """Write an encoder that has open_clip's architecture as a folder that open_clip reads (``local-dir:FOLDER``).

    Raises:
        UserError: an encoder of another architecture, or open_clip reads something else from the folder.
    """
    import shutil

    import open_clip
    import torch

    from pretrain.engine.checkpoint import save_weights

    config = encoder.config.get("open_clip")
    if config is None:
        raise UserError(
            "only encoders with open_clip's architecture can be read by open_clip; this one has towers of its own. "
            "Use it through pretrain.nets.encoders.load_encoder, or export its ResNet --to torchvision or detectron2"
        )
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    save_weights(partial / "open_clip_model.safetensors", tensors, {"format": "pt"})
    record = {
        "model_cfg": {**config["model"], "custom_text": True},
        "preprocess_cfg": {"mean": list(config["mean"]), "std": list(config["std"])},
    }
    write_atomically(partial / "open_clip_config.json", (json.dumps(record, indent=2) + "\n").encode())
    try:
        other = open_clip.create_model(f"local-dir:{partial.resolve()}").eval()
        with torch.no_grad():
            pixels = encoder.prepare(pictures)
            tokens = encoder.tokenize(["a dog", "a drawing of a red mug"])
            expected = {"image": encoder.encode_image(pixels), "text": encoder.encode_text(tokens)}
            exported = {"image": other.encode_image(pixels), "text": other.encode_text(tokens)}
        worst = require_same(expected, exported, target="open_clip")
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"format": "export-open_clip/1", "largest_difference": worst}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    flags = argparse.ArgumentParser(
        prog="python -m pretrain.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("source", help="folder of a run, encoder folder, checkpoint file, or open_clip:MODEL:WEIGHTS")
    flags.add_argument("--to", required=True, choices=("torchvision", "detectron2", "open_clip"))
    flags.add_argument("--out", required=True, type=Path, help="folder to write; must be new or empty")
    flags.add_argument("--pictures", type=Path, help="pictures to compare the networks on (default: Sticker Scenes)")
    flags.add_argument("--stem", choices=("small", "cifar"), help="what a foreign checkpoint's 3x3 stem is")
    return flags


def _export(options: argparse.Namespace, out: Path) -> ExportSettings:
    pictures = real_pictures(options.pictures)
    if options.to == "open_clip":
        from pretrain.nets.encoders import read_encoder

        named = options.source.startswith("open_clip:")
        encoder, report = read_encoder(options.source if named else _handed_over(options.source))
        print(report)
        return export_open_clip(encoder, out=out, pictures=pictures)
    if options.source.startswith("open_clip:"):
        raise UserError(f"{options.source}: open_clip's image towers are not torchvision ResNets; use --to open_clip")
    source = read_source(options.source, stem=options.stem)
    print(source.report)
    return export(source, to=options.to, out=out, pictures=pictures)


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(argv)
    new = not options.out.exists()
    try:
        if not new and not options.out.is_dir():
            raise UserError(f"--out {options.out}: is a file; give a new folder")
        with alone_in(options.out):
            if any(options.out.iterdir()):
                raise UserError(f"--out {options.out}: exists and is not empty; give a new folder")
            with whole_folder(options.out) as folder:
                settings = _export(options, folder)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                options.out.rmdir()
        raise
    print(f"written to {options.out}; largest relative feature difference {settings['largest_difference']:.1e}")
    return 0


if __name__ == "__main__":
    run_cli(main)
