# SPDX-License-Identifier: Apache-2.0
"""DETR as a Detectron2 meta-architecture: the original, and a conditional form that learns from little data.

``arch: detr`` is Carion et al. (arXiv 2005.12872): 6+6 layers, sine places, auxiliary losses, Hungarian matching; its
parameter names are those of the released DETR and UP-DETR checkpoints. ``arch: conditional`` adds conditional attention
(2108.06152), anchors that are refined (2201.12329) and denoising queries (2203.01305).

What a query means is told in two parts: *is there something* (one logit, which knows no class) and *what it is like*,
an embedding that is compared with texts, patches or crops by the classifier that ViLD uses. "Matched?" of UP-DETR is
the first, its vocabulary of patches the second, so neither is thrown away when words replace the patches.

The embedding is read from the query's state, or, with a region tower, from the backbone's map inside the query's box,
by the network that reads ViLD's regions. It then starts as the image encoder's own last stage, and what that knows of
words nobody labelled need not pass through a narrow transformer that learned from labels (CORA, arXiv 2303.13076,
classifies its anchors like this).

Shapes: ``N`` images, ``S`` tokens, ``Q`` queries, ``d`` width, ``L`` layers, ``T`` targets (padded), ``D`` embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovd.config_detr import DetrLossConfig
from ovd.modeling.classifier import EmbeddingClassifier, cosine_logits
from ovd.modeling.detr.conditioning import ClassCrops, ConditionEncoder
from ovd.modeling.detr.matcher import (
    Matches,
    box_cost,
    group_mask,
    groups_of,
    match,
    object_cost,
    overlaps,
    to_centres,
    to_corners,
)
from ovd.modeling.detr.transformer import (
    DETR_TEMPERATURE,
    MLP,
    PLACE_TEMPERATURE,
    START,
    ConditionalDecoder,
    Encoder,
    PlainDecoder,
    sine_code,
    start_as_identity,
    token_positions,
)
from ovd.modeling.distillation import squared_distillation
from ovd.modeling.region_head import RegionHead
from pretrain.engine import distributed

PRIOR = 0.01  # of an object before training (focal loss, arXiv 1708.02002 §3.3)
REGION_MAP = "res4"  # what a region tower reads


class Memory(NamedTuple):
    """Encoded tokens of a batch.

    Attributes:
        tokens: (N, S, d).
        place: (N, S, d) sine codes.
        padding: (N, S) bool, True for padding; None where there is none.
        sizes: (height, width) of each network input.
        maps: the backbone's feature maps they were made of.
    """

    tokens: Tensor
    place: Tensor
    padding: Tensor | None
    sizes: list[tuple[int, int]]
    maps: dict[str, Tensor]

    def repeated(self, times: int) -> Memory:
        """One picture's memory as a batch of ``times``, without copies: for so many questions at once."""

        def grown(x: Tensor) -> Tensor:
            return x.expand(times, *x.shape[1:])

        padding = None if self.padding is None else grown(self.padding)
        maps = {name: grown(x) for name, x in self.maps.items()}
        return Memory(grown(self.tokens), grown(self.place), padding, self.sizes * times, maps)


class Decoded(NamedTuple):
    """States (L, N, Q, d) and centre boxes (L, N, Q, 4) in [0, 1] after each decoder layer."""

    states: Tensor
    boxes: Tensor


class Targets(NamedTuple):
    """What should be found; rows beyond ``counts[n]`` are padding.

    Attributes:
        boxes: (N, T, 4) centre boxes in [0, 1].
        labels: (N, T) int64.
        counts: objects of each image.
        groups: (N, T) int64 group of queries that may explain each, or None.
        embeddings: (N, T, D) what the query's embedding should be, or None.
    """

    boxes: Tensor
    labels: Tensor
    counts: list[int]
    groups: Tensor | None = None
    embeddings: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """(N, T) bool, False for padding."""
        number = torch.arange(self.boxes.shape[1], device=self.boxes.device)
        return number < torch.tensor(self.counts, device=number.device)[:, None]


class Extra(NamedTuple):
    """Queries beside the free ones: content (N, P, d), anchor logits (N, P, 4)."""

    content: Tensor
    anchors: Tensor


