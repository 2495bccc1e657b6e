# SPDX-License-Identifier: Apache-2.0
"""Writing a region store, with any number of processes on one folder (`ovd.regions.layout` has the files)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ovd.regions.crops import RegionEncoder, embed_crops
from ovd.regions.layout import (
    FORMAT,
    Identity,
    ImageSource,
    Manifest,
    ShardSum,
    as_json,
    ids_path,
    manifest_path,
    read_ids,
    read_manifest,
    read_sidecar,
    refuse_differences,
    shard_count,
    shard_path,
    shard_rows,
    sidecar_path,
    write_json,
    write_text,
    write_text_once,
)
from ovd.regions.lease import lease
from ovd.regions.proposals import Proposer
from ovd.regions.shard import RegionEmbedder, write_shard
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import sha256_of

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
    """Report of one process: shards written, shards already complete, unreadable pictures, whether all is done."""

    written: int
    reused: int
    bad_images: int
    complete: bool


def estimate(source_length: int, *, identity: Identity, root: Path | None = None) -> Estimate:
    """Bytes a store takes, and how much of it is still to be written into ``root``."""
    settings = identity.settings
    per_image = settings.proposals_per_image * (2 * identity.dim + 4 * 4 + 4) + 8
    done = 0
    if root is not None and manifest_path(root).is_file():
        manifest = read_manifest(root)
        for shard in range(shard_count(manifest)):
            if read_sidecar(root, shard) is not None:
                done += len(shard_rows(manifest, shard))
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
    log: Callable[[str], None] = lambda line: None,
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
        log: receives progress lines.

    Raises:
        UserError: another identity in ``root``, not enough disk, or too many unreadable pictures.
    """
    writer = _Writer(
        Path(root),
        embedder=RegionEmbedder(
            source=source, proposer=proposer, encoder=encoder, settings=identity.settings, batch_size=batch_size
        ),
        identity=identity,
        lease_seconds=lease_seconds,
        log=log,
    )
    plan = estimate(len(source), identity=identity, root=writer.path)
    _refuse_small_disk(writer.path, plan)
    writer.count_complete()
    if plan.missing_images:
        log(plan_line(writer.embedder, plan, identity.dim))
    while not writer.complete:
        if not writer.write_free() and not writer.complete:
            if not wait:
                break
            time.sleep(min(1.0, lease_seconds / 4))
    if writer.complete:
        writer.refuse_many_bad()
        _finish(writer.path)
    return WriteReport(written=writer.written, reused=writer.reused, bad_images=writer.bad, complete=writer.complete)


