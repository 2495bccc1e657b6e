# SPDX-License-Identifier: Apache-2.0
"""Layout of a region store: its files, and what it was made from.

`ovd.regions.writer` writes it, with any number of processes; `ovd.regions.store` reads it by picture id.

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
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, cast, runtime_checkable

from ovd.regions.cutting import Border, CropMode, Resample
from ovd.regions.proposals import MIN_SIDE
from pretrain.data.coco import ImageId
from pretrain.data.images import IdentifiedPictures
from pretrain.engine.errors import UserError, shorten
from pretrain.engine.files import flush_to_disk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = "ovd-regions/1"
NAMED_IN_NOTES = {"encoder": "encoder", "proposals": "proposer"}
"""Keys of the manifest that hold fingerprints -> keys of its notes that hold their names."""


class ImageSource(IdentifiedPictures, Protocol):
    """The pictures of a store, in a fixed order.

    Those of stickers, folders and COCO files are in ``ovd.regions.images``.
    """

    def fingerprint(self) -> str:
        """A hash that changes when the pictures do."""
        ...


@runtime_checkable
class BoxedImageSource(ImageSource, Protocol):
    """Pictures with ground truth."""

    def boxes(self, index: int) -> NDArray[np.float32]:
        """``(n, 4)`` xyxy boxes of the picture ``ids[index]``."""
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
    """Inputs of a store. Two stores with equal identities hold the same bytes.

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
    notes: Mapping[str, object] = field(default_factory=dict)


class PictureCount(TypedDict):
    """How many pictures a store has, and the sha256 of the list of their ids."""

    count: int
    sha256: str


class ShardSum(TypedDict):
    """A whole shard: sha256 and size of its file, and how many pictures and regions it holds."""

    sha256: str
    bytes: int
    images: int
    regions: int


class Sidecar(ShardSum):
    """Content of the file beside a shard: its sum, and (id, reason) of the pictures that could not be read."""

    bad_images: list[tuple[ImageId, str]]


class _Provenance(TypedDict, total=False):
    shards: list[ShardSum]
    regions: int


class Manifest(_Provenance):
    """Inputs of a store (`Identity`, as JSON); ``shards`` and ``regions`` once it is complete."""

    format: str
    encoder: str
    dim: int
    proposals: str
    source: str
    settings: dict[str, Any]  # `StoreSettings`
    images: PictureCount
    dtype: str
    notes: dict[str, object]


def ids_path(path: Path, manifest: Manifest) -> Path:
    """The list of picture ids."""
    # The hash in the name keeps a second process with other pictures from writing over the list of the first.
    return path / f"images-{manifest['images']['sha256'][:12]}.json"


def shard_path(path: Path, shard: int) -> Path:
    """The tensors of a shard."""
    return path / f"shard-{shard:05d}.safetensors"


def sidecar_path(path: Path, shard: int) -> Path:
    """Hash and counts of a shard."""
    return path / f"shard-{shard:05d}.json"


def manifest_path(path: Path) -> Path:
    """File of a store's inputs."""
    return path / "manifest.json"