class Found(NamedTuple):
    """The last layer's answer.

    Attributes:
        boxes: (N, Q, 4) centre boxes in [0, 1].
        logits: (N, Q) of an object.
        embeddings: (N, Q, D) unit rows.
        classes: (N, Q, C+1) logits of a closed list, nothing last; None where classes are embeddings.
        sizes: (height, width) of each network input.
    """

    boxes: Tensor
    logits: Tensor
    embeddings: Tensor
    classes: Tensor | None
    sizes: list[tuple[int, int]]


class Detr(nn.Module):
    """The detector.

    Args:
        arch: ``detr`` or ``conditional``.
        backbone: maps pixels to a dict of feature maps.
        features: (name, channels, stride) of the maps that are joined at the first one's resolution.
        frozen: the backbone gets no gradient and stays in eval mode.
        width, heads, ffn, encoder_layers, decoder_layers, queries, dropout, pre_norm: of the transformer.
        embed_dim: D.
        classifier: text rows; None for ``closed`` and agnostic models.
        closed_classes: C of a linear classification layer with a "nothing" column, as in DETR; None: object logit and
            embedding.
        unit_conditions: of `ConditionEncoder`: conditions come from the joint space.
        denoising, box_noise, label_noise: groups of denoising queries and their noise.
        conditioned: classes that a second set of queries is conditioned on in training.
        region_tower: embeds free queries from res4 inside their boxes; None: from their states.
        scale: inverse temperature of patch vocabularies.
        loss: weights.
        pixel_mean, pixel_std: RGB in 0…255.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        arch: Literal["conditional", "detr"],
        backbone: nn.Module,
        features: Sequence[tuple[str, int, int]],
        frozen: bool,
        width: int,
        heads: int,
        ffn: int,
        encoder_layers: int,
        decoder_layers: int,
        queries: int,
        dropout: float,
        pre_norm: bool,
        embed_dim: int,
        classifier: EmbeddingClassifier | None,
        closed_classes: int | None,
        unit_conditions: bool,
        denoising: int,
        box_noise: float,
        label_noise: float,
        conditioned: int,
        region_tower: RegionHead | None,
        scale: float,
        loss: DetrLossConfig,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.arch, self.frozen, self.queries, self.loss_weights = arch, frozen, queries, loss
        self.features = tuple(features)
        self.width, self.heads, self.embed_dim, self.scale = width, heads, embed_dim, scale
        self.denoising, self.box_noise, self.label_noise = denoising, box_noise, label_noise
        self.conditioned = conditioned
        self.backbone = backbone
        if frozen:
            backbone.requires_grad_(False)
        channels = sum(c for _, c, _ in self.features)
        self.input_proj = nn.Conv2d(channels, width, kernel_size=1)
        parts: dict[str, Any] = {
            "width": width, "heads": heads, "ffn": ffn, "dropout": dropout, "pre_norm": pre_norm
        }  # fmt: skip
        self.transformer = nn.ModuleDict(
            {
                "encoder": Encoder(layers=encoder_layers, **parts),
                "decoder": (ConditionalDecoder if arch == "conditional" else PlainDecoder)(
                    layers=decoder_layers, **parts
                ),
            }
        )
        if arch == "detr":
            for parameter in self.transformer.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        elif pre_norm:
            for part in self.transformer.values():
                start_as_identity(cast(nn.ModuleList, part.layers))
        self.query_embed = nn.Embedding(queries, width)
        self.bbox_embed = MLP(width, width, width, 4)
        if arch == "conditional":
            spread = torch.cat([torch.rand(queries, 2) * 0.9 + 0.05, torch.full((queries, 2), START)], dim=1)
            self.query_anchor = nn.Parameter(torch.logit(spread))
            nn.init.zeros_(self.bbox_embed.last.weight)
            nn.init.zeros_(self.bbox_embed.last.bias)
            nn.init.normal_(self.query_embed.weight, std=0.02)
        self.class_embed = self.object_embed = None
        if closed_classes is not None:
            self.class_embed = nn.Linear(width, closed_classes + 1)
        else:
            self.object_embed = nn.Linear(width, 1)
            if loss.object_kind == "focal":
                nn.init.constant_(self.object_embed.bias, float(torch.logit(torch.tensor(PRIOR))))
        self.feature_align = MLP(width, width, embed_dim)
        self.patch2query = ConditionEncoder(embed_dim, width, unit=unit_conditions)
        self.classifier = classifier
        self.region_tower = region_tower
        self.class_crops: ClassCrops | None = None  # set by a training whose queries are told crops too
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Detr:
        """A frozen backbone stays in eval mode: freezing weights alone leaves batch statistics moving."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    # --- pictures to tokens

    def normalised(self, pixels: Tensor) -> Tensor:
        """RGB pixels in 0…255 → what the backbone was trained on."""
        return (pixels.to(self.device, torch.float32) - self.pixel_mean) / self.pixel_std

    def maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """Feature maps of (N, 3, H, W) normalised pixels; without a graph where the backbone is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.backbone(pixels)
        return {name: out[name] for name, _, _ in self.features}

    def joined(self, maps: dict[str, Tensor]) -> Tensor:
        """(N, C, h, w): all maps at the first one's resolution."""
        first = maps[self.features[0][0]]
        rest = [
            F.interpolate(maps[name].to(first.dtype), first.shape[-2:], mode="bilinear", align_corners=False)
            for name, _, _ in self.features[1:]
        ]
        return torch.cat([first, *rest], dim=1) if rest else first

    def pooled(self, pixels: Tensor) -> Tensor:
        """(N, C) average of each map of (N, 3, S, S) patches in 0…255, joined: UP-DETR's patch feature."""
        maps = self.maps(self.normalised(pixels))
        return torch.cat([maps[name].mean(dim=(2, 3)) for name, _, _ in self.features], dim=1)

    def maps_of(self, batch: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """Feature maps of a batch (see `memory`), computed or cached, and (height, width) of each network input."""
        if "features" in batch[0]:
            maps = {name: self.stacked([x["features"][name] for x in batch]) for name, _, _ in self.features}
            return maps, [(int(x["size"][0]), int(x["size"][1])) for x in batch]
        images = ImageList.from_tensors([self.normalised(x["image"]) for x in batch])  # padding is 0 after that
        return self.maps(images.tensor), [(int(h), int(w)) for h, w in images.image_sizes]

    def stacked(self, cached: list[Tensor]) -> Tensor:
        """What a cache keeps of each picture, in float32 where the model is."""
        with torch.autocast(self.device.type, enabled=False):  # under a CPU's, torch cannot stack half floats
            return torch.stack(cached).to(self.device, torch.float32)

    def memory(self, batch: list[dict[str, Any]]) -> Memory:
        """Encode a batch of dicts with ``image`` (3, H, W) in 0…255, or ``features`` (name → map) and ``size``."""
        stride = self.features[0][2]
        maps, sizes = self.maps_of(batch)
        x = self.input_proj(self.joined(maps)).flatten(2).transpose(1, 2)
        height, width = maps[self.features[0][0]].shape[-2:]
        valid = torch.zeros(len(batch), height, width, dtype=torch.bool, device=self.device)
        for cells, (h, w) in zip(valid, sizes, strict=True):
            cells[: -(-h // stride), : -(-w // stride)] = True  # rounded up: the smallest picture has a token
        centred = self.arch == "conditional"
        temperature = PLACE_TEMPERATURE if centred else DETR_TEMPERATURE
        place = sine_code(token_positions(valid, centred=centred), self.width // 2, temperature=temperature)
        place = place.flatten(1, 2).to(x.dtype)
        padding = None if bool(valid.all()) else ~valid.flatten(1)
        return Memory(self.transformer["encoder"](x, place=place, padding=padding), place, padding, sizes, maps)

    def region_embeddings(self, memory: Memory, image: Tensor, boxes: Tensor) -> Tensor:
        """What the backbone's map shows inside (K, 4) centre boxes of images (K,): (K, D), unnormalised.

        Boxes get no gradient. In float32 also under autocast, for the reason in `OpenVocabularyHeads.prepare`.
        """
        assert self.region_tower is not None
        size = boxes.new_tensor([[w, h, w, h] for h, w in memory.sizes])
        corners = to_corners(boxes.detach().float()).clamp(0, 1) * size[image]
        places = torch.cat([image[:, None].to(corners), corners], dim=1)
        stride = next(s for name, _, s in self.features if name == REGION_MAP)
        pooled = roi_align(
            memory.maps[REGION_MAP].float(), places, self.region_tower.resolution, 1.0 / stride, 2, aligned=True
        )
        z = self.region_tower(pooled)[1]
        assert z is not None
        return z

    # --- queries to boxes

    def decode(
        self,
        memory: Memory,
        *,
        added: Tensor | None = None,
        order: Tensor | None = None,
        extra: Extra | None = None,
        mask: Tensor | None = None,
    ) -> Decoded:
        """Run the decoder.

        Args:
            memory: of `memory`.
            added: (N, Q, d) added to the queries (conditions).
            order: (Q,) permutation of the queries, or None.
            extra: queries that stand before the free ones (conditional only).
            mask: (P + Q, P + Q) bool, True where a query must not see another; or (N · heads, P + Q, P + Q).
        """
        count = len(memory.tokens)
        order = torch.arange(self.queries, device=self.device) if order is None else order
        query = self.query_embed.weight[order].expand(count, -1, -1)
        if added is not None:
            query = query + added
        tokens, place, padding, _, _ = memory
        decoder = self.transformer["decoder"]
        if self.arch == "detr":
            states = decoder(tokens, query_place=query, place=place, mask=mask, padding=padding)
            return Decoded(states, self.bbox_embed(states).float().sigmoid())
        anchors = self.query_anchor[order].expand(count, -1, -1)
        if extra is not None:
            query, anchors = torch.cat([extra.content, query], dim=1), torch.cat([extra.anchors, anchors], dim=1)
        states, boxes = decoder(
            tokens, content=query, anchors=anchors, place=place, mask=mask, padding=padding, box_head=self.bbox_embed
        )
        return Decoded(states, boxes)

    # --- training

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """In training the dict of losses; in eval mode Detectron2's ``[{"instances": Instances}, …]``."""
        if not self.training:
            return self.detect(batch)
        memory = self.memory(batch)
        targets = self.targets([x["instances"] for x in batch])
        free, taught = self.decode_taught(memory, targets)
        number = self.mean_targets(targets)  # once: a process without targets has no second loss to meet the others for
        losses = self.losses(free, targets, number=number)
        losses |= self.denoising_losses(taught, targets, number=number, like=losses)
        if self.region_tower is not None:
            losses["loss_text"] = self._region_loss(memory, targets, number)
        if self.conditioned:
            for name, value in self._conditioned(memory, targets).items():
                losses[f"{name}_words"] = value
        return losses

    def targets(self, instances: Sequence[Instances]) -> Targets:
        """Pad the labels of a batch; boxes become shares of each picture's own size."""
        counts = [len(i) for i in instances]
        most = max(1, *counts)
        boxes = torch.full((len(counts), most, 4), 0.5, device=self.device)
        labels = torch.zeros(len(counts), most, dtype=torch.int64, device=self.device)
        for n, one in enumerate(instances):
            height, width = one.image_size
            corners = one.gt_boxes.tensor.to(self.device).float()
            boxes[n, : counts[n]] = to_centres(corners / corners.new_tensor([width, height, width, height]))
            labels[n, : counts[n]] = one.gt_classes.to(self.device)
        return Targets(boxes, labels, counts)

    def mean_targets(self, targets: Targets) -> float:
        """Targets per process, at least 1; every process must call it alike."""
        return max(distributed.all_sum([float(sum(targets.counts))])[0] / distributed.world_size(), 1.0)

    def losses(
        self,
        out: Decoded,
        targets: Targets,
        *,
        group: Tensor | None = None,
        matches: Matches | None = None,
        counted: Tensor | None = None,
        number: float | None = None,
    ) -> dict[str, Tensor]:
        """Matching and losses of all layers at once, each summed over the layers.

        Args:
            out: decoder output.
            targets: what should be found; with ``embeddings`` the pretext's losses are added.
            group: (Q,) groups of queries, where targets have groups.
            matches: known matches instead of the assignment.
            counted: (N, Q) bool, queries that the object loss counts; None: all.
            number: what sums are divided by; None: `mean_targets`, for which all processes must meet.
        """
        w, states = self.loss_weights, out.states
        layers = len(states)
        number = self.mean_targets(targets) if number is None else number
        logits = self.class_embed(states).float() if self.class_embed is not None else None
        found = self.object_embed(states)[..., 0].float() if self.object_embed is not None else None
        by_state = self.region_tower is None  # a tower has a loss of its own
        by_word = self.classifier is not None and by_state and targets.embeddings is None and group is None
        if matches is None:
            cost = box_cost(out.boxes, targets.boxes, l1=w.l1, giou=w.giou)
            if found is not None:
                cost = cost + w.object * object_cost(found, kind=w.object_kind)
            if logits is not None:
                cost = cost - w.object * _probability_of(logits, targets.labels)
            elif by_word and w.classes:
                assert self.classifier is not None
                with torch.no_grad():
                    said = self.classifier(self.feature_align(states).flatten(0, 2)).unflatten(0, states.shape[:3])
                    cost = cost - w.classes * _probability_of(said, targets.labels)
            matches = match(cost, targets.counts, query_group_Q=group, target_group_NT=targets.groups)
        index = (matches.layer, matches.image, matches.query)
        goal = (matches.image, matches.target)
        losses = {}
        if found is not None:
            hit = torch.zeros_like(found)
            hit[index] = 1.0
            losses["loss_object"] = w.object * _object_loss(
                found, hit, counted, number, kind=w.object_kind, no_object_weight=w.no_object_weight
            )
        if logits is not None:
            nothing = logits.shape[-1] - 1
            label = torch.full(logits.shape[:-1], nothing, device=logits.device)
            label[index] = targets.labels[goal]
            weight = torch.where(label == nothing, w.no_object_weight, 1.0)
            if counted is not None:
                weight = weight * counted
            nll = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view_as(weight)
            losses["loss_class"] = w.object * ((nll * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)).sum()
        box, wanted = out.boxes[index].float(), targets.boxes[goal]
        losses["loss_l1"] = w.l1 * (box - wanted).abs().sum() / number
        losses["loss_giou"] = w.giou * (1 - overlaps(to_corners(box), to_corners(wanted))[1]).sum() / number
        if by_word:
            assert self.classifier is not None
            said = self.classifier(self.feature_align(states[index]))
            mean = self.classifier.loss(said, targets.labels[goal])
            losses["loss_text"] = w.classes * mean * len(matches.image) / number
        if targets.embeddings is not None and (w.reconstruction or w.contrast):
            likeness = F.normalize(targets.embeddings.float(), dim=-1)
            z = self.feature_align(states[index]).float()
            if w.reconstruction:
                losses["loss_reconstruction"] = w.reconstruction * squared_distillation(z, likeness[goal]) / number
            if w.contrast:
                among = cosine_logits(z, likeness[matches.image], scale=self.scale)
                among = among.masked_fill(~targets.real[matches.image], float("-inf"))
                nll = F.cross_entropy(among, matches.target, reduction="sum")
                losses["loss_contrast"] = w.contrast * nll / number
        return losses if layers else {}

    def decode_taught(
        self,
        memory: Memory,
        targets: Targets,
        *,
        added: Tensor | None = None,
        order: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Decoded, Decoded | None]:
        """`decode`, and the answers of the denoising queries beside it; None outside of training or without targets.

        Denoising groups see themselves and the free queries; free queries must not see the answers. Where a picture has
        fewer targets than others, nobody sees its padded queries, so that its answers do not hang on the others.
        """
        extra, blocks = self._denoising(targets)
        if extra is None:
            return self.decode(memory, added=added, order=order, mask=mask), None
        size = extra.content.shape[1]
        owner = torch.cat([blocks, blocks.new_full((self.queries,), -1)])
        hidden = (owner[:, None] != owner[None]) & (owner[None] >= 0)
        if mask is not None:
            hidden[size:, size:] = mask
        if min(targets.counts) < max(targets.counts):
            real = targets.real[:, torch.arange(size, device=self.device) % max(targets.counts)]
            absent = F.pad(~real, (0, self.queries))
            hidden = (hidden | absent[:, None]).repeat_interleave(self.heads, 0)  # one mask per picture and head
        out = self.decode(memory, added=added, order=order, extra=extra, mask=hidden)
        return (
            Decoded(out.states[:, :, size:], out.boxes[:, :, size:]),
            Decoded(out.states[:, :, :size], out.boxes[:, :, :size]),
        )

    def denoising_losses(
        self, taught: Decoded | None, targets: Targets, *, number: float, like: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses of the denoising queries, as ``…_dn``; zeros named as in ``like`` for a process without targets."""
        if taught is None:
            return {f"{name}_dn": value * 0 for name, value in like.items()} if self.denoising else {}
        size = taught.boxes.shape[2]
        matches, counted = self._denoising_matches(targets, size, len(taught.boxes))
        copies = size // max(targets.counts)
        found = self.losses(taught, targets, matches=matches, counted=counted, number=number * copies)
        return {f"{name}_dn": value for name, value in found.items()}

    def _denoising(self, targets: Targets) -> tuple[Extra | None, Tensor]:
        """Noised copies of the targets as queries, and the group of each; in training only, None without targets."""
        most = max(targets.counts)
        if not (self.training and self.denoising and most):
            return None, torch.zeros(0, dtype=torch.int64, device=self.device)
        boxes = targets.boxes[:, :most].repeat(1, self.denoising, 1)
        noised = self._noised(boxes)
        content = torch.zeros(*boxes.shape[:2], self.width, device=self.device)
        if targets.embeddings is not None:
            content = self.patch2query(targets.embeddings.repeat(1, self.denoising, 1))
            told = torch.rand(content.shape[:2], device=self.device) >= self.label_noise
            content = content * told[..., None]  # otherwise only the anchor says which thing is meant, as in training
        elif self.classifier is not None and self.classifier.rows.shape[1] == self.embed_dim:
            labels = targets.labels[:, :most].repeat(1, self.denoising)
            seen = self.classifier.trainable.nonzero()[:, 0]
            other = seen[torch.randint(len(seen), labels.shape, device=self.device)]
            labels = torch.where(torch.rand(labels.shape, device=self.device) < self.label_noise, other, labels)
            content = self.patch2query(self.classifier.rows[labels])
        blocks = torch.arange(self.denoising, device=self.device).repeat_interleave(most)
        return Extra(content, torch.logit(noised)), blocks

    def _noised(self, boxes: Tensor) -> Tensor:
        """Centre boxes moved by up to ``box_noise`` half sides, their sides changed by up to that share."""
        half = boxes[..., 2:] / 2
        noise = (torch.rand_like(boxes) * 2 - 1) * self.box_noise
        centre = boxes[..., :2] + noise[..., :2] * half
        sides = boxes[..., 2:] * (1 + noise[..., 2:])
        return torch.cat([centre, sides], dim=-1).clamp(1e-3, 1 - 1e-3)

    def _region_loss(self, memory: Memory, targets: Targets, number: float) -> Tensor:
        """Words of the labelled boxes, moved a little as found boxes will be; per target."""
        assert self.classifier is not None
        real = targets.real
        z = self.region_embeddings(memory, real.nonzero()[:, 0], self._noised(targets.boxes[real]))
        labels = targets.labels[real]
        return self.loss_weights.classes * self.classifier.loss(self.classifier(z), labels) * len(labels) / number

    def _denoising_matches(self, targets: Targets, size: int, layers: int) -> tuple[Matches, Tensor]:
        most = max(targets.counts)
        place = torch.arange(size, device=self.device) % most
        counted = targets.real[:, place]
        image, query = counted.nonzero().unbind(1)
        layer = torch.arange(layers, device=self.device).repeat_interleave(len(image))
        image, query = image.repeat(layers), query.repeat(layers)
        return Matches(layer, image, query, place[query]), counted

    def _conditioned(self, memory: Memory, targets: Targets) -> dict[str, Tensor]:
        """Losses of queries that are told what to look for: words, or crops, of some classes, present and absent."""
        assert self.classifier is not None
        seen = self.classifier.trainable.nonzero()[:, 0]
        group = groups_of(self.queries, self.conditioned).to(self.device)
        rows, groups, keep = [], torch.full_like(targets.labels, -1), []
        for n, count in enumerate(targets.counts):
            present = targets.labels[n, :count].unique()
            present = present[torch.randperm(len(present), device=self.device)][: self.conditioned]
            absent = seen[torch.randperm(len(seen), device=self.device)]
            absent = absent[~torch.isin(absent, present)][: self.conditioned - len(present)]
            asked = torch.cat([present, absent])
            told = self.classifier.rows[asked]
            rows.append(told if self.class_crops is None else self.class_crops.mixed(told, asked))
            hit = targets.labels[n, :count, None] == asked[None]
            keep.append(hit.any(1))
            groups[n, :count] = torch.where(hit.any(1), hit.float().argmax(1), -1)
        sub = _subset(targets, keep, groups)
        added = self.patch2query(torch.stack(rows))[:, group]
        out = self.decode(memory, added=added, mask=group_mask(group))
        return self.losses(out, sub, group=group)

    # --- inference

    @torch.no_grad()
    def found(self, batch: list[dict[str, Any]], *, conditions_NMD: Tensor | None = None) -> Found:
        """`answer` of a batch (see `memory`)."""
        return self.answer(self.memory(batch), conditions_NMD=conditions_NMD)

    @torch.no_grad()
    def answer(self, memory: Memory, *, conditions_NMD: Tensor | None = None) -> Found:
        """The last layer's answer.

        Args:
            memory: of `memory`; it serves any number of questions.
            conditions_NMD: M embeddings per picture, each asked of its share of the queries; None: free queries.
        """
        added = mask = None
        if conditions_NMD is not None:
            group = groups_of(self.queries, conditions_NMD.shape[1]).to(self.device)
            added, mask = self.patch2query(conditions_NMD)[:, group], group_mask(group)
        out = self.decode(memory, added=added, mask=mask)
        state = out.states[-1]
        if self.object_embed is not None:
            logits, classes = self.object_embed(state)[..., 0].float(), None
        else:
            assert self.class_embed is not None
            classes = self.class_embed(state).float()
            logits = classes[..., :-1].logsumexp(-1) - classes[..., -1]
        if self.region_tower is None or conditions_NMD is not None:
            z = self.feature_align(state)
        else:
            image = torch.arange(len(state), device=self.device).repeat_interleave(state.shape[1])
            z = self.region_embeddings(memory, image, out.boxes[-1].flatten(0, 1)).unflatten(0, state.shape[:2])
        z = F.normalize(z.float(), dim=-1)
        return Found(out.boxes[-1], logits, z, classes, memory.sizes)

    @torch.no_grad()
    def detect(self, batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Each query's best trained class, in pixels of ``height`` × ``width`` where the dict has them."""
        found = self.found(batch)
        results = []
        for n, one in enumerate(batch):
            height, width = int(one.get("height", found.sizes[n][0])), int(one.get("width", found.sizes[n][1]))
            instances = Instances((height, width))
            corners = Boxes(to_corners(found.boxes[n]) * found.boxes.new_tensor([width, height, width, height]))
            corners.clip((height, width))
            score = found.logits[n].sigmoid()
            label = torch.zeros(len(score), dtype=torch.int64, device=score.device)
            if found.classes is not None:
                score, label = found.classes[n].softmax(-1)[:, :-1].max(-1)
            elif self.classifier is not None:
                said = self.classifier(found.embeddings[n])[:, :-1]
                best = said.masked_fill(~self.classifier.trainable, float("-inf")).softmax(-1).max(-1)
                score, label = score * best.values, best.indices
            instances.pred_boxes, instances.scores, instances.pred_classes = corners, score, label
            results.append({"instances": instances})
        return results


def _probability_of(logits: Tensor, labels_NT: Tensor) -> Tensor:
    """(L, N, Q, T) softmax probability of each target's label."""
    probability = logits.softmax(-1)
    wanted = labels_NT[None, :, None].expand(len(logits), -1, logits.shape[2], -1)
    return probability.gather(-1, wanted)


def _object_loss(
    logits: Tensor, hit: Tensor, counted: Tensor | None, number: float, *, kind: str, no_object_weight: float
) -> Tensor:
    """Focal loss over boxes (α .25, γ 2), or cross-entropy over the sum of weights as DETR's, summed over layers."""
    each = F.binary_cross_entropy_with_logits(logits, hit, reduction="none")
    on = torch.ones_like(hit) if counted is None else counted.to(hit).expand_as(hit)
    if kind == "weighted":
        weight = torch.where(hit > 0, 1.0, no_object_weight) * on
        return ((each * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)).sum()
    p = logits.sigmoid()
    wrong = torch.where(hit > 0, 1 - p, p)
    return (torch.where(hit > 0, 0.25, 0.75) * wrong**2 * each * on).sum() / number


def _subset(targets: Targets, keep: list[Tensor], groups: Tensor) -> Targets:
    """The targets of each image for which ``keep`` is True, moved to the front."""
    counts = [int(k.sum()) for k in keep]
    boxes, labels, own = targets.boxes.clone(), targets.labels.clone(), groups.clone()
    for n, (k, count) in enumerate(zip(keep, counts, strict=True)):
        size = len(k)
        boxes[n, :count], labels[n, :count] = targets.boxes[n, :size][k], targets.labels[n, :size][k]
        own[n, :count] = groups[n, :size][k]
    return Targets(boxes, labels, counts, own)
