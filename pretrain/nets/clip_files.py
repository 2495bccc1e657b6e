# SPDX-License-Identifier: Apache-2.0
"""Public CLIP models as encoders: open_clip's by name, and checkpoint files recognised by their keys.

A file does not describe its network, so the sizes are read from the shapes of its tensors. The one thing they do not
show is the activation: the authors' own files carry three numbers beside the weights (`input_resolution`,
`context_length`, `vocab_size`) and have QuickGELU; any other file could have either, and has to be named with its
model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from pretrain.engine.errors import UserError, did_you_mean, nearest
from pretrain.engine.files import read_json
from pretrain.engine.state import load_tensors
from pretrain.nets.checkpoints import read_tensors
from pretrain.nets.clip_fetch import fetch_weights, hub_tokenizer
from pretrain.nets.open_clip_texts import ShortTextEncoder
from pretrain.nets.towers import ClipTokenizer, JointEncoder, Tokenize

OLD_TEXT = re.compile(r"^(text_projection|positional_embedding|token_embedding|transformer|ln_final)(?=$|\.)")
AUTHORS = ("input_resolution", "context_length", "vocab_size")  # numbers in the authors' files, no weights
HEAD_WIDTH = 64  # channels of an attention head in every published CLIP (arXiv:2103.00020, tables 19 and 20)
RESNET_STRIDE = 32  # of CLIP's ResNets before the attention pooling


def load_clip_file(path: Path) -> tuple[JointEncoder, str]:
    """A CLIP model from a file of its authors, and a report.

    Raises:
        UserError: it is no CLIP, something of it is missing, or its activation is not known.
    """
    tensors = {key.removeprefix("module."): value for key, value in read_tensors(path).items()}
    model = clip_architecture(tensors, source=str(path))
    if not set(AUTHORS) <= set(tensors):
        raise UserError(
            f"{path}: a CLIP model, but it does not say which activation it was trained with. Give its model: "
            f"open_clip:ViT-B-32:{path}, or open_clip:ViT-B-32-quickgelu:{path} (or whichever applies)"
        )
    import open_clip

    settings: OpenClipSettings = {
        "name": path.stem, "model": {**model, "quick_gelu": True},
        "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
    }  # fmt: skip
    return _filled(build_open_clip(settings), tensors, path)


def clip_architecture(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP model, read from the names and shapes of its tensors.

    Args:
        tensors: under the authors' names (`visual.…`, `transformer.…`, `token_embedding.weight`).
        source: for messages.

    Raises:
        UserError: the tensors are not those of a CLIP model with a ViT or with CLIP's own ResNet.
    """
    vit, resnet = "visual.proj" in tensors, "visual.attnpool.positional_embedding" in tensors
    needed = [
        "text_projection",
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.weight",
        "visual.conv1.weight",
    ]
    needed.append("visual.positional_embedding" if vit else "visual.layer1.0.conv1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing or vit == resnet:
        raise UserError(
            f"{source}: no CLIP model with the names of the original release (no "
            f"{missing[0] if missing else 'visual.proj'}); its keys begin {', '.join(list(tensors)[:3])}. "
            f"For another model of open_clip's: open_clip:MODEL:{source}"
        )
    ranks = {"visual.conv1.weight": 4, "text_projection": 2, "positional_embedding": 2, "token_embedding.weight": 2}
    odd = next((name for name, rank in ranks.items() if tensors[name].ndim != rank), None)
    width = len(tensors["ln_final.weight"])
    widths = [width, *([len(tensors["visual.conv1.weight"])] if vit else [])]
    if odd or any(value % HEAD_WIDTH or not value for value in widths):
        why = f"{odd} has {tensors[odd].ndim} axes" if odd else f"widths {widths} are not multiples of {HEAD_WIDTH}"
        raise UserError(
            f"{source}: not in the layout of the original release ({why}); name its model: "
            f"open_clip:MODEL.json:{source}"
        )
    image: dict[str, Any]
    if vit:
        wide, _, _, patch = tensors["visual.conv1.weight"].shape
        grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
        image = {"layers": _blocks(tensors, "visual.transformer.resblocks."), "width": wide,
                 "patch_size": patch, "image_size": patch * grid}  # fmt: skip
    else:
        grid = round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        image = {"layers": [_blocks(tensors, f"visual.layer{n}.") for n in (1, 2, 3, 4)],
                 "width": len(tensors["visual.layer1.0.conv1.weight"]), "patch_size": None,
                 "image_size": RESNET_STRIDE * grid}  # fmt: skip
    text = {
        "context_length": len(tensors["positional_embedding"]), "vocab_size": len(tensors["token_embedding.weight"]),
        "width": width, "heads": width // HEAD_WIDTH, "layers": _blocks(tensors, "transformer.resblocks."),
    }  # fmt: skip
    return {"embed_dim": tensors["text_projection"].shape[1], "vision_cfg": image, "text_cfg": text}


def _blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


class OpenClipSettings(TypedDict):
    """A model of open_clip's.

    Attributes:
        name: its own, or that of the file.
        model: open_clip's configuration: embed_dim, vision_cfg, text_cfg.
        mean, std: of RGB in [0, 1].
    """

    name: str
    model: dict[str, Any]
    mean: list[float]
    std: list[float]


def build_open_clip(settings: OpenClipSettings, *, folder: Path | None = None) -> JointEncoder:
    """An encoder of open_clip's architecture.

    Args:
        settings: what it is.
        folder: folder of the weights, which may hold the tokenizer's files.

    Raises:
        UserError: it does not build, or its tokenizer cannot be had.
    """
    from open_clip.model import CustomTextCLIP

    model_config = {k: v for k, v in settings["model"].items() if k not in ("custom_text",)}
    name = settings["name"]
    if "multimodal_cfg" in model_config:
        raise UserError(f"open_clip:{name}: captioning models (CoCa) are not supported; choose a CLIP model")
    text = model_config.get("text_cfg", {})
    try:
        model = CustomTextCLIP(**model_config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise UserError(f"open_clip:{name}: the model configuration does not build: {error}") from error
    size, mean, std = model.visual.image_size, settings["mean"], settings["std"]
    return ShortTextEncoder(
        visual=model.visual,
        text=model.text,
        tokenizer=tokenizer_of(text, name=name, folder=folder),
        embed_dim=model_config["embed_dim"],
        image_size=size if isinstance(size, int) else size[0],
        image_mean=(mean[0], mean[1], mean[2]),
        image_std=(std[0], std[1], std[2]),
        config={"open_clip": dict(settings)},
    )


def tokenizer_of(text: Mapping[str, Any], *, name: str, folder: Path | None) -> Tokenize:
    """CLIP's tokenizer, or the one that a model's ``text_cfg`` names at the hub.

    Raises:
        UserError: see `hub_tokenizer`.
    """
    length = int(text.get("context_length", 77))
    if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        return hub_tokenizer(text, name=name, folder=folder, context_length=length)
    return ClipTokenizer(length)


def load_open_clip(spec: str) -> tuple[JointEncoder, str]:
    """`MODEL:WEIGHTS` (see `load_encoder`), and a report.

    Raises:
        UserError: no such model or weights, or they do not fit each other.
    """
    settings, path = find_open_clip(spec)
    return _filled(build_open_clip(settings, folder=path.parent), read_tensors(path), path)


def find_open_clip(spec: str) -> tuple[OpenClipSettings, Path]:
    """Settings of `build_open_clip` for `MODEL:WEIGHTS`, and the file of weights, downloaded where a tag names it.

    Raises:
        UserError: no such model, tag or file, or it cannot be fetched.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name, _, weights = spec.partition(":")
    published: Mapping[str, Any] = {}
    if name.endswith(".json"):
        model_config, published = _read_configuration(name)
        tags: list[str] = []
    else:
        model_config = open_clip.get_model_config(name)
        if model_config is None:
            hint = ", ".join(nearest(name, open_clip.list_models()))
            raise UserError(f"open_clip has no model {name!r}" + (f"; did you mean {hint}?" if hint else ""))
        tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise UserError(f"open_clip:{name} names no weights: add :TAG ({', '.join(tags) or 'none known'}) or :FILE")
    path = Path(weights)
    if path.suffix in (".safetensors", ".pt", ".bin", ".pth") or path.exists():
        if not path.is_file():
            raise UserError(f"no weights file at {path}")
        published = published or _statistics_of([get_pretrained_cfg(name, tag) for tag in tags])
    elif weights in tags:
        published = get_pretrained_cfg(name, weights)
        model_for_file = name
        if published.get("quick_gelu"):  # openai's weights were trained with it; open_clip's plain names are not
            model_config["quick_gelu"] = True
            model_for_file = f"{name.removesuffix('-quickgelu')}-quickgelu"  # a file does not say
        path = fetch_weights(published, name=f"open_clip:{spec}", instead=f"open_clip:{model_for_file}:FILE")
    else:
        hint = did_you_mean(weights, tags)
        raise UserError(
            f"open_clip has no weights {weights!r} for {name}{hint}; known: {', '.join(tags) or 'none'}; or name a file"
        )
    mean = published.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = published.get("std") or open_clip.OPENAI_DATASET_STD
    return {"name": name, "model": model_config, "mean": list(mean), "std": list(std)}, path


def _read_configuration(name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(model, preprocessing) of a configuration file, such as the `open_clip_config.json` beside a model."""
    content = read_json(name, hint="open_clip:MODEL.json:WEIGHTS needs the model's configuration")
    if not isinstance(content, dict):
        raise UserError(f"{name}: no configuration of open_clip's, which is a table with vision_cfg and text_cfg")
    published = content.get("preprocess_cfg")
    return content.get("model_cfg", content), published if isinstance(published, dict) else {}


def _statistics_of(published: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Pixel statistics of a model's published weights, where all of them agree (SigLIP's: .5).

    A file does not say which of them it is.
    """
    statistics = {(tuple(config.get("mean") or ()), tuple(config.get("std") or ())) for config in published}
    return published[0] if len(statistics) == 1 else {}


def _filled(encoder: JointEncoder, tensors: Mapping[str, Tensor], path: Path) -> tuple[JointEncoder, str]:
    """The encoder with a checkpoint's tensors in eval mode, and a report; all of it or nothing."""
    expected = encoder.state_dict()
    named, unread = {}, []
    for key, value in tensors.items():
        name = OLD_TEXT.sub(r"text.\1", key.removeprefix("module."))
        if name in (*AUTHORS, "logit_bias") or (name.endswith("position_ids") and name not in expected):
            unread.append(name)  # no weights
        else:
            named[name] = value.reshape(()) if name == "logit_scale" else value
    load_tensors(encoder, named, source=path)
    listed = f" ({', '.join(unread)})" if unread else ""
    report = f"CLIP, {encoder.image_size} pixels, {encoder.embed_dim} wide: {len(named)} tensors matched, 0 missing, "
    return encoder.eval(), f"{report}{len(unread)} left out{listed}"