class _Writer:
    """One process's work on a store, beside others.

    Attributes:
        written, reused, bad: see `WriteReport`.
    """

    def __init__(
        self,
        path: Path,
        *,
        embedder: RegionEmbedder,
        identity: Identity,
        lease_seconds: float,
        log: Callable[[str], None],
    ) -> None:
        self.path, self.embedder, self.lease_seconds, self.log = path, embedder, lease_seconds, log
        self.manifest = _create(path, source=embedder.source, identity=identity)
        self.shards = shard_count(self.manifest)
        self.done: set[int] = set()
        self.written = self.reused = self.bad = 0

    @property
    def complete(self) -> bool:
        """Whether every shard is written, by whomever."""
        return len(self.done) == self.shards

    def count_complete(self) -> None:
        """Note the shards that earlier runs completed, and count their unreadable pictures."""
        for shard in range(self.shards):
            if _is_complete(self.path, shard, self.log):
                self.done.add(shard)
                self.reused += 1
                sidecar = read_sidecar(self.path, shard)
                self.bad += len(sidecar.get("bad_images", ())) if sidecar is not None else 0

    def write_free(self) -> bool:
        """Write each missing shard that no other process holds; returns whether any was completed, by whomever."""
        before = len(self.done)
        for shard in range(self.shards):
            if shard in self.done:
                continue
            if read_sidecar(self.path, shard) is not None and _is_complete(self.path, shard, self.log):
                self.done.add(shard)  # another process was faster
                continue
            with lease(self.path / f"shard-{shard:05d}.lease", self.lease_seconds) as heartbeat:
                if heartbeat is not None and read_sidecar(self.path, shard) is None:
                    self._write(shard, heartbeat)
        return len(self.done) > before

    def _write(self, shard: int, heartbeat: Callable[[], None]) -> None:
        start = time.monotonic()
        for leftover in self.path.glob(f".shard-{shard:05d}.*.tmp"):  # of a killed writer
            leftover.unlink(missing_ok=True)
        try:
            self.bad += write_shard(
                self.path, shard, manifest=self.manifest, embedder=self.embedder, heartbeat=heartbeat
            )
        except FileNotFoundError:
            # Our lease went stale, and the process that took it over swept our temporary file away.
            self.log(f"shard {shard} was taken over by another process")
            return
        self.refuse_many_bad()
        self.written += 1
        self.done.add(shard)
        rows = len(shard_rows(self.manifest, shard))
        took = max(time.monotonic() - start, 1e-9)
        self.log(
            f"shard {len(self.done)}/{self.shards}: {rows} pictures in {took:.1f} s ({rows / took:.2f} pictures/s)"
        )

    def refuse_many_bad(self) -> None:
        """Stop when more pictures than a few are unreadable, also where an earlier run met them."""
        pictures = len(self.embedder.source)
        if 0 < self.bad == pictures:
            raise UserError(f"{self.path}: none of the {pictures} pictures can be read; is it the right folder?")
        if self.bad > max(1, int(BAD_IMAGE_SHARE * pictures)):
            raise UserError(
                f"{self.path}: {self.bad} of {pictures} pictures cannot be read, more than {BAD_IMAGE_SHARE:.0%}; they "
                "are listed in the shard-*.json files"
            )


def plan_line(embedder: RegionEmbedder, plan: Estimate, dim: int) -> str:
    """Size and time in one line; the time is that of the second of two pictures (the first one warms up)."""
    settings, took = embedder.settings, 0.0
    for index in range(min(2, len(embedder.source))):
        start = time.perf_counter()
        try:
            _, crops = embedder.regions(index)
        except BadImageError:
            continue
        embed_crops(embedder.encoder, crops, batch_size=embedder.batch_size, precision=settings.precision)
        took = time.perf_counter() - start
    minutes = took * plan.missing_images / 60
    duration = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return (
        f"{plan.images} pictures x {settings.proposals_per_image} proposals x {dim} numbers: "
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
        "settings": as_json(asdict(identity.settings)),
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
    expected = {key: value for key, value in manifest.items() if key in compared}
    refuse_differences(path, present, expected, notes=identity.notes)
    read_ids(path, present)
    return present


def _finish(path: Path) -> None:
    """Put the hashes of all shards into the manifest. Every process that gets here writes the same bytes."""
    manifest = read_manifest(path)
    records: list[ShardSum] = []
    for shard in range(shard_count(manifest)):
        sidecar = read_sidecar(path, shard)
        if sidecar is None:
            return  # another process found it damaged, is writing it again, and will finish
        records.append(
            ShardSum(
                sha256=sidecar["sha256"], bytes=sidecar["bytes"], images=sidecar["images"], regions=sidecar["regions"]
            )
        )
    manifest["shards"] = records
    manifest["regions"] = sum(record["regions"] for record in records)
    write_json(manifest_path(path), manifest)
    for pattern in ("shard-*.lease", ".shard-*.tmp"):  # of processes that were killed
        for leftover in path.glob(pattern):
            leftover.unlink(missing_ok=True)


def _is_complete(path: Path, shard: int, log: Callable[[str], None]) -> bool:
    sidecar = read_sidecar(path, shard)
    if sidecar is None:
        return False
    file = shard_path(path, shard)
    if file.is_file() and file.stat().st_size == sidecar["bytes"] and sha256_of(file) == sidecar["sha256"]:
        return True
    log(f"warning: {file.name} is damaged and will be written again")
    sidecar_path(path, shard).unlink(missing_ok=True)
    return False


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
