# SPDX-License-Identifier: Apache-2.0
"""UP-DETR: pretrain a detection transformer by finding random patches of a picture (Dai et al., arXiv 2011.09094).

Particular to it: the backbone is frozen; embeddings of M patches are added to the object queries, each to its share of
them; queries of different patches do not see each other; a tenth of the queries gets no patch; beside the box, the
embedding of the patch is reconstructed, so that finding does not unlearn recognising.

Denoising queries (`Detr.denoising`) are told a patch and its noised box, or the box alone, so that an anchor keeps some
meaning: a query that searches the whole picture for its patch has no use for it, and fine-tuning has.

By default a patch is matched among its own queries only. The released code lets any query explain any patch
(``grouped=False``); at the size of a CPU it then learns to ignore the patches.

Shapes: ``N`` images, ``M`` patches, ``Q`` queries, ``K`` crops of a patch, ``D`` embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd.modeling.detr.matcher import group_mask, groups_of, overlaps, to_centres, to_corners
from ovd.modeling.detr.network import Decoded, Detr, Targets
from ovd.modeling.task import DetectionTask


class PatchPretext(DetectionTask):
    """The pretext as a task of the training loop.

    Args:
        model: the transformer, with any number of queries Q ≥ M.
        embed: (P, K, 3, S, S) uint8 patches → (P, D); frozen.
        grouped: match a patch among its own queries.
        attention_mask: hide queries of different patches from each other.
        shuffle: permute the object queries each step, one permutation for the batch (released code's option).
        mask_queries: share of queries without a patch, per query and picture, in training only.
        held_out: batches of pictures on which localisation is measured.
        evaluate_every: steps between measurements.
        pretrained_lr_scale: learning-rate factor of an unfrozen backbone.
    """

    find_unused_parameters = True

    def __init__(
        self,
        *,
        model: Detr,
        embed: Callable[[Tensor], Tensor],
        grouped: bool = True,
        attention_mask: bool = True,
        shuffle: bool = False,
        mask_queries: float = 0.1,
        held_out: list[list[dict[str, Any]]] | None = None,
        evaluate_every: int = 200,
        pretrained_lr_scale: float = 0.1,
    ) -> None:
        super().__init__(model=model, pretrained_prefixes=("backbone.",), pretrained_lr_scale=pretrained_lr_scale)
        self.embed = embed
        self.grouped, self.attention_mask, self.shuffle, self.mask_queries = (
            grouped, attention_mask, shuffle, mask_queries
        )  # fmt: skip
        self.held_out = held_out or []
        self.evaluate_every = evaluate_every
        self.untracked = ("model.backbone.",) if model.frozen else ()
        self._steps, self._measured = 0, -1

    @property
    def detr(self) -> Detr:
        """The transformer."""
        return cast(Detr, self.model)

    def forward(self, batch: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of the losses, each of them)."""
        out, taught, targets, group = self._decoded(batch)
        number = self.detr.mean_targets(targets)
        losses = self.detr.losses(out, targets, group=group if self.grouped else None, number=number)
        # Denoising queries carry their patch's embedding, so what they are like is no question.
        boxes_only = targets._replace(embeddings=None, groups=None)
        losses |= self.detr.denoising_losses(taught, boxes_only, number=number, like=losses)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    def predict(self, batch: list[dict[str, Any]]) -> tuple[Decoded, Targets, Tensor]:
        """Decoder output, the patches as targets, and the (Q,) group of each query."""
        out, _, targets, group = self._decoded(batch)
        return out, targets, group

    def _decoded(self, batch: list[dict[str, Any]]) -> tuple[Decoded, Decoded | None, Targets, Tensor]:
        """`predict`, with the denoising queries' output second: None outside of training."""
        model = self.detr
        embeddings = self.embeddings(batch)
        memory = model.memory(batch)
        patches = embeddings.shape[1]
        boxes = torch.stack([x["boxes"] for x in batch]).to(model.device)
        size = torch.tensor([[w, h, w, h] for h, w in memory.sizes], device=model.device, dtype=boxes.dtype)
        number = torch.arange(patches, device=model.device).expand(len(batch), -1)
        targets = Targets(
            to_centres(boxes / size[:, None]),
            torch.zeros_like(number),
            [patches] * len(batch),
            number if self.grouped else None,
            embeddings,
        )
        group = groups_of(model.queries, patches).to(model.device)
        added = self.conditions(embeddings, group)
        order = torch.randperm(model.queries, device=model.device) if self.shuffle and self.training else None
        mask = group_mask(group) if self.attention_mask and patches > 1 else None
        out, taught = model.decode_taught(memory, targets, added=added, order=order, mask=mask)
        return out, taught, targets, group

    def embeddings(self, batch: list[dict[str, Any]]) -> Tensor:
        """(N, M, D) of the patches, cached or computed, never with a gradient."""
        if "embeddings" in batch[0]:
            return self.detr.stacked([x["embeddings"] for x in batch])
        with torch.no_grad():
            patches = torch.stack([x["patches"] for x in batch]).to(self.detr.device)
            return self.embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).float()

    def conditions(self, embeddings: Tensor, group: Tensor) -> Tensor:
        """(N, Q, d) what is added to each query: its patch, or nothing for the masked ones (training only)."""
        added = self.detr.patch2query(embeddings)[:, group]
        if self.training and self.mask_queries:
            keep = torch.rand(added.shape[:2], device=added.device) >= self.mask_queries
            added = added * keep[..., None]
        return added

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
    def measure(self, batches: list[list[dict[str, Any]]]) -> dict[str, float]:
        """How well patches are found.

        Returns:
            ``patch_miou`` and ``patch_recall50``: IoU of each patch's most certain query with the patch's own box;
            ``patch_look_alike``: share of patches whose most similar token lies within them. That needs no training, so
            at the first step it tells in seconds what a backbone is good for, beside the share of the picture that
            patches cover, ``patch_area``.
        """
        was = self.training
        self.eval()
        found = torch.cat([self.localised(batch) for batch in batches])
        alike, area = (torch.cat(part) for part in zip(*(self.look_alike(batch) for batch in batches), strict=True))
        self.train(was)
        return {
            "patch_miou": float(found.mean()),
            "patch_recall50": float((found >= 0.5).float().mean()),
            "patch_look_alike": float(alike.float().mean()),
            "patch_area": float(area.mean()),
        }

    @torch.no_grad()
    def look_alike(self, batch: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Per patch (N · M,): does its most similar token lie within it, and its share of the picture."""
        model = self.detr
        query = F.normalize(model.patch2query(self.embeddings(batch)), dim=-1)
        maps, sizes = model.maps_of(batch)
        key = F.normalize(model.input_proj(model.joined(maps)), dim=1)
        stride = model.features[0][2]
        inside, area = [], []
        for n, (one, (height, width)) in enumerate(zip(batch, sizes, strict=True)):
            rows, columns = -(-height // stride), -(-width // stride)  # without the padding
            best = (query[n] @ key[n, :, :rows, :columns].flatten(1)).argmax(1)
            y, x = (best // columns + 0.5) * height / rows, (best % columns + 0.5) * width / columns
            x1, y1, x2, y2 = one["boxes"].to(best.device).unbind(1)
            inside.append((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2))
            area.append((x2 - x1) * (y2 - y1) / (height * width))
        return torch.cat(inside), torch.cat(area)

    @torch.no_grad()
    def localised(self, batch: list[dict[str, Any]]) -> Tensor:
        """(N · M,) IoU of the answers."""
        out, targets, group = self.predict(batch)
        best = self.answering(out, group, targets.boxes.shape[1])
        boxes = out.boxes[-1].gather(1, best[..., None].expand(-1, -1, 4))
        return overlaps(to_corners(boxes), to_corners(targets.boxes))[0].flatten()

    def answering(self, out: Decoded, group: Tensor, patches: int) -> Tensor:
        """(N, M) the query that answers for each patch: the most certain one of its own, in the last layer."""
        assert self.detr.object_embed is not None
        score = self.detr.object_embed(out.states[-1])[..., 0]
        own = group[None, :, None] == torch.arange(patches, device=group.device)
        return score[..., None].masked_fill(~own, float("-inf")).argmax(dim=1)