def shard_count(manifest: Manifest) -> int:
    """How many shards a store has when it is whole."""
    return -(-int(manifest["images"]["count"]) // int(manifest["settings"]["images_per_shard"]))


def settings_of(manifest: Manifest) -> StoreSettings:
    """The settings a store was made with."""
    return StoreSettings(**{**manifest["settings"], "scales": tuple(manifest["settings"]["scales"])})


def shard_rows(manifest: Manifest, shard: int) -> range:
    """Positions of the pictures in a shard."""
    size = int(manifest["settings"]["images_per_shard"])
    return range(shard * size, min((shard + 1) * size, int(manifest["images"]["count"])))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store in a folder.

    Raises:
        UserError: there is none, or it is of another format.
    """
    file = manifest_path(path)
    text = read_text(file)
    if text is None:
        raise UserError(f"{path}: no region store here (no manifest.json): make one with `python -m ovd.embed`")
    try:
        manifest = json.loads(text)
        supported = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except ValueError:
        supported = False
    if not supported:
        raise UserError(f"{file}: not a manifest of format {FORMAT}: make the store again with `python -m ovd.embed`")
    try:
        StoreSettings(**manifest["settings"])
        sizes = [manifest["dim"], manifest["images"]["count"], manifest["settings"]["images_per_shard"]]
        sums = [manifest["images"]["sha256"], *(shard["sha256"] for shard in manifest.get("shards") or ())]
        sizes += [shard["bytes"] for shard in manifest.get("shards") or ()]
        if not all(type(n) is int and n > 0 for n in sizes) or not all(type(s) is str and s.isalnum() for s in sums):
            raise ValueError("a size or a sum is none")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {shorten(str(error))}): make the store again with "
            "`python -m ovd.embed`"
        ) from error
    return cast(Manifest, manifest)


def read_ids(path: Path, manifest: Manifest) -> list[ImageId]:
    """Picture ids in order.

    Raises:
        UserError: the list is missing or damaged.
    """
    file = ids_path(path, manifest)
    text = read_text(file)
    if text is None or hashlib.sha256(text.encode()).hexdigest() != manifest["images"]["sha256"]:
        raise UserError(f"{file}: missing or damaged: make the store again with `python -m ovd.embed`")
    return list(json.loads(text))


def read_sidecar(path: Path, shard: int) -> Sidecar | None:
    """The file beside a complete shard; None where there is none, or a damaged one."""
    text = read_text(sidecar_path(path, shard))
    try:
        content = json.loads(text or "")
    except ValueError:
        return None
    complete = isinstance(content, dict) and isinstance(content.get("sha256"), str)
    return cast(Sidecar, content) if complete else None


def refuse_differences(
    path: Path, manifest: Manifest, expected: Mapping[str, object], *, notes: Mapping[str, object]
) -> None:
    """Compare a manifest with what the caller has; an expected None is not compared.

    Args:
        path: folder of the store, for messages.
        manifest: of the store.
        expected: what the caller has, by key of the manifest.
        notes: of the caller, like the manifest's: names of the fingerprinted things.

    Raises:
        UserError: naming every difference.
    """
    problems = []
    for key, value in expected.items():
        if value is None:
            continue
        present = manifest.get(key)
        if isinstance(value, dict):
            present = present if isinstance(present, dict) else {}
            for k, v in value.items():
                if present.get(k) != v:
                    problems.append(f"{key}.{k}: it has {present.get(k)!r}, you have {v!r}")
        elif present != value:
            note = NAMED_IN_NOTES.get(key, "")
            had, have = _named(present, manifest.get("notes", {}).get(note)), _named(value, notes.get(note))
            problems.append(f"{key}: it has {had}, you have {have}")
    if problems:
        remedy = "Use what it was made from, or write a new store with `python -m ovd.embed` and another `out`."
        lines = [f"{path}: this region store was made from something else:", *problems, remedy]
        raise UserError("\n  ".join(lines) if len(problems) > 1 else f"{lines[0]} {problems[0]}. {remedy}")


def _named(value: object, name: object) -> str:
    """A fingerprint with the name of its source, ``clip-photo (1f2e3d4c5b6a…)``; without a name as it is."""
    return f"{name} ({str(value)[:12]}…)" if isinstance(name, str) else repr(value)


def as_json(value: Mapping[str, object]) -> dict[str, Any]:
    """As it comes back from JSON (tuples become lists), so that comparisons are fair."""
    return dict(json.loads(json.dumps(value)))


def read_text(file: Path) -> str | None:
    """A file's text, or None when it has just gone; what is no UTF-8 in it becomes replacement characters."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """`write_text` of JSON."""
    write_text(file, json.dumps(value, indent=1))


def _written(file: Path, text: str) -> Path:
    """A flushed file with the text beside ``file``, under a temporary name."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush_to_disk(temporary)
    return temporary


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name, flush, rename."""
    # Not `write_atomically`, which makes every OSError a refusal: here FileNotFoundError has a meaning of its own, that
    # another process took the shard over and swept this temporary file away (`write_regions`).
    os.replace(_written(file, text), file)
    flush_to_disk(file.parent)


def write_text_once(file: Path, text: str) -> None:
    """Like `write_text`, but the first writer wins."""
    temporary = _written(file, text)
    try:
        os.link(temporary, file)
    except FileExistsError:
        return
    finally:
        temporary.unlink(missing_ok=True)
    flush_to_disk(file.parent)
