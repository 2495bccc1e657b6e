# SPDX-License-Identifier: Apache-2.0
"""Image tower, text tower, the joint encoder they make and its folder; open_clip models behind the same interface.

Shapes: `N` images or texts, `T` tokens, `S` side of the input picture, `D` joint embedding.

    encoder = load_encoder("weights/clip-sticker")              # a folder written by JointEncoder.save
    encoder = load_encoder("open_clip:ViT-B-32:openai")         # open_clip's name and tag (it downloads once)
    encoder = load_encoder("open_clip:ViT-B-32:clip.safetensors")
    image_ND = encoder.encode_image(encoder.prepare(images_uint8))
    text_ND = encoder.encode_text(encoder.tokenize(["a dog", "a cat"]))

open_clip is imported where it is used only: a ResNet with a bag of words needs nothing of it but the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import CbowTower, EncoderConfig, ResNetTower, TransformerTower, ViTTower
from pretrain.engine.checkpoint import load_weights, save_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json
from pretrain.nets.resnet import ResNet

FORMAT = "joint-encoder/1"
VOCABULARY = 49408  # CLIP's byte-pair vocabulary (open_clip.tokenizer.SimpleTokenizer)
START, END = VOCABULARY - 2, VOCABULARY - 1
TEMPERATURE_START = math.log(1 / 0.07)  # CLIP §2.5
TEMPERATURE_LIMIT = math.log(100)  # CLIP §2.5: "prevent scaling the logits by more than 100"

Tokenize = Callable[[Sequence[str]], Tensor]


class ResNetImage(nn.Module):
    """ResNet, average pool, linear projection: (N, 3, S, S) -> (N, D)."""

    def __init__(self, *, tower: ResNetTower, embed_dim: int) -> None:
        super().__init__()
        self.backbone = ResNet(depth=tower.depth, stem=tower.stem)
        self.proj = nn.Linear(self.backbone.width, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.backbone.width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(self.backbone(pixels))


class CbowText(nn.Module):
    """Mean of the token embeddings, then one hidden layer: (N, T) -> (N, D). The order of the tokens plays no part.

    The length of a token's embedding is its weight in the mean, so words like "a" and "photo" can learn to say nothing.
    Padding, start and end of text are not counted; a text without any token gives the embedding of the empty bag.
    """

    def __init__(self, *, tower: CbowTower, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, tower.width)
        self.norm = nn.LayerNorm(tower.width)
        self.hidden = nn.Linear(tower.width, tower.hidden)
        self.proj = nn.Linear(tower.hidden, embed_dim)
        self.skip = nn.Linear(tower.width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        counted = (tokens != 0) & (tokens < START)
        longest = max(int(counted.sum(1).max()) + 1, 1) if len(tokens) else 1
        tokens, counted = tokens[:, :longest], counted[:, :longest]  # SOT first, then the words, then padding
        mask = counted.unsqueeze(-1).to(self.token_embedding.weight.dtype)
        total = (self.token_embedding(tokens) * mask).sum(1)
        bag = self.norm(total / mask.sum(1).clamp(min=1))
        return self.proj(F.gelu(self.hidden(bag))) + self.skip(bag)


def _text_transformer(*, tower: TransformerTower, embed_dim: int) -> nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=tower.context_length,
        vocab_size=VOCABULARY,
        width=tower.width,
        heads=tower.heads,
        layers=tower.layers,
        output_dim=embed_dim,
        no_causal_mask=not tower.causal,
        use_pad_mask=not tower.causal,
        pool_type="argmax",  # the end-of-text token has the largest id
    )


def _vision_transformer(*, tower: ViTTower, embed_dim: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        width=tower.width,
        layers=tower.layers,
        heads=tower.heads,
        mlp_ratio=4.0,
        output_dim=embed_dim,
    )


class ProjectedText(nn.Module):
    """A text tower followed by a linear layer that begins as the identity."""

    def __init__(self, trunk: nn.Module, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.proj = nn.Linear(embed_dim, embed_dim, bias=True)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(F.normalize(self.trunk(tokens), dim=-1))


class ClipTokenizer:
    """CLIP's byte-pair tokenizer (open_clip's), lower case, spaces squeezed: texts -> (N, T) int64, padded with 0."""

    def __init__(self, context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.context_length = context_length
        self._tokenizer = SimpleTokenizer(context_length=context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("tokenize takes a list of texts, not one text")
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        return self._tokenizer(list(texts))


class JointEncoder(nn.Module):
    """Images and texts in one space.

    Build one with `build_encoder`, `load_encoder`, or from parts as below. Embeddings are returned unnormalised.

    Args:
        visual: Maps normalised pixels (N, 3, S, S) to (N, D); None: texts only.
        text: Maps tokens (N, T) to (N, D); None: images only.
        tokenizer: Maps texts to tokens; None when there is no text tower.
        embed_dim: D.
        image_size: S.
        image_mean: Of the pixels, RGB, 0 to 1.
        image_std: Likewise.
        config: What `save` writes so that `load_encoder` can build the same.
    """

    def __init__(
        self,
        *,
        visual: nn.Module | None,
        text: nn.Module | None,
        tokenizer: Tokenize | None,
        embed_dim: int,
        image_size: int,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.logit_scale = nn.Parameter(torch.tensor(TEMPERATURE_START))
        self.config = dict(config)
        self._tokenizer = tokenizer
        self._fingerprint: tuple[tuple[tuple[int, int], ...], str] | None = None

    def prepare(self, images: Tensor) -> Tensor:
        """Resize (antialiased, bilinear; the shape is stretched to a square) and normalise.

        Args:
            images: (N, 3, h, w) uint8, RGB.

        Returns:
            (N, 3, S, S) float32.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected (N, 3, h, w) uint8, got {tuple(images.shape)} {images.dtype}")
        pixels = images.float() / 255
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return self.normalise(pixels)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean of RGB pixels in [0, 1] and divide by the deviation."""
        mean = pixels.new_tensor(self.image_mean).view(1, 3, 1, 1)
        return (pixels - mean) / pixels.new_tensor(self.image_std).view(1, 3, 1, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) normalised -> (N, D).

        Raises:
            UserError: This encoder has no image tower.
        """
        if self.visual is None:
            raise UserError("this encoder has a text tower only; pretrain/clip.yaml trains an image tower to it")
        return self.visual(pixels)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, T) int64. Longer texts are cut off at the encoder's context length."""
        if self._tokenizer is None:
            raise UserError("this encoder has an image tower only: it cannot read text")
        return self._tokenizer(texts)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, D).

        Raises:
            UserError: This encoder has no text tower.
        """
        if self.text is None:
            raise UserError("this encoder has an image tower only: it cannot read text")
        return self.text(tokens)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings, so that DistributedDataParallel sees one forward pass."""
        return self.encode_image(pixels), self.encode_text(tokens)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the logit scale within [0, ln 100]; to be called after each optimiser step."""
        self.logit_scale.clamp_(0, TEMPERATURE_LIMIT)

    def fingerprint(self) -> str:
        """sha256 over configuration and weights as float32; the same after saving and loading."""
        tensors = sorted(self.state_dict(keep_vars=True).items())
        state = tuple((t.data_ptr(), t._version) for _, t in tensors)
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
            for name, tensor in tensors:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: Created if it is missing.
            half: Store floating-point weights as float16; they are float32 again after loading.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = torch.float16 if half else torch.float32
        tensors = {
            name: (t.detach().to("cpu", dtype) if t.is_floating_point() else t.detach().cpu()).contiguous()
            for name, t in self.state_dict().items()
        }
        save_weights(folder / "model.safetensors", tensors, {"format": FORMAT})
        text = json.dumps({"format": FORMAT, **self.config}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return folder


def build_encoder(config: EncoderConfig) -> JointEncoder:
    """A joint encoder with fresh weights, drawn from torch's generator."""
    visual: nn.Module | None = None
    text: nn.Module | None = None
    if isinstance(config.image, ResNetTower):
        visual = ResNetImage(tower=config.image, embed_dim=config.embed_dim)
    elif isinstance(config.image, ViTTower):
        visual = _vision_transformer(tower=config.image, embed_dim=config.embed_dim)
    if isinstance(config.text, CbowTower):
        text = CbowText(tower=config.text, embed_dim=config.embed_dim)
    elif isinstance(config.text, TransformerTower):
        text = _text_transformer(tower=config.text, embed_dim=config.embed_dim)
    if text is not None and config.text_projection:
        text = ProjectedText(text, config.embed_dim)
    return JointEncoder(
        visual=visual,
        text=text,
        tokenizer=ClipTokenizer(config.text.context_length) if config.text else None,
        embed_dim=config.embed_dim,
        image_size=config.image.image_size if config.image else 0,
        image_mean=config.image_mean,
        image_std=config.image_std,
        config={"encoder": config.model_dump(mode="json")},
    )


