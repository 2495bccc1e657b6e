# SPDX-License-Identifier: Apache-2.0
"""The content of a shard of a region store: proposals of its pictures and the embeddings of their crops.

Shape legend as in `ovd.regions.layout`.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from ovd.regions.crops import RegionEncoder, crop_regions, embed_crops
from ovd.regions.layout import (
    FORMAT,
    ImageId,
    ImageSource,
    Manifest,
    StoreSettings,
    shard_path,
    shard_rows,
    sidecar_path,
    write_json,
)
from ovd.regions.proposals import PositionProposer, Proposals, Proposer, select_proposals
from pretrain.engine.errors import BadImageError
from pretrain.engine.files import flush_to_disk


@dataclass(frozen=True, kw_only=True)
class RegionEmbedder:
    """Proposes, crops and embeds the regions of a store.

    Attributes:
        source: the pictures.
        proposer: the proposal model, or a `PositionProposer`.
        encoder: the image encoder, in eval mode.
        settings: of the store.
        batch_size: crops per forward.
    """

    source: ImageSource
    proposer: Proposer
    encoder: RegionEncoder
    settings: StoreSettings
    batch_size: int

    def regions(self, index: int) -> tuple[Proposals, torch.Tensor]:
        """The proposals of picture ``index`` and their crops.

        Raises:
            BadImageError: it cannot be read.
        """
        settings, image = self.settings, self.source.image(index)
        if isinstance(self.proposer, PositionProposer):
            boxes, scores = self.proposer.propose_at(index)
        else:
            boxes, scores = self.proposer.propose(image, top=settings.proposals_per_image)
        proposals = select_proposals(
            boxes,
            scores,
            width=image.shape[1],
            height=image.shape[0],
            top=settings.proposals_per_image,
            min_side=settings.min_side,
        )
        crops = crop_regions(
            image,
            proposals.boxes,
            size=settings.crop_size,
            scales=settings.scales,
            mode=settings.crop_mode,
            border=settings.border,
            fill=self.encoder.image_mean,
            resample=settings.resample,
        )
        return proposals, crops


class _Batches:
    """Crops of one picture after another, embedded in batches of one size.

    Args:
        embedder: its encoder embeds.
        rows_SD: (boxes of the shard, D) fp16, is filled.
        heartbeat: called after each batch.
    """

    def __init__(self, embedder: RegionEmbedder, rows_SD: torch.Tensor, heartbeat: Callable[[], None]) -> None:
        self.embedder, self.rows_SD, self.heartbeat = embedder, rows_SD, heartbeat
        self.boxes = max(1, embedder.batch_size // len(embedder.settings.scales))
        self._crops: list[torch.Tensor] = []
        self._slots: list[int] = []

    def add(self, crops: torch.Tensor, slots: range) -> None:
        """Crops of some boxes, and the rows that their embeddings go to."""
        if slots:
            self._crops.append(crops)
            self._slots.extend(slots)
        if len(self._slots) >= self.boxes:
            self._embed(self.boxes)

    def finish(self) -> None:
        """Embed what is left, in a smaller batch."""
        self._embed(1)

    def _embed(self, minimum: int) -> None:
        """Embed batches while so many boxes wait."""
        settings = self.embedder.settings
        waiting = torch.cat(self._crops) if self._crops else torch.zeros(0)
        while len(self._slots) >= minimum:
            batch, waiting = waiting[: self.boxes], waiting[self.boxes :]
            slots, self._slots = self._slots[: self.boxes], self._slots[self.boxes :]
            embedded = embed_crops(
                self.embedder.encoder,
                batch,
                normalise_each=settings.normalise_each,
                batch_size=self.boxes * len(settings.scales),
                precision=settings.precision,
            )
            self.rows_SD[torch.tensor(slots)] = embedded.to(torch.float16)
            self.heartbeat()
        self._crops = [waiting] if len(waiting) else []


def write_shard(
    path: Path, shard: int, *, manifest: Manifest, embedder: RegionEmbedder, heartbeat: Callable[[], None]
) -> int:
    """Write a shard and its sidecar; returns how many of its pictures could not be read.

    Args:
        path: the store.
        shard: its number.
        manifest: of the store.
        embedder: makes the content.
        heartbeat: called now and then, so that the shard's lease stays fresh.

    Raises:
        FileNotFoundError: another process took the shard over and swept the temporary file away.
    """
    rows, top, dim = shard_rows(manifest, shard), embedder.settings.proposals_per_image, int(manifest["dim"])
    tensors = {
        "embeddings": torch.zeros(len(rows), top, dim, dtype=torch.float16),
        "boxes": torch.zeros(len(rows), top, 4),
        "scores": torch.zeros(len(rows), top),
        "valid": torch.zeros(len(rows), dtype=torch.int64),
    }
    batches = _Batches(embedder, tensors["embeddings"].view(-1, dim), heartbeat)
    bad: list[tuple[ImageId, str]] = []
    for row, index in enumerate(rows):
        try:
            proposals, crops = embedder.regions(index)
        except BadImageError as error:
            bad.append((embedder.source.ids[index], error.reason))
            continue
        heartbeat()
        count = len(proposals.boxes)
        tensors["boxes"][row, :count] = torch.from_numpy(proposals.boxes)
        tensors["scores"][row, :count] = torch.from_numpy(proposals.scores)
        tensors["valid"][row] = count
        batches.add(crops, range(row * top, row * top + count))
    batches.finish()
    _save(path, shard, tensors, bad)
    return len(bad)


def _save(path: Path, shard: int, tensors: dict[str, torch.Tensor], bad: list[tuple[ImageId, str]]) -> None:
    """The tensors, then the sidecar, which says that the shard is whole."""
    # One key of metadata: safetensors writes several in random order. Its own file writer makes files private (0600).
    data = save(tensors, metadata={"format": FORMAT})
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    temporary = path / f".shard-{shard:05d}.safetensors.{uuid.uuid4().hex}.tmp"
    temporary.write_bytes(data)
    flush_to_disk(temporary)
    os.replace(temporary, shard_path(path, shard))
    flush_to_disk(path)
    counts = {"images": len(tensors["valid"]), "regions": int(tensors["valid"].sum())}
    write_json(sidecar_path(path, shard), {"sha256": digest, "bytes": size, **counts, "bad_images": bad})
