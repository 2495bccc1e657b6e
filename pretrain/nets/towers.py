# SPDX-License-Identifier: Apache-2.0
"""Image tower, text tower, the joint encoder they make and how it is saved.

Shapes: `N` images or texts, `T` tokens, `S` side of the input picture, `D` joint embedding.

    encoder = build_encoder(config)         # fresh; pretrain.nets.encoders.load_encoder reads trained ones
    image_ND = encoder.encode_image(encoder.prepare(images_uint8))
    text_ND = encoder.encode_text(encoder.tokenize(["a dog", "a cat"]))

open_clip is imported where it is used only: a ResNet with a bag of words needs nothing of it but the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import CbowTower, EncoderConfig, ResNetTower, TransformerTower, ViTTower
from pretrain.config_photos import TimmTower
from pretrain.engine.checkpoint import save_weights
from pretrain.engine.config import Section
from pretrain.engine.distributed import device_of
from pretrain.engine.errors import UserError
from pretrain.engine.files import write_atomically
from pretrain.engine.state import load_tensors
from pretrain.nets.open_clip_parts import open_clip_module
from pretrain.nets.resnet import ResNet
from pretrain.nets.timm_tower import TimmImage

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


def image_features(encoder: JointEncoder) -> nn.Module:
    """The part of an image tower that a probe measures: a ResNet without its projection, a ViT as it is.

    Raises:
        UserError: this encoder has no image tower.
    """
    if encoder.visual is None:
        raise UserError("this encoder knows texts only; a probe needs an image tower")
    return encoder.visual.backbone if isinstance(encoder.visual, ResNetImage) else encoder.visual


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
    return open_clip_module("transformer").TextTransformer(
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
    return open_clip_module("transformer").VisionTransformer(
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
        self.context_length = context_length
        self._tokenize = open_clip_module("tokenizer").tokenize

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("tokenize takes a list of texts, not one text")
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        return self._tokenize(list(texts), context_length=self.context_length)

    def __reduce__(self) -> tuple[type[ClipTokenizer], tuple[int]]:
        """Pickled by its length: open_clip's class may have been imported on its own (`open_clip_module`)."""
        return ClipTokenizer, (self.context_length,)


class JointEncoder(nn.Module):
    """Images and texts in one space.

    Build one with `build_encoder`, `load_encoder`, or from parts as below. Embeddings are returned unnormalised.

    Args:
        visual: maps normalised pixels (N, 3, S, S) to (N, D); None: texts only.
        text: maps tokens (N, T) to (N, D); None: images only.
        tokenizer: maps texts to tokens; None when there is no text tower.
        embed_dim: D.
        image_size: S.
        image_mean: of the pixels, RGB, 0 to 1.
        image_std: likewise.
        config: what `save` writes so that `load_encoder` can build the same.
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

    @property
    def has_image_tower(self) -> bool:
        """Whether it embeds images, not only texts."""
        return self.visual is not None

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
            UserError: this encoder has no image tower.
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
            UserError: this encoder has no text tower.
        """
        if self.text is None:
            raise UserError("this encoder has an image tower only: it cannot read text")
        return self.text(tokens)

    def token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """`tokenize` as an array."""
        return self.tokenize(texts).numpy()

    @torch.inference_mode()
    def text_rows(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> (N, D), in arrays."""
        tokens = self.tokenize(texts).to(device_of(self))
        return self.encode_text(tokens).float().cpu().numpy()

    @torch.inference_mode()
    def crop_rows(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB crops (N, 3, h, w) -> (N, D), in arrays."""
        pixels = self.prepare(torch.from_numpy(crops).to(device_of(self)))
        return self.encode_image(pixels).float().cpu().numpy()

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
            folder: created if it is missing.
            half: store floating-point weights as float16; they are float32 again after loading.

        Returns:
            the folder.
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
        write_atomically(folder / "config.json", (text + "\n").encode())
        return folder


TOWERS: Mapping[type[Section], Callable[..., nn.Module]] = {
    ResNetTower: ResNetImage,
    ViTTower: _vision_transformer,
    TimmTower: TimmImage,
    CbowTower: CbowText,
    TransformerTower: _text_transformer,
}
"""The tower that a section describes, by the section's class."""


def build_encoder(config: EncoderConfig) -> JointEncoder:
    """A joint encoder with fresh weights, drawn from torch's generator."""
    visual, text = (
        None if tower is None else TOWERS[type(tower)](tower=tower, embed_dim=config.embed_dim)
        for tower in (config.image, config.text)
    )
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


def export_backbone(encoder: JointEncoder) -> dict[str, Tensor]:
    """The ResNet's weights under torchvision's names (`conv1.weight`, `layer1.0.bn1.running_mean`), without the head.

    Raises:
        UserError: the image tower is no ResNet of ours.
    """
    if not isinstance(encoder.visual, ResNetImage):
        kind = type(encoder.visual).__name__
        raise UserError(f"only a ResNet image tower converts to a detection backbone, and this encoder has {kind}")
    return {name: tensor.detach().clone() for name, tensor in encoder.visual.backbone.state_dict().items()}


def copy_tower(target: JointEncoder, source: JointEncoder, *, which: Literal["visual", "text"]) -> None:
    """Copy `source`'s "visual" or "text" tower into `target`; a text tower may be put under a fresh projection.

    Raises:
        UserError: a tower is missing, or the two are not built alike.
    """
    to, origin = (target.visual, source.visual) if which == "visual" else (target.text, source.text)
    if origin is None or to is None:
        raise UserError(
            f"cannot take over the {which} tower: {'the source' if origin is None else 'the target'} has none"
        )
    if isinstance(to, ProjectedText) and not isinstance(origin, ProjectedText):
        to = to.trunk
    load_tensors(to, origin.state_dict(), source=f"the {which} tower taken over")
