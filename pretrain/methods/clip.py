# SPDX-License-Identifier: Apache-2.0
"""CLIP (Radford et al., arXiv:2103.00020): pictures and captions of a batch find each other.

Particular to it: two towers, linear projections into one space, symmetric InfoNCE over the global batch with a learnt
temperature whose scale is clamped at 100 after each step (§2.3, §2.5).

Three things differ from the paper, each by an option: the text tower may come from `text_distill` and stay frozen with
a linear layer on top; captions of the same noun count as right together, because with a few hundred nouns a batch holds
many; and pictures are changed more than by a random crop, because there are few drawings of a thing. A batch that is
too large for memory is encoded in pieces, at the price of a second forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.augment import luma
from pretrain.config import AugmentConfig
from pretrain.data.pairs import PairBatch
from pretrain.engine.task import Task
from pretrain.losses import clip_contrastive_top1
from pretrain.nets.chunked import encode_in_chunks
from pretrain.nets.towers import JointEncoder, ProjectedText, image_features


def augment(pixels: Tensor, config: AugmentConfig, size: int) -> Tensor:
    """Random resized crop, flip and colour changes, drawn per picture from torch's generator.

    Args:
        pixels: (N, 3, h, w) in [0, 1].
        config: How much.
        size: Side of the result.

    Returns:
        (N, 3, size, size) in [0, 1].
    """
    return apply_changes(pixels, draw_changes(config, len(pixels), pixels.device), config, size)


def draw_changes(config: AugmentConfig, count: int, device: torch.device) -> dict[str, Tensor]:
    """Parameters of the changes of ``count`` pictures, (N, …) by name, drawn for the whole batch at once.

    Without one of the colour changes no random number is drawn for it, so that older runs go on alike.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device)

    stretch = min(0.2, -math.log(max(config.crop_scale[0], 1e-6)))  # width to height 0.82 to 1.22; none without a crop
    parameters = {"area": uniform(*config.crop_scale), "aspect": uniform(-stretch, stretch).exp()}
    parameters |= {"x": uniform(-1, 1), "y": uniform(-1, 1), "mirrored": torch.rand(count, device=device) < config.flip}
    parameters["gain"] = (1 + uniform(-config.brightness, config.brightness, 1, 1, 1)) * (
        1 + uniform(-config.colour, config.colour, 3, 1, 1)
    )
    parameters["contrast"] = 1 + uniform(-config.contrast, config.contrast, 1, 1, 1)
    if config.hue:
        parameters["angle"] = 2 * math.pi * torch.rand(count, device=device)
        parameters["turned"] = torch.rand(count, device=device) < config.hue
    if config.grey:
        parameters["grey"] = torch.rand(count, device=device) < config.grey
    if config.random_filter:
        # a kernel per picture; variance 1 / (3 · 3²) keeps the size of a picture's contrasts (RandConv, §3.1)
        kernel = torch.randn(count * 3, 3, 3, 3, device=device) / math.sqrt(27)
        parameters["kernel"] = kernel.unflatten(0, (count, 3))
        parameters["share"] = torch.rand(count, 1, 1, 1, device=device)
        parameters["filtered"] = torch.rand(count, device=device) < config.random_filter
    return parameters


def apply_changes(pixels: Tensor, parameters: Mapping[str, Tensor], config: AugmentConfig, size: int) -> Tensor:
    """The changes of `draw_changes`; arguments and result as `augment`."""
    count = len(pixels)
    if config.crop_scale != (1.0, 1.0) or config.flip or pixels.shape[-2:] != (size, size):
        area, aspect = parameters["area"], parameters["aspect"]
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x, y = parameters["x"] * (1 - width), parameters["y"] * (1 - height)  # centre, in [-1, 1] coordinates
        mirror = torch.where(parameters["mirrored"], -1.0, 1.0)
        zero = torch.zeros_like(x)
        matrix = torch.stack([torch.stack([width * mirror, zero, x], -1), torch.stack([zero, height, y], -1)], 1)
        grid = F.affine_grid(matrix, [count, 3, size, size], align_corners=False)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (((pixels - mean) * parameters["contrast"] + mean) * parameters["gain"]).clamp(0, 1)
    return _recolour(pixels, parameters)


