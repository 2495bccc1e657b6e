# SPDX-License-Identifier: Apache-2.0
"""Reading a region store by picture id (`ovd.regions.layout` has its files, `ovd.regions.writer` writes it).

Shapes: ``P`` proposals of a picture, ``D`` embedding.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F

from ovd.regions.layout import (
    ImageId,
    Manifest,
    StoreSettings,
    as_json,
    read_ids,
    read_manifest,
    read_sidecar,
    refuse_differences,
    settings_of,
    shard_count,
    shard_path,
    shard_rows,
)
from pretrain.engine.errors import UserError
from pretrain.engine.files import sha256_of
from pretrain.engine.identity import text_identity

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack


class StoreOrigin(TypedDict, total=False):
    """What a store was made from; a check is skipped where a key is missing or None.

    Attributes:
        encoder_fingerprint: of the image encoder.
        encoder_name: what the caller calls it, for the message.
        proposals_fingerprint: of the proposal model.
        source_fingerprint: of the pictures.
        settings: expected settings; a mapping compares only its keys.
        image_ids: pictures that must be in the store; it may have more.
    """

    encoder_fingerprint: str | None
    encoder_name: str | None
    proposals_fingerprint: str | None
    source_fingerprint: str | None
    settings: StoreSettings | Mapping[str, object] | None
    image_ids: Iterable[ImageId] | None


class RegionStore:
    """Random access to the proposals and embeddings of a picture by its id.

    Open it with `RegionStore.open`. Shards are memory mapped on first use; an instance may be sent to other processes.
    """

    def __init__(self, root: Path, manifest: Manifest, ids: list[ImageId]) -> None:
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
        partial: bool = False,
        **expected: Unpack[StoreOrigin],
    ) -> RegionStore:
        """Open a store, and refuse it when it was not made from what the caller uses.

        Args:
            root: the folder.
            partial: accept a store that is still being written; unfinished pictures raise KeyError.
            expected: see `require`.

        Raises:
            UserError: when the folder is not a store, is incomplete or damaged, or differs; every difference is named.
        """
        path = Path(root)
        manifest = read_manifest(path)
        store = cls(path, manifest, read_ids(path, manifest))
        store.require(**expected)
        if not manifest.get("shards") and not partial:
            done = sum(read_sidecar(path, shard) is not None for shard in range(shard_count(manifest)))
            raise UserError(
                f"{path}: the region store is incomplete ({done} of {shard_count(manifest)} shards): "
                f"run the same `python -m ovd.embed` command again to finish it"
            )
        for shard, record in enumerate(manifest.get("shards") or ()):
            file = shard_path(path, shard)
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                raise UserError(
                    f"{file}: missing or of the wrong size: run the same `python -m ovd.embed` command again to repair "
                    f"the store"
                )
        return store

    def require(self, **origin: Unpack[StoreOrigin]) -> None:
        """Refuse a store that was made from something else.

        Raises:
            UserError: naming every difference.
        """
        expected: dict[str, object] = {
            "encoder": origin.get("encoder_fingerprint"),
            "proposals": origin.get("proposals_fingerprint"),
            "source": origin.get("source_fingerprint"),
        }
        if (settings := origin.get("settings")) is not None:
            expected["settings"] = as_json(asdict(settings) if isinstance(settings, StoreSettings) else dict(settings))
        refuse_differences(self.root, self.manifest, expected, notes={"encoder": origin.get("encoder_name")})
        missing = [image_id for image_id in origin.get("image_ids") or () if image_id not in self]
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} pictures are not among the {len(self)} of this region store, such as "
                f"{missing[0]!r}: write a store of all of them with `python -m ovd.embed` and another `out`"
            )

    def identity(self) -> str:
        """A digest of what is in the store."""
        return text_identity([shard["sha256"] for shard in self.manifest.get("shards") or ()])

    @property
    def dim(self) -> int:
        """``D``, length of an embedding."""
        return int(self.manifest["dim"])

    @property
    def settings(self) -> StoreSettings:
        """The settings the store was made with."""
        return settings_of(self.manifest)

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

    def verify(self) -> list[str]:
        """Read every byte and compare hashes, counts and values.

        Returns:
            one line per problem; empty when the store is whole.
        """
        problems = []
        for shard, record in enumerate(self.manifest.get("shards") or [None] * shard_count(self.manifest)):
            file = shard_path(self.root, shard)
            sidecar = read_sidecar(self.root, shard)
            if sidecar is None or not file.is_file():
                problems.append(f"{file.name}: missing or unfinished")
                continue
            if sha256_of(file) != sidecar["sha256"] or (record is not None and record["sha256"] != sidecar["sha256"]):
                problems.append(f"{file.name}: damaged (its sha256 differs)")
                continue
            tensors = _map_shard(file)
            expected = len(shard_rows(self.manifest, shard))
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
            if not self.manifest.get("shards") and read_sidecar(self.root, shard) is None:
                raise KeyError(f"{self.root}: picture {image_id!r} is in shard {shard}, which is not written yet")
            tensors = self._maps[shard] = _map_shard(shard_path(self.root, shard))
            if len(self._maps) > 128:  # each holds a file descriptor
                self._maps.popitem(last=False)
        return tensors, row

    def __getstate__(self) -> dict[str, object]:
        # Memory maps would be pickled as whole arrays.
        return {**self.__dict__, "_maps": OrderedDict()}


def _map_shard(file: Path) -> dict[str, NDArray[Any]]:
    """Memory map a safetensors file: an 8 byte length, a JSON header, then the arrays.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _mapped(file)
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}): run the same `python -m ovd.embed` command again to repair the "
            "store"
        ) from error


def _mapped(file: Path) -> dict[str, NDArray[Any]]:
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
    rows, proposals, _ = arrays["embeddings"].shape
    shapes = {"boxes": (rows, proposals, 4), "scores": (rows, proposals), "valid": (rows,)}
    if {name: arrays[name].shape for name in shapes} != shapes or (arrays["valid"] > proposals).any():
        raise ValueError("its arrays do not belong together")
    return arrays
