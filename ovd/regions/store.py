# SPDX-License-Identifier: Apache-2.0
"""A folder of region embeddings: written by any number of processes, read by picture id.

Layout of a store::

    manifest.json            what it was made from, and, once complete, the sha256 of every shard
    images-HASH.json         picture ids, in order; picture i is row i % R of shard i // R
    shard-00000.safetensors  embeddings (n, P, D) f16 · boxes (n, P, 4) f32 · scores (n, P) f32 · valid (n,) i64
    shard-00000.json         sha256 and counts; it exists only when the shard is whole

A shard is the unit of work. Its bytes depend only on the manifest and its own pictures (no batch crosses a shard), so a
store that was killed and resumed, or shared between processes, equals one written in one go. Files are written under a
temporary name, flushed and renamed; ``kill -9`` at any time costs the shard in work and nothing else. A lease file,
created exclusively, keeps two processes off the same shard. Leases only save work: should two processes ever hold the
same shard, both write the same bytes.

Shape legend: ``P`` proposals per picture (padded with zeros beyond ``valid``), ``D`` embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from ovd.regions.crops import Border, CropMode, RegionEncoder, Resample, crop_regions, embed_crops
from ovd.regions.proposals import MIN_SIDE, Proposals, Proposer, select_proposals
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import sha256_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "ovd-regions/1"
BAD_IMAGE_SHARE = 0.01
"""Share of unreadable pictures above which writing stops."""

ImageId = int | str


class ImageSource(Protocol):
    """The pictures of a store, in a fixed order. See ``ovd.regions.images``."""

    ids: Sequence[ImageId]

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)`` of the picture ``ids[index]``; raises `BadImageError` when it cannot be read."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the pictures do."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Everything besides weights and pictures that decides the content of a store.

    Attributes:
        proposals_per_image: ``P``; better scored proposals first.
        crop_size: side of a crop in pixels: the encoder's.
        scales: crops per box, their embeddings are summed (ViLD: 1x and 1.5x).
        crop_mode: ``squash``, ``center`` or ``pad``, see `ovd.regions.crops.crop_regions`.
        border: ``clamp`` or ``fill``.
        resample: ``bilinear`` or ``bicubic``.
        normalise_each: normalise each crop's embedding before the sum too.
        precision: ``fp32`` or ``bf16`` for the encoder's forward.
        min_side: smaller boxes are dropped, in pixels.
        images_per_shard: pictures in a shard.
    """

    proposals_per_image: int
    crop_size: int
    scales: tuple[float, ...] = (1.0, 1.5)
    crop_mode: CropMode = "squash"
    border: Border = "clamp"
    resample: Resample = "bilinear"
    normalise_each: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    min_side: float = MIN_SIDE
    images_per_shard: int = 256


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a store is made from. Two stores with equal identities hold the same bytes.

    Attributes:
        encoder: fingerprint of the image encoder.
        dim: ``D`` of its embeddings.
        proposals: fingerprint of the proposal model, or ``ground-truth``.
        source: fingerprint of the pictures.
        settings: see `StoreSettings`.
        notes: free text for people (paths, names); never compared.
    """

    encoder: str
    dim: int
    proposals: str
    source: str
    settings: StoreSettings
    notes: Mapping[str, Any] = field(default_factory=dict)


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class RegionStore:
    """Random access to the proposals and embeddings of a picture by its id.

    Open it with `RegionStore.open`. Shards are memory mapped on first use; an instance may be sent to other processes.
    """

    def __init__(self, root: Path, manifest: dict[str, Any], ids: list[ImageId]) -> None:
        self.root = root
        self.manifest = manifest
        self.ids = ids
        self._position = {image_id: i for i, image_id in enumerate(ids)}
        self._maps: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        *,
        encoder_fingerprint: str | None = None,
        proposals_fingerprint: str | None = None,
        source_fingerprint: str | None = None,
        settings: StoreSettings | Mapping[str, Any] | None = None,
        image_ids: Iterable[ImageId] | None = None,
        partial: bool = False,
    ) -> RegionStore:
        """Open a store, and refuse it when it was not made from what the caller uses.

        Args:
            root: the folder.
            encoder_fingerprint: see `require`, as for the four below.
            proposals_fingerprint: see `require`.
            source_fingerprint: see `require`.
            settings: see `require`.
            image_ids: see `require`.
            partial: accept a store that is still being written; unfinished pictures raise KeyError.

        Raises:
            UserError: when the folder is not a store, is incomplete or damaged, or differs; every difference is named.
        """
        path = Path(root)
        manifest = _read_manifest(path)
        store = cls(path, manifest, _read_ids(path, manifest))
        store.require(
            encoder_fingerprint=encoder_fingerprint,
            proposals_fingerprint=proposals_fingerprint,
            source_fingerprint=source_fingerprint,
            settings=settings,
            image_ids=image_ids,
        )
        if not manifest.get("shards") and not partial:
            done = sum(_sidecar(path, shard) is not None for shard in range(_shard_count(manifest)))
            raise UserError(
                f"{path}: the region store is incomplete ({done} of {_shard_count(manifest)} shards): "
                f"run the same `python -m ovd.embed` command again to finish it"
            )
        for shard, record in enumerate(manifest.get("shards") or ()):
            file = _shard_path(path, shard)
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                raise UserError(
                    f"{file}: missing or of the wrong size: run the same `python -m ovd.embed` command again to repair "
                    f"the store"
                )
        return store

    def require(
        self,
        *,
        encoder_fingerprint: str | None = None,
        proposals_fingerprint: str | None = None,
        source_fingerprint: str | None = None,
        settings: StoreSettings | Mapping[str, Any] | None = None,
        image_ids: Iterable[ImageId] | None = None,
    ) -> None:
        """Refuse a store that was made from something else. None skips a check.

        Args:
            encoder_fingerprint: of the image encoder.
            proposals_fingerprint: of the proposal model.
            source_fingerprint: of the pictures.
            settings: expected settings; a mapping compares only its keys.
            image_ids: pictures that must be in the store; it may have more.

        Raises:
            UserError: naming every difference.
        """
        wanted: dict[str, Any] = {
            "encoder": encoder_fingerprint,
            "proposals": proposals_fingerprint,
            "source": source_fingerprint,
        }
        if settings is not None:
            wanted["settings"] = _plain(asdict(settings) if isinstance(settings, StoreSettings) else dict(settings))
        _refuse_differences(self.root, self.manifest, wanted)
        missing = [image_id for image_id in image_ids or () if image_id not in self]
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} pictures are not among the {len(self)} of this region store, such as "
                f"{missing[0]!r}: write a store of all of them with `python -m ovd.embed` and another `out`"
            )

    @property
    def dim(self) -> int:
        """``D``, length of an embedding."""
        return int(self.manifest["dim"])

    @property
    def settings(self) -> StoreSettings:
        """The settings the store was made with."""
        values = dict(self.manifest["settings"])
        values["scales"] = tuple(values["scales"])
        return StoreSettings(**values)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._position

    def __iter__(self) -> Iterator[ImageId]:
        return iter(self.ids)

    def __getitem__(self, image_id: ImageId) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Proposals of a picture, best first, without padding.

        Returns:
            boxes ``(P, 4)`` float32 xyxy in original pixels, embeddings ``(P, D)`` float32 unit rows, scores ``(P,)``.

        Raises:
            KeyError: the store has no such picture.
        """
        tensors, row = self._locate(image_id)
        valid = int(tensors["valid"][row])
        boxes = torch.from_numpy(np.array(tensors["boxes"][row, :valid]))
        embeddings = torch.from_numpy(np.array(tensors["embeddings"][row, :valid], dtype=np.float32))
        scores = torch.from_numpy(np.array(tensors["scores"][row, :valid]))
        return boxes, F.normalize(embeddings, dim=-1), scores  # fp16 rounds the length by up to 5e-4

    def count(self, image_id: ImageId) -> int:
        """How many proposals a picture has."""
        tensors, row = self._locate(image_id)
        return int(tensors["valid"][row])

    def bad_images(self) -> dict[ImageId, str]:
        """Pictures that could not be read, with the reason. They have no proposals."""
        found: dict[ImageId, str] = {}
        for shard in range(_shard_count(self.manifest)):
            for image_id, reason in (_sidecar(self.root, shard) or {}).get("bad_images", []):
                found[image_id] = reason
        return found

    def verify(self) -> list[str]:
        """Read every byte and compare hashes, counts and values.

        Returns:
            One line per problem; empty when the store is whole.
        """
        problems = []
        for shard, record in enumerate(self.manifest.get("shards") or [None] * _shard_count(self.manifest)):
            file = _shard_path(self.root, shard)
            side = _sidecar(self.root, shard)
            if side is None or not file.is_file():
                problems.append(f"{file.name}: missing or unfinished")
                continue
            if sha256_of(file) != side["sha256"] or (record is not None and record["sha256"] != side["sha256"]):
                problems.append(f"{file.name}: damaged (its sha256 differs)")
                continue
            tensors = _map_shard(file)
            expected = len(_rows(self.manifest, shard))
            if len(tensors["valid"]) != expected:
                problems.append(f"{file.name}: {len(tensors['valid'])} pictures, expected {expected}")
            for row, valid in enumerate(tensors["valid"].tolist()):
                norm = np.linalg.norm(tensors["embeddings"][row, :valid].astype(np.float32), axis=1)
                if not np.isfinite(tensors["boxes"][row]).all() or (np.abs(norm - 1) > 0.01).any():
                    problems.append(f"{file.name}: row {row} holds broken boxes or embeddings")
        return problems

    def _locate(self, image_id: ImageId) -> tuple[dict[str, NDArray[Any]], int]:
        try:
            position = self._position[image_id]
        except KeyError:
            raise KeyError(f"{self.root}: no picture {image_id!r} among the {len(self)} of this region store") from None
        shard, row = divmod(position, int(self.manifest["settings"]["images_per_shard"]))
        tensors = self._maps.get(shard)
        if tensors is None:
            if _sidecar(self.root, shard) is None:
                raise KeyError(f"{self.root}: picture {image_id!r} is in shard {shard}, which is not written yet")
            tensors = self._maps[shard] = _map_shard(_shard_path(self.root, shard))
            if len(self._maps) > 128:  # each holds a file descriptor
                self._maps.popitem(last=False)
        return tensors, row

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps would be pickled as whole arrays.
        return {**self.__dict__, "_maps": OrderedDict()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def estimate(source_length: int, *, identity: Identity, root: Path | None = None) -> Estimate:
    """Bytes a store takes, and how much of it is still to be written into ``root``."""
    settings = identity.settings
    per_image = _bytes_per_image(settings.proposals_per_image, identity.dim)
    done = 0
    if root is not None and (root / "manifest.json").is_file():
        manifest = _read_manifest(root)
        for shard in range(_shard_count(manifest)):
            if _sidecar(root, shard) is not None:
                done += len(_rows(manifest, shard))
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
        proposer: the proposal model; one with ``propose_at(index)`` is asked by position.
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
    plan = estimate(len(source.ids), identity=identity, root=path)
    _refuse_small_disk(path, plan)
    shards = _shard_count(manifest)
    done: set[int] = set()
    written = kept = bad = 0
    for shard in range(shards):
        if _is_whole(path, shard, say):
            done.add(shard)
            kept += 1
            bad += len((_sidecar(path, shard) or {}).get("bad_images", ()))
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
            if _sidecar(path, shard) is not None and _is_whole(path, shard, say):  # another process was faster
                done.add(shard)
                progress = True
                continue
            with _lease(path / f"shard-{shard:05d}.lease", lease_seconds) as lease:
                if lease is None or _sidecar(path, shard) is not None:
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
                        beat=lease,
                    )
                except FileNotFoundError:
                    # Our lease went stale, and the process that took it over swept our temporary file away.
                    say(f"shard {shard} was taken over by another process")
                    continue
                if bad > max(1, int(BAD_IMAGE_SHARE * len(source.ids))):
                    raise UserError(
                        f"{path}: {bad} of {len(source.ids)} pictures cannot be read, more than "
                        f"{BAD_IMAGE_SHARE:.0%}; they are listed in the shard-*.json files"
                    )
                written += 1
                progress = True
                done.add(shard)
                rows = len(_rows(manifest, shard))
                took = max(time.monotonic() - start, 1e-9)
                say(f"shard {len(done)}/{shards}: {rows} pictures in {took:.1f} s ({rows / took:.2f} pictures/s)")
        if not progress and len(done) < shards:
            if not wait:
                break
            time.sleep(min(1.0, lease_seconds / 4))
    complete = len(done) == shards
    if complete:
        _finish(path)
    return WriteReport(written=written, kept=kept, bad_images=bad, complete=complete)


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
    plan = estimate(len(source.ids), identity=identity, root=root)
    settings = identity.settings
    took = 0.0
    for index in range(min(2, len(source.ids))):
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
    _read_manifest(path)
    (path / "manifest.json").unlink()  # first, so that half a removal is no store
    for pattern in ("shard-*", "images-*.json", ".*.tmp"):
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)