def _recolour(pixels: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Changes of colour and texture that keep shapes: unseen drawing styles differ in these."""
    if "angle" in parameters:
        turned = torch.einsum("noc,nchw->nohw", grey_axis_rotation(parameters["angle"]), pixels).clamp(0, 1)
        pixels = torch.where(_per_picture(parameters["turned"]), turned, pixels)
    if "grey" in parameters:
        pixels = torch.where(_per_picture(parameters["grey"]), luma(pixels), pixels)
    if "kernel" in parameters:
        stack = F.pad((pixels - 0.5).flatten(0, 1)[None], (1, 1, 1, 1), mode="replicate")
        filtered = F.conv2d(stack, parameters["kernel"].flatten(0, 1), groups=len(pixels)).view_as(pixels) + 0.5
        mixed = (parameters["share"] * pixels + (1 - parameters["share"]) * filtered).clamp(0, 1)
        pixels = torch.where(_per_picture(parameters["filtered"]), mixed, pixels)
    return pixels


def _per_picture(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1)


def grey_axis_rotation(angle: Tensor) -> Tensor:
    """(N,) radians → (N, 3, 3): turns RGB around the axis r = g = b (Rodrigues); grey stays grey."""
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    third = torch.full((3, 3), 1 / 3, device=angle.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    return cosine * (torch.eye(3, device=angle.device) - third) + third + sine * cross


class Clip(Task):
    """One step: captioned pictures in, contrastive loss out.

    Args:
        encoder: Both towers.
        freeze_text: Do not train the text tower (a projection on top of it is trained still). A frozen tower is left
            out of checkpoints, and loaded when the task is built.
        same_noun_positive: Captions of the same main noun count as right in equal shares.
        names: The class names, in the order of ``class_id``; each is one more text for a picture to choose from. None:
            the captions of the batch only.
        augmentation: Random changes of the pictures in training.
        chunk: Encode so many pictures or texts at a time (`encode_in_chunks`); None: all at once.
    """

    def __init__(
        self,
        *,
        encoder: JointEncoder,
        freeze_text: bool = False,
        same_noun_positive: bool = True,
        names: Sequence[str] | None = None,
        augmentation: AugmentConfig | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if encoder.visual is None or encoder.text is None:
            raise ValueError("CLIP needs an encoder with an image tower and a text tower")
        self.encoder = encoder
        if names is not None and not same_noun_positive:
            raise ValueError("names need same_noun_positive: a picture's own name would be a negative")
        self.same_noun_positive = same_noun_positive
        self.names = None if names is None else [f"a {name}" for name in names]
        self.augmentation = augmentation or AugmentConfig()
        self.chunk = chunk
        self._last: dict[str, Tensor] = {}
        self._frozen: tuple[nn.Module, ...] = ()  # a tuple: a second registration would double its parameters
        self.untracked: tuple[str, ...] = ()
        if freeze_text:
            projected = isinstance(encoder.text, ProjectedText)
            frozen = encoder.text.trunk if isinstance(encoder.text, ProjectedText) else encoder.text
            self._frozen = (frozen.requires_grad_(False),)
            self.untracked = ("encoder.text.trunk." if projected else "encoder.text.",)

    def train(self, mode: bool = True) -> Clip:
        """A frozen tower stays in eval mode."""
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "image" (N, 3, h, w) uint8, "caption" list of N texts, "class_id" (N,) int64.
        """
        device = self.encoder.logit_scale.device
        images = batch["image"].to(device)
        parameters = draw_changes(self.augmentation, len(images), device)

        def encode_image(images: Tensor, *values: Tensor) -> Tensor:  # in pieces, so is what uint8 becomes before it
            with torch.autocast(device.type, enabled=False):
                changes = dict(zip(parameters, values, strict=True))
                pixels = apply_changes(images.float() / 255, changes, self.augmentation, self.encoder.image_size)
            pixels = self.encoder.normalise(pixels)
            if torch.is_autocast_enabled(device.type):  # on a CPU with bf16 units a fifth faster; in fp32 it is slower
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.encoder.encode_image(pixels)

        image = self._encode(encode_image, images, *parameters.values())
        text = self._encode(self.encoder.encode_text, self.encoder.tokenize(batch["caption"]).to(device))
        labels = batch["class_id"].to(device) if self.same_noun_positive else None
        names = None
        if self.names is not None:
            names = self._encode(self.encoder.encode_text, self.encoder.tokenize(self.names).to(device))
        self._last = {"image": image.detach(), "text": text.detach()}
        loss, right = clip_contrastive_top1(image, text, self.encoder.logit_scale, labels_N=labels, names_CD=names)
        return loss, {"batch_top1": right, "logit_scale": self.encoder.logit_scale.detach().exp()}

    def _encode(self, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.chunk is None:
            return encode(*inputs)
        return encode_in_chunks(encode, *inputs, chunk=self.chunk, module=self.encoder)

    @property
    def backbone(self) -> nn.Module:
        """The module that the kNN probe measures."""
        return image_features(self.encoder)

    def health(self) -> dict[str, Tensor]:
        """Pictures' embeddings, and cosines with the own caption and (mean) with those of other pictures."""
        image, text = (F.normalize(self._last[name].float(), dim=1) for name in ("image", "text"))
        positive = (image * text).sum(1)
        return {
            "projection": self._last["image"],
            "own_caption": positive,
            "other_captions": (image @ text.sum(0) - positive) / max(1, len(positive) - 1),
        }

    def after_step(self, step: int, total: int) -> None:
        """Clamp the temperature, after the optimiser's step so that the next forward pass sees it."""
        self.encoder.clamp_temperature()