def load_encoder(spec: str | Path) -> JointEncoder:
    """Load an encoder in eval mode.

    Args:
        spec: A folder written by `JointEncoder.save` (or the `model.safetensors` in it), or
            `open_clip:MODEL:WEIGHTS`, where MODEL is one of open_clip's names or a model configuration file (`.json`),
            and WEIGHTS one of its tags (fetched once) or a local `.safetensors`, `.pt` or `.bin` file.

    Raises:
        UserError: Something is missing, does not fit, or cannot be read; never falls back to random weights.
    """
    if str(spec).startswith("open_clip:"):
        return _load_open_clip(str(spec).removeprefix("open_clip:")).eval()
    folder = Path(spec)
    if folder.suffix == ".safetensors":
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"no encoder at {folder}: expected a folder with config.json and model.safetensors")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an encoder folder: {name} is missing")
    config = read_config(folder)
    if "open_clip" in config:
        encoder = _build_open_clip(config["open_clip"])
    else:
        encoder = build_encoder(_encoder_section(folder, config))
    tensors, _ = load_weights(folder / "model.safetensors")
    _load_exactly(encoder, tensors, folder / "model.safetensors")
    return encoder.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of an encoder folder.

    Raises:
        UserError: It is unreadable or of another format.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT!r}; was it written by another version?")
    return config


