# SPDX-License-Identifier: Apache-2.0
"""Other people's CLIP models as our encoders: open_clip's by name, and checkpoint files recognised by their keys.

A file holds no picture of its network, so the sizes are read from the shapes of its tensors. What no shape tells is the
activation: the authors' own files carry three numbers beside the weights (`input_resolution`, `context_length`,
`vocab_size`) and have QuickGELU; any other file could have either, and has to be named with its model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.engine.state import load_tensors
from pretrain.nets.checkpoints import read_tensors
from pretrain.nets.towers import ClipTokenizer, JointEncoder, Tokenize

OLD_TEXT = re.compile(r"^(text_projection|positional_embedding|token_embedding|transformer|ln_final)(?=$|\.)")
AUTHORS = ("input_resolution", "context_length", "vocab_size")  # numbers in the authors' files, no weights
HEAD_WIDTH = 64  # channels of an attention head in every published CLIP (arXiv:2103.00020, tables 19 and 20)
RESNET_STRIDE = 32  # of CLIP's ResNets before the attention pooling


def load_clip_file(path: Path) -> tuple[JointEncoder, str]:
    """A CLIP model from a file of its authors, and a report.

    Raises:
        UserError: It is no CLIP, something of it is missing, or its activation is not known.
    """
    tensors = {key.removeprefix("module."): value for key, value in read_tensors(path).items()}
    model = clip_architecture(tensors, source=str(path))
    if not set(AUTHORS) <= set(tensors):
        raise UserError(
            f"{path}: a CLIP model, but nothing in it tells which activation it was trained with. Name its model: "
            f"open_clip:ViT-B-32:{path}, or open_clip:ViT-B-32-quickgelu:{path} (or whichever it is)"
        )
    import open_clip

    settings = {
        "name": path.stem, "model": {**model, "quick_gelu": True},
        "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
    }  # fmt: skip
    return _filled(build_open_clip(settings), tensors, path)


def clip_architecture(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP model, read from the names and shapes of its tensors.

    Args:
        tensors: Under the authors' names (`visual.…`, `transformer.…`, `token_embedding.weight`).
        source: For messages.

    Raises:
        UserError: The tensors are not those of a CLIP model with a ViT or with CLIP's own ResNet.
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
            f"{source}: no CLIP model of its authors' names (no {missing[0] if missing else 'visual.proj'}); its keys "
            f"begin {', '.join(list(tensors)[:3])}. For another model of open_clip's: open_clip:MODEL:{source}"
        )
    ranks = {"visual.conv1.weight": 4, "text_projection": 2, "positional_embedding": 2, "token_embedding.weight": 2}
    odd = next((name for name, rank in ranks.items() if tensors[name].ndim != rank), None)
    width = len(tensors["ln_final.weight"])
    widths = [width, *([len(tensors["visual.conv1.weight"])] if vit else [])]
    if odd or any(value % HEAD_WIDTH or not value for value in widths):
        why = f"{odd} has {tensors[odd].ndim} axes" if odd else f"widths {widths} are no multiples of {HEAD_WIDTH}"
        raise UserError(
            f"{source}: not as CLIP's authors publish it ({why}); name its model: open_clip:MODEL.json:{source}"
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


def build_open_clip(settings: Mapping[str, Any]) -> JointEncoder:
    """From open_clip's own configuration: `{"name", "model": {embed_dim, vision_cfg, text_cfg}, "mean", "std"}`."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    model_config = {k: v for k, v in settings["model"].items() if k not in ("custom_text",)}
    name = settings["name"]
    if "multimodal_cfg" in model_config:
        raise UserError(f"open_clip:{name}: captioning models (CoCa) are not supported; choose a CLIP model")
    hf_name = model_config.get("text_cfg", {}).get("hf_tokenizer_name") or model_config.get("text_cfg", {}).get(
        "hf_model_name"
    )
    try:
        model = CustomTextCLIP(**model_config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise UserError(f"open_clip:{name}: the model configuration does not build: {error}") from error
    tokenizer: Tokenize
    if hf_name is None:
        tokenizer = ClipTokenizer(model.context_length)
    else:
        tokenizer = open_clip.get_tokenizer(name)
    size = model.visual.image_size
    encoder = JointEncoder(
        visual=model.visual,
        text=model.text,
        tokenizer=tokenizer,
        embed_dim=model_config["embed_dim"],
        image_size=size if isinstance(size, int) else size[0],
        image_mean=tuple(settings["mean"]),
        image_std=tuple(settings["std"]),
        config={"open_clip": dict(settings)},
    )
    return encoder


def load_open_clip(rest: str) -> tuple[JointEncoder, str]:
    """`MODEL:WEIGHTS` (see `load_encoder`), and a report.

    Raises:
        UserError: No such model or weights, or they do not fit each other.
    """
    import open_clip

    name, _, weights = rest.partition(":")
    if name.endswith(".json"):
        model_config = read_json(name, hint="open_clip:MODEL.json:WEIGHTS needs the model's configuration")
        if not isinstance(model_config, dict):
            raise UserError(f"{name}: no configuration of open_clip's, which is a table with vision_cfg and text_cfg")
        model_config = model_config.get("model_cfg", model_config)
        tags: list[str] = []
    else:
        model_config = open_clip.get_model_config(name)
        if model_config is None:
            import difflib

            near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"open_clip has no model {name!r}{hint}")
        tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise UserError(f"open_clip:{name} names no weights: add :TAG ({', '.join(tags) or 'none known'}) or :FILE")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    path = Path(weights)
    if path.suffix in (".safetensors", ".pt", ".bin", ".pth") or path.exists():
        if not path.is_file():
            raise UserError(f"no weights file at {path}")
    elif weights in tags:
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg

        pretrained = get_pretrained_cfg(name, weights)
        mean, std = pretrained.get("mean") or mean, pretrained.get("std") or std
        model_for_file = name
        if pretrained.get("quick_gelu"):  # openai's weights were trained with it; open_clip's plain names are not
            model_config["quick_gelu"] = True
            model_for_file = f"{name.removesuffix('-quickgelu')}-quickgelu"  # a file does not say
        try:
            path = Path(download_pretrained(pretrained))
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the weights {name}:{weights} could not be fetched ({error}). Fetch the file on another machine and "
                f"name it: open_clip:{model_for_file}:FILE"
            ) from error
    else:
        raise UserError(
            f"open_clip has no weights {weights!r} for {name}; known: {', '.join(tags) or 'none'}; or name a file"
        )
    encoder = build_open_clip({"name": name, "model": model_config, "mean": list(mean), "std": list(std)})
    return _filled(encoder, read_tensors(path), path)


def _filled(encoder: JointEncoder, tensors: Mapping[str, Tensor], path: Path) -> tuple[JointEncoder, str]:
    """The encoder with a checkpoint's tensors in eval mode, and a report; all of it or nothing."""
    expected = encoder.state_dict()
    named, left = {}, []
    for key, value in tensors.items():
        name = OLD_TEXT.sub(r"text.\1", key.removeprefix("module."))
        if name in (*AUTHORS, "logit_bias") or (name.endswith("position_ids") and name not in expected):
            left.append(name)  # no weights
        else:
            named[name] = value.reshape(()) if name == "logit_scale" else value
    load_tensors(encoder, named, source=path)
    beside = f" ({', '.join(left)})" if left else ""
    report = f"CLIP, {encoder.image_size} pixels, {encoder.embed_dim} wide: {len(named)} tensors matched, 0 missing, "
    return encoder.eval(), f"{report}{len(left)} left out{beside}"
