# SPDX-License-Identifier: Apache-2.0
"""Writing a region store, with any number of processes on one folder (`ovd.regions.layout` has the files)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save

from ovd.regions.crops import RegionEncoder, crop_regions, embed_crops
from ovd.regions.layout import (
    FORMAT,
    Identity,
    ImageId,
    ImageSource,
    Manifest,
    SettingsRecord,
    ShardSum,
    StoreSettings,
    as_json,
    ids_path,
    manifest_path,
    read_ids,
    read_manifest,
    refuse_differences,
    rows_of,
    shard_count,
    shard_path,
    sidecar,
    sidecar_path,
    write_json,
    write_text,
    write_text_once,
)
from ovd.regions.lease import lease
from ovd.regions.proposals import PositionProposer, Proposals, Proposer, select_proposals
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import flush_to_disk, sha256_of

BAD_IMAGE_SHARE = 0.01
"""Share of unreadable pictures above which writing stops."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Size of a store before it is written: bytes in all, bytes still to write, pictures still to do."""

    total_bytes: int
    missing_bytes: int
    missing_images: int
    images: int


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What one process did: shards it wrote, shards it found whole, unreadable pictures it met, whether all is done."""

    written: int
    kept: int
    bad_images: int
    complete: bool


def estimate(source_length: int, *, identity: Identity, root: Path | None = None) -> Estimate:
    """Bytes a store takes, and how much of it is still to be written into ``root``."""
    settings = identity.settings
    per_image = _bytes_per_image(settings.proposals_per_image, identity.dim)
    done = 0
    if root is not None and manifest_path(root).is_file():
        manifest = read_manifest(root)
        for shard in range(shard_count(manifest)):
            if sidecar(root, shard) is not None:
                done += len(rows_of(manifest, shard))
    overhead = 1024 * (1 + -(-source_length // settings.images_per_shard)) + 24 * source_length
    missing = max(source_length - done, 0)
    return Estimate(
        total_bytes=per_image * source_length + overhead,
        missing_bytes=per_image * missing + overhead,
        missing_images=missing,
        images=source_length,
    )


def write_regions(
    root: str | os.PathLike[str],
    *,
    source: ImageSource,
    proposer: Proposer,
    encoder: RegionEncoder,
    identity: Identity,
    batch_size: int = 256,
    lease_seconds: float = 300.0,
    wait: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> WriteReport:
    """Write the missing shards of a store. Any number of processes may call this on one folder at the same time.

    Args:
        root: the folder; made when absent, continued when it holds a store of the same identity.
        source: the pictures.
        proposer: the proposal model, or a `PositionProposer`.
        encoder: the image encoder, in eval mode.
        identity: what goes into the manifest.
        batch_size: crops per forward. Sums in another order may differ in the last bit: keep it when resuming.
        lease_seconds: a lease untouched for this long is taken over.
        wait: wait for shards that other processes are writing; otherwise return without them.
        say: receives progress lines.

    Raises:
        UserError: another identity in ``root``, not enough disk, or too many unreadable pictures.
    """
    path = Path(root)
    manifest = _create(path, source=source, identity=identity)
    plan = estimate(len(source), identity=identity, root=path)
    _refuse_small_disk(path, plan)
    shards = shard_count(manifest)
    done: set[int] = set()
    written = kept = bad = 0
    for shard in range(shards):
        if _is_whole(path, shard, say):
            done.add(shard)
            kept += 1
            side = sidecar(path, shard)
            bad += len(side.get("bad_images", ())) if side is not None else 0
    if plan.missing_images:
        line = plan_line(
            source=source,
            proposer=proposer,
            encoder=encoder,
            identity=identity,
            batch_size=batch_size,
            root=path,
        )
        say(line)
    while len(done) < shards:
        progress = False
        for shard in range(shards):
            if shard in done:
                continue
            if sidecar(path, shard) is not None and _is_whole(path, shard, say):  # another process was faster
                done.add(shard)
                progress = True
                continue
            with lease(path / f"shard-{shard:05d}.lease", lease_seconds) as beat:
                if beat is None or sidecar(path, shard) is not None:
                    continue
                start = time.monotonic()
                _sweep(path, shard)
                try:
                    bad += _write_shard(
                        path,
                        shard,
                        manifest=manifest,
                        source=source,
                        proposer=proposer,
                        encoder=encoder,
                        settings=identity.settings,
                        batch_size=batch_size,
                        beat=beat,
                    )
                except FileNotFoundError:
                    # Our lease went stale, and the process that took it over swept our temporary file away.
                    say(f"shard {shard} was taken over by another process")
                    continue
                _refuse_many_bad(path, bad, len(source))
                written += 1
                progress = True
                done.add(shard)
                rows = len(rows_of(manifest, shard))
                took = max(time.monotonic() - start, 1e-9)
                say(f"shard {len(done)}/{shards}: {rows} pictures in {took:.1f} s ({rows / took:.2f} pictures/s)")
        if not progress and len(done) < shards:
            if not wait:
                break
            time.sleep(min(1.0, lease_seconds / 4))
    complete = len(done) == shards
    if complete:
        _refuse_many_bad(path, bad, len(source))
        _finish(path)
    return WriteReport(written=written, kept=kept, bad_images=bad, complete=complete)


def _refuse_many_bad(path: Path, bad: int, pictures: int) -> None:
    """Stop when more pictures than a few are unreadable, also where an earlier run met them."""
    if bad > max(1, int(BAD_IMAGE_SHARE * pictures)):
        raise UserError(
            f"{path}: {bad} of {pictures} pictures cannot be read, more than {BAD_IMAGE_SHARE:.0%}; they are listed in "
            "the shard-*.json files"
        )


def plan_line(
    *,
    source: ImageSource,
    proposer: Proposer,
    encoder: RegionEncoder,
    identity: Identity,
    batch_size: int = 256,
    root: Path | None = None,
) -> str:
    """Size and time in one line; the time is that of the second of two pictures (the first one warms up)."""
    plan = estimate(len(source), identity=identity, root=root)
    settings = identity.settings
    took = 0.0
    for index in range(min(2, len(source))):
        start = time.perf_counter()
        try:
            _, crops = _regions_of(index, source=source, proposer=proposer, encoder=encoder, settings=settings)
        except BadImageError:
            continue
        embed_crops(encoder, crops, batch_size=batch_size, precision=settings.precision)
        took = time.perf_counter() - start
    minutes = took * plan.missing_images / 60
    duration = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return (
        f"{plan.images} pictures x {settings.proposals_per_image} proposals x {identity.dim} numbers: "
        f"{_human(plan.total_bytes)} in all; {plan.missing_images} pictures to go: {_human(plan.missing_bytes)}, "
        f"about {duration} for one process ({took:.2f} s per picture)"
    )


def remove_store(root: str | os.PathLike[str]) -> None:
    """Delete the files of a store, and nothing else; a missing or empty folder is fine.

    Raises:
        UserError: the folder holds other files and no store.
    """
    path = Path(root)
    if not path.is_dir() or not any(path.iterdir()):
        return
    read_manifest(path)
    manifest_path(path).unlink()  # first, so that half a removal is no store
    for pattern in ("shard-*", "images-*.json", ".*.tmp"):
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)


def _regions_of(
    index: int, *, source: ImageSource, proposer: Proposer, encoder: RegionEncoder, settings: StoreSettings
) -> tuple[Proposals, torch.Tensor]:
    image = source.image(index)
    if isinstance(proposer, PositionProposer):
        boxes, scores = proposer.propose_at(index)
    else:
        boxes, scores = proposer.propose(image, top=settings.proposals_per_image)
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
        fill=encoder.image_mean,
        resample=settings.resample,
    )
    return proposals, crops


def _write_shard(
    path: Path,
    shard: int,
    *,
    manifest: Manifest,
    source: ImageSource,
    proposer: Proposer,
    encoder: RegionEncoder,
    settings: StoreSettings,
    batch_size: int,
    beat: Callable[[], None],
) -> int:
    rows = rows_of(manifest, shard)
    top, dim = settings.proposals_per_image, int(manifest["dim"])
    tensors = {
        "embeddings": torch.zeros(len(rows), top, dim, dtype=torch.float16),
        "boxes": torch.zeros(len(rows), top, 4),
        "scores": torch.zeros(len(rows), top),
        "valid": torch.zeros(len(rows), dtype=torch.int64),
    }
    flat = tensors["embeddings"].view(-1, dim)
    boxes_per_batch = max(1, batch_size // len(settings.scales))
    crops: list[torch.Tensor] = []
    slots: list[int] = []
    bad: list[tuple[ImageId, str]] = []

    def flush(every: bool) -> None:
        nonlocal crops, slots
        waiting = torch.cat(crops) if crops else torch.zeros(0)
        while len(slots) >= boxes_per_batch or (every and slots):
            batch, waiting = waiting[:boxes_per_batch], waiting[boxes_per_batch:]
            rows_of_batch, slots = slots[:boxes_per_batch], slots[boxes_per_batch:]
            embedded = embed_crops(
                encoder,
                batch,
                normalise_each=settings.normalise_each,
                batch_size=boxes_per_batch * len(settings.scales),
                precision=settings.precision,
            )
            flat[torch.tensor(rows_of_batch)] = embedded.to(torch.float16)
            beat()
        crops = [waiting] if len(waiting) else []

    for row, index in enumerate(rows):
        try:
            proposals, cut = _regions_of(index, source=source, proposer=proposer, encoder=encoder, settings=settings)
        except BadImageError as error:
            bad.append((source.ids[index], error.reason))
            continue
        beat()
        count = len(proposals.boxes)
        tensors["boxes"][row, :count] = torch.from_numpy(proposals.boxes)
        tensors["scores"][row, :count] = torch.from_numpy(proposals.scores)
        tensors["valid"][row] = count
        if count:
            crops.append(cut)
            slots.extend(range(row * top, row * top + count))
        if len(slots) >= boxes_per_batch:
            flush(every=False)
    flush(every=True)

    # One key of metadata: safetensors writes several in random order. Its own file writer makes files private (0600).
    data = save(tensors, metadata={"format": FORMAT})
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    temporary = path / f".shard-{shard:05d}.safetensors.{uuid.uuid4().hex}.tmp"
    temporary.write_bytes(data)
    flush_to_disk(temporary)
    os.replace(temporary, shard_path(path, shard))
    flush_to_disk(path)
    counts = {"images": len(rows), "regions": int(tensors["valid"].sum())}
    write_json(sidecar_path(path, shard), {"sha256": digest, "bytes": size, **counts, "bad_images": bad})
    return len(bad)


def _create(path: Path, *, source: ImageSource, identity: Identity) -> Manifest:
    """Make the folder and its manifest, or check that the present one is the same store. Safe between processes."""
    ids = list(source.ids)
    if len(set(ids)) != len(ids):
        raise UserError("picture ids repeat: every picture of a region store needs its own id")
    if not ids:
        raise UserError("there are no pictures to embed")
    ids_text = json.dumps(ids)
    manifest: Manifest = {
        "format": FORMAT,
        "encoder": identity.encoder,
        "dim": identity.dim,
        "proposals": identity.proposals,
        "source": identity.source,
        "settings": cast(SettingsRecord, as_json(asdict(identity.settings))),
        "images": {"count": len(ids), "sha256": hashlib.sha256(ids_text.encode()).hexdigest()},
        "dtype": "float16",
        "notes": as_json(dict(identity.notes)),
    }
    target = manifest_path(path)
    if not target.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file: choose another `out`")
        path.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in path.iterdir() if not entry.name.startswith((".", "images-"))]
        if others and not target.is_file():  # another process may just have made the store
            raise UserError(f"{path}: is not a region store and not empty ({others[0]} …): choose another `out`")
        write_text(ids_path(path, manifest), ids_text)
        write_text_once(target, json.dumps(manifest, indent=1))
    present = read_manifest(path)
    compared = ("encoder", "dim", "proposals", "source", "settings", "images")
    refuse_differences(path, present, {key: value for key, value in manifest.items() if key in compared})
    read_ids(path, present)
    return present


def _finish(path: Path) -> None:
    """Put the hashes of all shards into the manifest. Every process that gets here writes the same bytes."""
    manifest = read_manifest(path)
    records: list[ShardSum] = []
    for shard in range(shard_count(manifest)):
        side = sidecar(path, shard)
        if side is None:
            return  # somebody found it damaged and is writing it again; they will finish
        records.append(
            ShardSum(sha256=side["sha256"], bytes=side["bytes"], images=side["images"], regions=side["regions"])
        )
    manifest["shards"] = records
    manifest["regions"] = sum(record["regions"] for record in records)
    write_json(manifest_path(path), manifest)
    for pattern in ("shard-*.lease", ".shard-*.tmp"):  # of processes that were killed
        for leftover in path.glob(pattern):
            leftover.unlink(missing_ok=True)


def _is_whole(path: Path, shard: int, say: Callable[[str], None]) -> bool:
    side = sidecar(path, shard)
    if side is None:
        return False
    file = shard_path(path, shard)
    if file.is_file() and file.stat().st_size == side["bytes"] and sha256_of(file) == side["sha256"]:
        return True
    say(f"warning: {file.name} is damaged and will be written again")
    sidecar_path(path, shard).unlink(missing_ok=True)
    return False


def _sweep(path: Path, shard: int) -> None:
    """Remove what a killed writer of this shard left behind."""
    for leftover in path.glob(f".shard-{shard:05d}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _bytes_per_image(top: int, dim: int) -> int:
    return top * (2 * dim + 4 * 4 + 4) + 8


def _refuse_small_disk(path: Path, plan: Estimate) -> None:
    free = shutil.disk_usage(path).free
    needed = int(plan.missing_bytes * 1.02) + (64 << 20)
    if plan.missing_images and free < needed:
        raise UserError(
            f"{path}: {_human(needed)} are needed but only {_human(free)} are free: free some space, choose another "
            f"`out`, or lower `proposals_per_image`"
        )


def _human(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