def _regions_of(
    index: int, *, source: ImageSource, proposer: Proposer, encoder: RegionEncoder, settings: StoreSettings
) -> tuple[Proposals, torch.Tensor]:
    image = source.image(index)
    at = getattr(proposer, "propose_at", None)
    boxes, scores = at(index) if at is not None else proposer.propose(image, top=settings.proposals_per_image)
    found = select_proposals(
        boxes,
        scores,
        width=image.shape[1],
        height=image.shape[0],
        top=settings.proposals_per_image,
        min_side=settings.min_side,
    )
    crops = crop_regions(
        image,
        found.boxes,
        size=settings.crop_size,
        scales=settings.scales,
        mode=settings.crop_mode,
        border=settings.border,
        fill=encoder.image_mean,
        resample=settings.resample,
    )
    return found, crops


def _write_shard(
    path: Path,
    shard: int,
    *,
    manifest: dict[str, Any],
    source: ImageSource,
    proposer: Proposer,
    encoder: RegionEncoder,
    settings: StoreSettings,
    batch_size: int,
    beat: Callable[[], None],
) -> int:
    rows = _rows(manifest, shard)
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
            found, cut = _regions_of(index, source=source, proposer=proposer, encoder=encoder, settings=settings)
        except BadImageError as error:
            bad.append((source.ids[index], error.reason))
            continue
        beat()
        count = len(found.boxes)
        tensors["boxes"][row, :count] = torch.from_numpy(found.boxes)
        tensors["scores"][row, :count] = torch.from_numpy(found.scores)
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
    _sync(temporary)
    os.replace(temporary, _shard_path(path, shard))
    _sync(path)
    counts = {"images": len(rows), "regions": int(tensors["valid"].sum())}
    _write_json(path / f"shard-{shard:05d}.json", {"sha256": digest, "bytes": size, **counts, "bad_images": bad})
    return len(bad)


