# SPDX-License-Identifier: Apache-2.0
"""UP-DETR: pretrain a detection transformer by finding random patches of a picture (Dai et al., arXiv 2011.09094).

Particular to it: the backbone is frozen; embeddings of M patches condition the object queries, each its share of them;
an attention mask keeps queries of different patches apart (`attention_mask.group_attention_mask`); a tenth of the
queries gets no patch; beside the box, the embedding of the patch is reconstructed, so that localisation does not
unlearn recognition.

Denoising queries (`denoising`) get a patch and its noised box, or the box alone. A query that searches the whole
picture for its patch would otherwise learn to ignore its anchor, which fine-tuning needs.

By default a patch is matched with its own queries only. The released code matches any query with any patch
(``grouped=False``); at the size of a CPU it then learns to ignore the patches.

Shapes: ``N`` images, ``M`` patches, ``Q`` queries, ``K`` crops of a patch, ``D`` embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from ovd.modeling.boxes import box_iou_and_giou
from ovd.modeling.detr.attention_mask import group_attention_mask
from ovd.modeling.detr.criterion import targets_per_process
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.structures import DecoderOutput, Targets
from ovd.modeling.detr.task import DetrTask

if TYPE_CHECKING:
    from ovd.data.samples import PatchSample


class PatchPretext(DetrTask):
    """Random query patch detection as a task of the training loop.

    Args:
        model: the transformer, with any number of queries Q ≥ M.
        embed: (P, K, 3, S, S) uint8 patches → (P, D); frozen.
        grouped: match a patch with its own queries only.
        attention_mask: queries of different patches do not attend to each other.
        shuffle: permute the object queries each step, one permutation for the batch (released code's option).
        mask_queries: share of queries without a patch, per query and picture, in training only.
        held_out: batches of pictures on which localisation is measured.
        evaluate_every: steps between measurements.
        pretrained_lr_scale: learning-rate factor of an unfrozen backbone.
    """

    def __init__(
        self,
        *,
        model: Detr,
        embed: Callable[[Tensor], Tensor],
        grouped: bool = True,
        attention_mask: bool = True,
        shuffle: bool = False,
        mask_queries: float = 0.1,
        held_out: list[list[PatchSample]] | None = None,
        evaluate_every: int = 200,
        pretrained_lr_scale: float = 0.1,
    ) -> None:
        super().__init__(model=model, pretrained_lr_scale=pretrained_lr_scale)
        self.embed = embed
        self.grouped, self.attention_mask, self.shuffle, self.mask_queries = (
            grouped, attention_mask, shuffle, mask_queries
        )  # fmt: skip
        self.held_out = held_out or []
        self.evaluate_every = evaluate_every
        self._steps, self._measured = 0, -1

    def forward(self, batch: list[PatchSample]) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of the losses, each loss detached)."""
        model = self.detr
        outputs, dn_outputs, targets, group = self._decode(batch)
        number = targets_per_process(targets)
        losses = model.criterion(
            outputs, targets, model, num_targets=number, query_group_Q=group if self.grouped else None
        )
        # Denoising queries carry their patch's embedding, so there is nothing to reconstruct.
        boxes_only = targets._replace(embeddings=None, groups=None)
        losses |= model.denoising.losses(
            dn_outputs, boxes_only, criterion=model.criterion, heads=model, num_targets=number, like=losses
        )
        total = torch.stack(list(losses.values())).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    def predict(self, batch: Sequence[PatchSample]) -> tuple[DecoderOutput, Targets, Tensor]:
        """Decoder output, the patches as targets, and the (Q,) group of each query."""
        outputs, _, targets, group = self._decode(batch)
        return outputs, targets, group

    def _decode(self, batch: Sequence[PatchSample]) -> tuple[DecoderOutput, DecoderOutput | None, Targets, Tensor]:
        """`predict`, with the denoising queries' output second: None in eval mode."""
        model = self.detr
        embeddings = self.patch_embeddings(batch)
        memory = model.memory(batch)
        patches = embeddings.shape[1]
        boxes = torch.stack([x["boxes"] for x in batch]).to(model.device)
        size = torch.tensor([[w, h, w, h] for h, w in memory.sizes], device=model.device, dtype=boxes.dtype)
        number = torch.arange(patches, device=model.device).expand(len(batch), -1)
        targets = Targets(
            boxes=box_convert(boxes / size[:, None], "xyxy", "cxcywh"),
            labels=torch.zeros_like(number),
            counts=[patches] * len(batch),
            groups=number if self.grouped else None,
            embeddings=embeddings,
        )
        conditions, group = self.conditions(embeddings)
        order = torch.randperm(model.queries, device=model.device) if self.shuffle and self.training else None
        mask = group_attention_mask(group) if self.attention_mask and patches > 1 else None
        outputs, dn_outputs = model.decode_with_denoising(
            memory, targets, conditions=conditions, order=order, mask=mask
        )
        return outputs, dn_outputs, targets, group

    def patch_embeddings(self, batch: Sequence[PatchSample]) -> Tensor:
        """(N, M, D) of the patches, cached or computed, never with a gradient."""
        if "embeddings" in batch[0]:
            return self.detr.stacked([x["embeddings"] for x in batch])
        with torch.no_grad():
            patches = torch.stack([x["patches"] for x in batch]).to(self.detr.device)
            return self.embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).float()

    def conditions(self, embeddings_NMD: Tensor) -> tuple[Tensor, Tensor]:
        """(N, Q, d) what is added to each query: its patch, or nothing for masked ones (training only); (Q,) groups."""
        conditions, group = self.detr.group_conditions(embeddings_NMD)
        if self.training and self.mask_queries:
            keep = torch.rand(conditions.shape[:2], device=conditions.device) >= self.mask_queries
            conditions = conditions * keep[..., None]
        return conditions, group

    def after_step(self, step: int, total: int) -> None:
        """Count steps, so that measurements come at the right ones after a resume too."""
        self._steps = step + 1

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Localisation on the held-out pictures, every ``evaluate_every`` steps."""
        due = self._steps // self.evaluate_every
        if not self.held_out or due == self._measured:
            return {}, []
        self._measured = due
        return self.measure(self.held_out), []

    @torch.no_grad()
    def measure(self, batches: Sequence[Sequence[PatchSample]]) -> dict[str, float]:
        """How well patches are localised.

        Returns:
            ``patch_miou`` and ``patch_recall50``: IoU of each patch's most certain query with the patch's own box;
            ``patch_look_alike``: share of patches whose most similar token lies within them; compare it with
            ``patch_area``, the share of the picture that they cover. Both need no training, so the first step already
            shows how well a backbone localises.
        """
        was_training = self.training
        self.eval()
        iou = torch.cat([self.localisation_iou(batch) for batch in batches])
        inside, area = (
            torch.cat(part) for part in zip(*(self.most_similar_token(batch) for batch in batches), strict=True)
        )
        self.train(was_training)
        return {
            "patch_miou": float(iou.mean()),
            "patch_recall50": float((iou >= 0.5).float().mean()),
            "patch_look_alike": float(inside.float().mean()),
            "patch_area": float(area.mean()),
        }

    @torch.no_grad()
    def most_similar_token(self, batch: Sequence[PatchSample]) -> tuple[Tensor, Tensor]:
        """Per patch (N · M,): whether the token most similar to its query lies within it; its share of the picture."""
        model = self.detr
        query = F.normalize(model.patch2query(self.patch_embeddings(batch)), dim=-1)
        maps, sizes = model.maps_of(batch)
        key = F.normalize(model.input_proj(model.joined(maps)), dim=1)
        stride = model.features[0].stride
        inside, area = [], []
        for n, (sample, (height, width)) in enumerate(zip(batch, sizes, strict=True)):
            rows, columns = -(-height // stride), -(-width // stride)  # without the padding
            best = (query[n] @ key[n, :, :rows, :columns].flatten(1)).argmax(1)
            y, x = (best // columns + 0.5) * height / rows, (best % columns + 0.5) * width / columns
            x1, y1, x2, y2 = sample["boxes"].to(best.device).unbind(1)
            inside.append((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2))
            area.append((x2 - x1) * (y2 - y1) / (height * width))
        return torch.cat(inside), torch.cat(area)

    @torch.no_grad()
    def localisation_iou(self, batch: Sequence[PatchSample]) -> Tensor:
        """(N · M,) IoU of each patch's box with that of its most certain query."""
        outputs, targets, group = self.predict(batch)
        best = self.best_queries(outputs, group, targets.boxes.shape[1])
        boxes = outputs.boxes[-1].gather(1, best[..., None].expand(-1, -1, 4))
        corners = [box_convert(each, "cxcywh", "xyxy") for each in (boxes, targets.boxes)]
        return box_iou_and_giou(*corners)[0].flatten()

    def best_queries(self, outputs: DecoderOutput, group: Tensor, patches: int) -> Tensor:
        """(N, M) the most certain query of each patch's group, in the last layer."""
        assert self.detr.object_embed is not None
        score = self.detr.object_embed(outputs.states[-1])[..., 0]
        in_group = group[None, :, None] == torch.arange(patches, device=group.device)
        return score[..., None].masked_fill(~in_group, float("-inf")).argmax(dim=1)
