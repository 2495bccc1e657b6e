# SPDX-License-Identifier: Apache-2.0
"""DETR as a Detectron2 meta-architecture: the original, and a conditional form that learns from little data.

``arch: detr`` is Carion et al. (arXiv 2005.12872): 6+6 layers, sine position embedding, auxiliary losses, Hungarian
matching; its parameter names are those of the released DETR and UP-DETR checkpoints. ``arch: conditional`` adds
conditional attention (2108.06152), anchors that are refined (2201.12329) and denoising queries (2203.01305).

A query predicts a class-agnostic objectness logit and an *embedding*, which ViLD's classifier compares with texts,
patches or crops. UP-DETR's pretraining trains both: the logit as matched or not, the embedding with its patches as the
vocabulary. So fine-tuning on words keeps both.

The embedding comes from the query's state or, with a region tower, from the feature map inside the query's box (CORA,
arXiv 2303.13076, classifies its anchors likewise). The region tower starts as the image encoder's last stage, so its
knowledge of unlabelled words need not pass through a transformer trained on labels.

Shapes: ``N`` images, ``S`` tokens, ``Q`` queries, ``d`` width, ``L`` layers, ``M`` conditions, ``D`` embedding. Boxes
are cxcywh in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, roi_align

from ovd.config_detr import DetrConfig
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.attention_mask import denoising_attention_mask, group_attention_mask, query_groups
from ovd.modeling.detr.conditioning import ConditionEncoder, sample_conditions
from ovd.modeling.detr.criterion import SetCriterion, targets_per_process
from ovd.modeling.detr.denoising import Denoising, DenoisingQueries, apply_box_noise
from ovd.modeling.detr.position_embedding import (
    CONDITIONAL_TEMPERATURE,
    DETR_TEMPERATURE,
    sine_position_embedding,
    token_positions,
)
from ovd.modeling.detr.structures import DecoderOutput, FeatureMap, Memory, QueryOutputs, Targets
from ovd.modeling.detr.transformer import (
    INITIAL_SIDE,
    MLP,
    ConditionalDecoder,
    Encoder,
    PlainDecoder,
    zero_init_residual_branches,
)
from ovd.modeling.region_head import RegionHead

if TYPE_CHECKING:
    from ovd.data.samples import LabelledSample, PictureSample

OBJECT_PRIOR = 0.01  # probability of an object before training (focal loss, arXiv 1708.02002 §3.3)
REGION_MAP = "res4"  # what a region tower reads


class Detr(nn.Module):
    """The detector.

    Args:
        config: the ``model`` section of a training's configuration.
        backbone: maps normalised pixels to a dict of feature maps.
        features: the maps that are joined at the first one's resolution.
        embed_dim: D.
        classifier: text rows of variant ``text``, else None.
        num_classes: of variant ``closed``.
        region_tower: embeds free queries from res4 inside their boxes; None: from their states.
        pixel_mean, pixel_std: RGB in 0…255.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: DetrConfig,
        *,
        backbone: nn.Module,
        features: Sequence[FeatureMap],
        embed_dim: int,
        classifier: EmbeddingClassifier | None,
        num_classes: int,
        region_tower: RegionHead | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.config, self.features, self.embed_dim = config, tuple(features), embed_dim
        self.queries, self.frozen, self.conditioned = config.queries, config.backbone.frozen, config.conditioned
        self.denoising = Denoising(groups=config.denoising, box_noise=config.box_noise, label_noise=config.label_noise)
        self.criterion = SetCriterion(config.loss, patch_scale=config.scale)
        self.backbone = backbone
        if self.frozen:
            backbone.requires_grad_(False)
        width = config.width
        self.input_proj = nn.Conv2d(sum(f.channels for f in self.features), width, kernel_size=1)
        self.transformer = build_transformer(config)
        self.query_embed = nn.Embedding(config.queries, width)
        self.bbox_embed = MLP(width, width, width, 4)
        if config.arch == "conditional":
            sides = torch.full((config.queries, 2), INITIAL_SIDE)
            spread = torch.cat([torch.rand(config.queries, 2) * 0.9 + 0.05, sides], dim=1)
            self.query_anchor = nn.Parameter(torch.logit(spread))
            nn.init.zeros_(self.bbox_embed.last.weight)
            nn.init.zeros_(self.bbox_embed.last.bias)
            nn.init.normal_(self.query_embed.weight, std=0.02)
        self.class_embed: nn.Linear | None = None
        self.object_embed: nn.Linear | None = None
        if config.variant == "closed":
            self.class_embed = nn.Linear(width, num_classes + 1)
        else:
            self.object_embed = nn.Linear(width, 1)
            if config.loss.object_kind == "focal":
                nn.init.constant_(self.object_embed.bias, float(torch.logit(torch.tensor(OBJECT_PRIOR))))
        self.feature_align = MLP(width, width, embed_dim)
        self.patch2query = ConditionEncoder(embed_dim, width, unit=config.embed_space == "clip")
        self.classifier = classifier
        self.region_tower = region_tower
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

    def forward(self, batch: list[LabelledSample]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """In training the weighted losses; in eval mode Detectron2's ``[{"instances": Instances}, …]``."""
        return self.losses(batch) if self.training else self.detect(batch)

    # --- pixels to tokens

    def normalised(self, pixels: Tensor) -> Tensor:
        """RGB pixels in 0…255 → what the backbone was trained on."""
        return (pixels.to(self.device, torch.float32) - self.pixel_mean) / self.pixel_std

    def maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """Feature maps of (N, 3, H, W) normalised pixels; without a graph where the backbone is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.backbone(pixels)
        return {feature.name: out[feature.name] for feature in self.features}

    def joined(self, maps: dict[str, Tensor]) -> Tensor:
        """(N, C, h, w): all maps at the first one's resolution."""
        first = maps[self.features[0].name]
        resized = [
            F.interpolate(maps[f.name].to(first.dtype), first.shape[-2:], mode="bilinear", align_corners=False)
            for f in self.features[1:]
        ]
        return torch.cat([first, *resized], dim=1) if resized else first

    def pooled(self, pixels: Tensor) -> Tensor:
        """(N, C) average of each map of (N, 3, S, S) patches in 0…255, joined: UP-DETR's patch feature."""
        maps = self.maps(self.normalised(pixels))
        return torch.cat([maps[feature.name].mean(dim=(2, 3)) for feature in self.features], dim=1)

    def maps_of(self, batch: Sequence[PictureSample]) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """Feature maps of a batch, computed or cached, and (height, width) of each network input."""
        if "features" in batch[0]:
            maps = {f.name: self.stacked([x["features"][f.name] for x in batch]) for f in self.features}
            return maps, [(int(x["size"][0]), int(x["size"][1])) for x in batch]
        images = ImageList.from_tensors([self.normalised(x["image"]) for x in batch])  # padding is 0 after that
        return self.maps(images.tensor), [(int(h), int(w)) for h, w in images.image_sizes]

    def stacked(self, cached: list[Tensor]) -> Tensor:
        """Stack the cached tensors of each picture, in float32 on the model's device."""
        with torch.autocast(self.device.type, enabled=False):  # under a CPU's, torch cannot stack half floats
            return torch.stack(cached).to(self.device, torch.float32)

    def memory(self, batch: Sequence[PictureSample]) -> Memory:
        """Encode a batch of pictures, or of their cached features."""
        first = self.features[0]
        maps, sizes = self.maps_of(batch)
        x = self.input_proj(self.joined(maps)).flatten(2).transpose(1, 2)
        height, width = maps[first.name].shape[-2:]
        valid = torch.zeros(len(batch), height, width, dtype=torch.bool, device=self.device)
        for cells, (h, w) in zip(valid, sizes, strict=True):
            cells[: -(-h // first.stride), : -(-w // first.stride)] = True  # rounded up: the smallest has a token
        centred = self.config.arch == "conditional"
        positions = token_positions(valid, centred=centred)
        temperature = CONDITIONAL_TEMPERATURE if centred else DETR_TEMPERATURE
        pos_embed = sine_position_embedding(positions, self.config.width // 2, temperature=temperature)
        pos_embed = pos_embed.flatten(1, 2).to(x.dtype)
        padding = None if bool(valid.all()) else ~valid.flatten(1)
        tokens = self.transformer["encoder"](x, pos_embed=pos_embed, padding=padding)
        return Memory(tokens, pos_embed, padding, sizes, maps)

    # --- queries to boxes

    def decode(
        self,
        memory: Memory,
        *,
        conditions: Tensor | None = None,
        order: Tensor | None = None,
        denoising: DenoisingQueries | None = None,
        mask: Tensor | None = None,
    ) -> DecoderOutput:
        """Run the decoder.

        Args:
            memory: of `memory`.
            conditions: (N, Q, d) added to the queries.
            order: (Q,) permutation of the queries, or None.
            denoising: queries placed before the free ones (conditional only).
            mask: (P + Q, P + Q) bool, True where a query must not attend to another; or (N · heads, P + Q, P + Q).
        """
        count = len(memory.tokens)
        order = torch.arange(self.queries, device=self.device) if order is None else order
        query = self.query_embed.weight[order].expand(count, -1, -1)
        if conditions is not None:
            query = query + conditions
        decoder, tokens = self.transformer["decoder"], memory.tokens
        if self.config.arch == "detr":
            states = decoder(tokens, query_pos=query, pos_embed=memory.pos_embed, mask=mask, padding=memory.padding)
            return DecoderOutput(states, self.bbox_embed(states).float().sigmoid())
        anchors = self.query_anchor[order].expand(count, -1, -1)
        if denoising is not None:
            query = torch.cat([denoising.content, query], dim=1)
            anchors = torch.cat([denoising.anchors, anchors], dim=1)
        states, boxes = decoder(
            tokens,
            content=query,
            anchors=anchors,
            pos_embed=memory.pos_embed,
            mask=mask,
            padding=memory.padding,
            box_head=self.bbox_embed,
        )
        return DecoderOutput(states, boxes)

    def decode_with_denoising(
        self,
        memory: Memory,
        targets: Targets,
        *,
        conditions: Tensor | None = None,
        order: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[DecoderOutput, DecoderOutput | None]:
        """`decode`, and the denoising queries' output beside it: None in eval mode or without targets."""
        dn = None
        if self.training:
            dn = self.denoising.queries(targets, condition=self.patch2query, classifier=self.classifier)
        if dn is None:
            return self.decode(memory, conditions=conditions, order=order, mask=mask), None
        mask = denoising_attention_mask(
            dn.group, queries=self.queries, query_mask_QQ=mask, counts=targets.counts, heads=self.config.heads
        )
        out = self.decode(memory, conditions=conditions, order=order, denoising=dn, mask=mask)
        dn_outputs, outputs = out.split(len(dn.group))
        return outputs, dn_outputs

    def group_conditions(self, conditions_NMD: Tensor) -> tuple[Tensor, Tensor]:
        """(N, Q, d) what is added to each query, its share of M conditions each; and (Q,) its group."""
        group = query_groups(self.queries, conditions_NMD.shape[1]).to(self.device)
        return self.patch2query(conditions_NMD)[:, group], group

    def region_embeddings(self, memory: Memory, image: Tensor, boxes: Tensor) -> Tensor:
        """Region-tower embeddings of (K, 4) boxes of images (K,): (K, D), unnormalised.

        Boxes get no gradient. In float32 also under autocast, for the reason in `OpenVocabularyHeads.prepare`.
        """
        assert self.region_tower is not None
        size = boxes.new_tensor([[w, h, w, h] for h, w in memory.sizes])
        corners = box_convert(boxes.detach().float(), "cxcywh", "xyxy").clamp(0, 1) * size[image]
        rois = torch.cat([image[:, None].to(corners), corners], dim=1)
        stride = next(feature.stride for feature in self.features if feature.name == REGION_MAP)
        pooled = roi_align(
            memory.maps[REGION_MAP].float(), rois, self.region_tower.resolution, 1.0 / stride, 2, aligned=True
        )
        z = self.region_tower(pooled)[1]
        assert z is not None
        return z

    # --- training

    def losses(self, batch: Sequence[LabelledSample]) -> dict[str, Tensor]:
        """Weighted losses of the free queries, the denoising queries (``…_dn``) and those conditioned on words."""
        memory = self.memory(batch)
        targets = Targets.of_instances([x["instances"] for x in batch], device=self.device)
        outputs, dn_outputs = self.decode_with_denoising(memory, targets)
        number = targets_per_process(targets)  # a collective call: once, as not every process has denoising losses
        losses = self.criterion(outputs, targets, self, num_targets=number)
        losses |= self.denoising.losses(
            dn_outputs, targets, criterion=self.criterion, heads=self, num_targets=number, like=losses
        )
        if self.region_tower is not None:
            losses["loss_text"] = self._region_loss(memory, targets, number)
        if self.conditioned:
            losses |= {f"{name}_words": value for name, value in self._conditioned_losses(memory, targets).items()}
        return losses

    def _region_loss(self, memory: Memory, targets: Targets, num_targets: float) -> Tensor:
        """Text loss of the labelled boxes, noised a little as predicted boxes will be; per target."""
        assert self.classifier is not None
        valid = targets.valid
        boxes = apply_box_noise(targets.boxes[valid], self.denoising.box_noise)
        z = self.region_embeddings(memory, valid.nonzero()[:, 0], boxes)
        labels = targets.labels[valid]
        loss = self.classifier.loss(self.classifier(z), labels)
        return self.config.loss.classes * loss * len(labels) / num_targets

    def _conditioned_losses(self, memory: Memory, targets: Targets) -> dict[str, Tensor]:
        """Losses of queries conditioned on words of some classes, present and absent (OV-DETR)."""
        assert self.classifier is not None
        words, word_targets = sample_conditions(targets, self.classifier, count=self.conditioned)
        conditions, group = self.group_conditions(words)
        outputs = self.decode(memory, conditions=conditions, mask=group_attention_mask(group))
        number = targets_per_process(word_targets)
        return self.criterion(outputs, word_targets, self, num_targets=number, query_group_Q=group)

    # --- inference

    @torch.no_grad()
    def predict(self, memory: Memory, *, conditions_NMD: Tensor | None = None) -> QueryOutputs:
        """The last layer's predictions.

        Args:
            memory: of `memory`; it serves any number of sets of queries.
            conditions_NMD: M embeddings per picture, each conditioning its share of the queries; None: free queries.
        """
        conditions = mask = None
        if conditions_NMD is not None:
            conditions, group = self.group_conditions(conditions_NMD)
            mask = group_attention_mask(group)
        out = self.decode(memory, conditions=conditions, mask=mask)
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
        return QueryOutputs(out.boxes[-1], logits, F.normalize(z.float(), dim=-1), classes, memory.sizes)

    @torch.no_grad()
    def detect(self, batch: Sequence[PictureSample]) -> list[dict[str, Instances]]:
        """Each query's best trained class, in pixels of ``height`` × ``width`` where the dict has them."""
        outputs = self.predict(self.memory(batch))
        results = []
        for n, (picture, size_hw) in enumerate(zip(batch, outputs.sizes, strict=True)):
            height, width = int(picture.get("height", size_hw[0])), int(picture.get("width", size_hw[1]))
            instances = Instances((height, width))
            size = outputs.boxes.new_tensor([width, height, width, height])
            boxes = Boxes(box_convert(outputs.boxes[n], "cxcywh", "xyxy") * size)
            boxes.clip((height, width))
            score = outputs.logits[n].sigmoid()
            label = torch.zeros(len(score), dtype=torch.int64, device=score.device)
            if outputs.classes is not None:
                score, label = outputs.classes[n].softmax(-1)[:, :-1].max(-1)
            elif self.classifier is not None:
                text = self.classifier(outputs.embeddings[n])[:, :-1]
                best = text.masked_fill(~self.classifier.trainable, float("-inf")).softmax(-1).max(-1)
                score, label = score * best.values, best.indices
            instances.pred_boxes, instances.scores, instances.pred_classes = boxes, score, label
            results.append({"instances": instances})
        return results


def build_transformer(config: DetrConfig) -> nn.ModuleDict:
    """Encoder and decoder with random weights, under the names of released checkpoints."""
    decoder = ConditionalDecoder if config.arch == "conditional" else PlainDecoder

    def stack(kind: type[Encoder | PlainDecoder | ConditionalDecoder], layers: int) -> nn.Module:
        return kind(
            layers=layers,
            width=config.width,
            heads=config.heads,
            ffn=config.ffn,
            dropout=config.dropout,
            pre_norm=config.pre_norm,
        )

    transformer = nn.ModuleDict(
        {"encoder": stack(Encoder, config.encoder_layers), "decoder": stack(decoder, config.decoder_layers)}
    )
    if config.arch == "detr":
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    elif config.pre_norm:
        for part in transformer.values():
            zero_init_residual_branches(cast(nn.ModuleList, part.layers))
    return transformer