def _create(path: Path, *, source: ImageSource, identity: Identity) -> dict[str, Any]:
    """Make the folder and its manifest, or check that the present one is the same store. Safe between processes."""
    ids = list(source.ids)
    if len(set(ids)) != len(ids):
        raise UserError("picture ids repeat: every picture of a region store needs its own id")
    if not ids:
        raise UserError("there are no pictures to embed")
    ids_text = json.dumps(ids)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "encoder": identity.encoder,
        "dim": identity.dim,
        "proposals": identity.proposals,
        "source": identity.source,
        "settings": _plain(asdict(identity.settings)),
        "images": {"count": len(ids), "sha256": hashlib.sha256(ids_text.encode()).hexdigest()},
        "dtype": "float16",
        "notes": _plain(dict(identity.notes)),
    }
    target = path / "manifest.json"
    if not target.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file: choose another `out`")
        path.mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in path.iterdir() if not entry.name.startswith((".", "images-"))]
        if strangers and not target.is_file():  # another process may just have made the store
            raise UserError(f"{path}: is not a region store and not empty ({strangers[0]} …): choose another `out`")
        _write_text(_ids_path(path, manifest), ids_text)
        _write_text_once(target, json.dumps(manifest, indent=1))
    present = _read_manifest(path)
    compared = ("encoder", "dim", "proposals", "source", "settings", "images")
    _refuse_differences(path, present, {key: manifest[key] for key in compared})
    _read_ids(path, present)
    return present