def export_backbone(encoder: JointEncoder) -> dict[str, Tensor]:
    """The ResNet's weights under torchvision's names (`conv1.weight`, `layer1.0.bn1.running_mean`), without the head.

    Raises:
        UserError: The image tower is no ResNet of ours.
    """
    if not isinstance(encoder.visual, ResNetImage):
        kind = type(encoder.visual).__name__
        raise UserError(f"only a ResNet image tower converts to a detection backbone, and this encoder has {kind}")
    return {name: tensor.detach().clone() for name, tensor in encoder.visual.backbone.state_dict().items()}


def copy_tower(target: JointEncoder, source: JointEncoder, *, which: str) -> None:
    """Copy `source`'s "visual" or "text" tower into `target`; a text tower may be put under a fresh projection.

    Raises:
        UserError: A tower is missing, or the two are not built alike.
    """
    mine, theirs = getattr(target, which), getattr(source, which)
    if theirs is None or mine is None:
        raise UserError(
            f"cannot take over the {which} tower: {'the source' if theirs is None else 'the target'} has none"
        )
    if isinstance(mine, ProjectedText) and not isinstance(theirs, ProjectedText):
        mine = mine.trunk
    _load_exactly(mine, theirs.state_dict(), f"the {which} tower taken over")


def _encoder_section(folder: Path, config: Mapping[str, Any]) -> EncoderConfig:
    try:
        return EncoderConfig.model_validate(config.get("encoder"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{folder / 'config.json'}: encoder.{where}: {first['msg']}") from error


def _load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Load all of `tensors` into all of `module`, or say what does not fit."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in tensors]
    unknown = [k for k in tensors if k not in wanted]
    shapes = [k for k in wanted if k in tensors and wanted[k].shape != tensors[k].shape]
    if missing or unknown or shapes:
        matched = len(wanted) - len(missing) - len(shapes)
        parts = [f"{matched} of {len(wanted)} tensors match"]
        if missing:
            parts.append(f"{len(missing)} missing, such as {missing[0]}")
        if unknown:
            parts.append(f"{len(unknown)} unknown, such as {unknown[0]}")
        if shapes:
            name = shapes[0]
            got, want = tuple(tensors[name].shape), tuple(wanted[name].shape)
            parts.append(f"{len(shapes)} of another shape, such as {name}: {got} instead of {want}")
        raise UserError(f"{where} does not fit this model: {'; '.join(parts)}")
    module.load_state_dict({k: v.to(wanted[k].dtype) for k, v in tensors.items()})


# --- open_clip -------------------------------------------------------------------------------------------------------

OLD_TEXT = re.compile(r"^(text_projection|positional_embedding|token_embedding|transformer|ln_final)(?=$|\.)")


def _build_open_clip(settings: Mapping[str, Any]) -> JointEncoder:
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
    except (TypeError, RuntimeError, AssertionError) as error:
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


def _load_open_clip(rest: str) -> JointEncoder:
    """`MODEL:WEIGHTS`: see `load_encoder`."""
    import open_clip

    name, _, weights = rest.partition(":")
    if name.endswith(".json"):
        model_config = read_json(name, hint="open_clip:MODEL.json:WEIGHTS needs the model's configuration")
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
    encoder = _build_open_clip({"name": name, "model": model_config, "mean": list(mean), "std": list(std)})
    _load_exactly(encoder, _open_clip_tensors(path, encoder), path)
    return encoder


def _open_clip_tensors(path: Path, encoder: JointEncoder) -> dict[str, Tensor]:
    """A checkpoint's tensors under this module's names (`visual.…`, `text.…`, `logit_scale`)."""
    if path.suffix == ".safetensors":
        loaded: Any = load_weights(path)[0]
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that is none of its own
            raise UserError(
                f"{path} cannot be read as weights ({type(error).__name__}); convert it to safetensors"
            ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} holds no table of tensors")
    wanted = encoder.state_dict()
    tensors = {}
    for key, value in loaded.items():
        key = OLD_TEXT.sub(r"text.\1", key.removeprefix("module."))
        if key == "logit_scale":
            value = value.reshape(())
        if key in ("logit_bias", "input_resolution", "context_length", "vocab_size") or (
            key.endswith("position_ids") and key not in wanted
        ):
            continue  # not weights of ours
        tensors[key] = value
    return tensors