def _finish(path: Path) -> None:
    """Put the hashes of all shards into the manifest. Every process that gets here writes the same bytes."""
    manifest = _read_manifest(path)
    records = []
    for shard in range(_shard_count(manifest)):
        side = _sidecar(path, shard)
        if side is None:
            return  # somebody found it damaged and is writing it again; they will finish
        records.append({key: side[key] for key in ("sha256", "bytes", "images", "regions")})
    manifest["shards"] = records
    manifest["regions"] = sum(record["regions"] for record in records)
    _write_json(path / "manifest.json", manifest)
    for pattern in ("shard-*.lease", ".shard-*.tmp"):  # of processes that were killed
        for leftover in path.glob(pattern):
            leftover.unlink(missing_ok=True)


def _is_whole(path: Path, shard: int, say: Callable[[str], None]) -> bool:
    side = _sidecar(path, shard)
    if side is None:
        return False
    file = _shard_path(path, shard)
    if file.is_file() and file.stat().st_size == side["bytes"] and sha256_of(file) == side["sha256"]:
        return True
    say(f"warning: {file.name} is damaged and will be written again")
    (path / f"shard-{shard:05d}.json").unlink(missing_ok=True)
    return False


@contextmanager
def _lease(file: Path, seconds: float) -> Iterator[Callable[[], None] | None]:
    """Hold a lease file; yields a heartbeat, or None when another live process holds it."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    token = json.dumps({**owner, "key": uuid.uuid4().hex})
    if not _create_lease(file, token) and not (_steal(file, seconds) and _create_lease(file, token)):
        yield None
        return
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > min(seconds / 10, 10.0):
            last = time.monotonic()
            if file.exists():
                os.utime(file)

    try:
        yield beat
    finally:
        if _read_text(file) == token:  # it may have been taken over by now
            file.unlink(missing_ok=True)


def _create_lease(file: Path, token: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as stream:
        stream.write(token)
    return True


def _steal(file: Path, seconds: float) -> bool:
    """Remove a lease whose owner is dead or silent. True when it is gone."""
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return True
    if age < seconds and not _owner_is_dead(_read_text(file)):
        return False
    grave = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        os.rename(file, grave)  # of several thieves only one succeeds
    except FileNotFoundError:
        return False
    grave.unlink(missing_ok=True)
    return True


def _owner_is_dead(text: str | None) -> bool:
    try:
        owner = json.loads(text or "")
        host, pid, started = str(owner["host"]), int(owner["pid"]), str(owner["started"])
    except (ValueError, KeyError, TypeError):
        return False  # just being written
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) != started  # the number was given to another process


def _started(pid: int) -> str:
    """When a process started, in kernel ticks; empty where /proc does not say."""
    text = _read_text(Path(f"/proc/{pid}/stat"))
    return text.rpartition(")")[2].split()[19] if text else ""


def _sweep(path: Path, shard: int) -> None:
    """Remove what a killed writer of this shard left behind."""
    for leftover in path.glob(f".shard-{shard:05d}.*.tmp"):
        leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _bytes_per_image(top: int, dim: int) -> int:
    return top * (2 * dim + 4 * 4 + 4) + 8


def _ids_path(path: Path, manifest: dict[str, Any]) -> Path:
    # The hash in the name keeps a second process with other pictures from writing over the list of the first.
    return path / f"images-{manifest['images']['sha256'][:12]}.json"


def _shard_path(path: Path, shard: int) -> Path:
    return path / f"shard-{shard:05d}.safetensors"


def _shard_count(manifest: dict[str, Any]) -> int:
    return -(-int(manifest["images"]["count"]) // int(manifest["settings"]["images_per_shard"]))


def _rows(manifest: dict[str, Any], shard: int) -> range:
    size = int(manifest["settings"]["images_per_shard"])
    return range(shard * size, min((shard + 1) * size, int(manifest["images"]["count"])))


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    text = _read_text(file)
    if text is None:
        raise UserError(f"{path}: no region store here (no manifest.json): make one with `python -m ovd.embed`")
    try:
        manifest = json.loads(text)
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{file}: not a manifest of format {FORMAT}: make the store again with `python -m ovd.embed`")
    return dict(manifest)


def _read_ids(path: Path, manifest: dict[str, Any]) -> list[ImageId]:
    file = _ids_path(path, manifest)
    text = _read_text(file)
    if text is None or hashlib.sha256(text.encode()).hexdigest() != manifest["images"]["sha256"]:
        raise UserError(f"{file}: missing or damaged: make the store again with `python -m ovd.embed`")
    return list(json.loads(text))


def _sidecar(path: Path, shard: int) -> dict[str, Any] | None:
    text = _read_text(path / f"shard-{shard:05d}.json")
    return None if text is None else dict(json.loads(text))


def _refuse_differences(path: Path, manifest: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = []
    for key, value in wanted.items():
        if value is None:
            continue
        present = manifest.get(key)
        if isinstance(value, dict):
            present = present if isinstance(present, dict) else {}
            for k, v in value.items():
                if present.get(k) != v:
                    problems.append(f"{key}.{k}: it has {present.get(k)!r}, you have {v!r}")
        elif present != value:
            problems.append(f"{key}: it has {present!r}, you have {value!r}")
    if problems:
        raise UserError(
            f"{path}: this region store was made from something else:\n  "
            + "\n  ".join(problems)
            + "\nUse what it was made from, or write a new store with `python -m ovd.embed` and another `out`."
        )


def _refuse_small_disk(path: Path, plan: Estimate) -> None:
    free = shutil.disk_usage(path).free
    needed = int(plan.missing_bytes * 1.02) + (64 << 20)
    if plan.missing_images and free < needed:
        raise UserError(
            f"{path}: {_human(needed)} are needed but only {_human(free)} are free: free some space, choose another "
            f"`out`, or lower `proposals_per_image`"
        )


def _map_shard(file: Path) -> dict[str, NDArray[Any]]:
    """Memory map a safetensors file: an 8 byte length, a JSON header, then the arrays."""
    kinds = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = np.memmap(file, dtype=np.uint8, mode="r")
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = data[start:stop].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON (tuples become lists), so that comparisons are fair."""
    return dict(json.loads(json.dumps(value)))


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    _write_text(file, json.dumps(value, indent=1))


def _write_text(file: Path, text: str) -> None:
    # Not `write_atomically`, which makes every OSError a refusal: here FileNotFoundError has a meaning of its own, that
    # another process took the shard over and swept this temporary file away (`write_regions`).
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)
    _sync(file.parent)


def _write_text_once(file: Path, text: str) -> None:
    """Like `_write_text`, but the first writer wins."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    try:
        os.link(temporary, file)
    except FileExistsError:
        return
    finally:
        temporary.unlink(missing_ok=True)
    _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _human(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
