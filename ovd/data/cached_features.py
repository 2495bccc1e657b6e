# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone, computed once and memory-mapped by every later step and run.

A frozen backbone gives the same features in every epoch as long as the picture does not change. Arrays lie in a folder
named by a hash of everything that determines them; ``meta.json`` is written last, so that a half-written cache is never
read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray

from ovd.data.mapper import DetectionSource
from ovd.data.samples import LabelledSample, PatchSample
from pretrain.engine.errors import BadImageError, UserError, warn
from pretrain.engine.faults import too_many_bad
from pretrain.engine.files import locked_folder, sha256_of, write_atomically
from pretrain.engine.identity import identity_of

META = "meta.json"
Sample = TypeVar("Sample")
MAX_OBJECTS = 100  # per picture that a cache holds (COCO has up to 93)


class FeatureCache:
    """Arrays by name, one row per picture (or per picture and flip).

    Args:
        arrays: memory-mapped.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def row(self, index: int) -> dict[str, NDArray[Any]]:
        """Copies of one row of every array."""
        return {name: np.array(array[index]) for name, array in self.arrays.items()}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        key: Mapping[str, Any],
        count: int,
        compute: Callable[[list[int]], dict[str, NDArray[Any]]],
        batch: int = 16,
    ) -> FeatureCache:
        """Read a cache, or compute it first.

        Args:
            folder: where caches lie.
            key: everything that determines the content.
            count: rows.
            compute: rows of some indices; each array (n, …), the same shapes in every call.
            batch: rows per call.

        Raises:
            UserError: pictures of different shapes, a disk that is full, or a cache that was damaged.
        """
        name = hashlib.sha256(json.dumps([dict(key), count], sort_keys=True).encode()).hexdigest()[:16]
        target = folder / name
        if not (target / META).is_file():
            cls._write(target, key=key, count=count, compute=compute, batch=batch)
        try:
            names = json.loads((target / META).read_text(encoding="utf-8"))["arrays"]
            return cls({n: np.load(target / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names})
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"cache {target}: is damaged ({error}); remove it; it is computed again") from error

    @staticmethod
    def _write(
        target: Path,
        *,
        key: Mapping[str, Any],
        count: int,
        compute: Callable[[list[int]], dict[str, NDArray[Any]]],
        batch: int,
    ) -> None:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
        try:
            temporary.mkdir(parents=True)
            arrays: dict[str, NDArray[Any]] = {}
            for first in range(0, count, batch):
                indices = list(range(first, min(first + batch, count)))
                for name, rows in compute(indices).items():
                    if name not in arrays:
                        arrays[name] = np.lib.format.open_memmap(
                            temporary / f"{name}.npy", mode="w+", dtype=rows.dtype, shape=(count, *rows.shape[1:])
                        )
                    if arrays[name].shape[1:] != rows.shape[1:]:
                        raise UserError(
                            f"cache: pictures {indices[0]} to {indices[-1]} give {name} of shape {rows.shape[1:]}, "
                            f"others {arrays[name].shape[1:]}; a cache needs pictures of one size: set cache=null"
                        )
                    arrays[name][indices] = rows
                if (first // batch) % 32 == 0:
                    print(f"cache: features of {indices[-1] + 1} of {count}", file=sys.stderr, flush=True)
            for array in arrays.values():
                array.flush()  # type: ignore[attr-defined]
            record = {"arrays": sorted(arrays), "key": dict(key), "count": count}
            write_atomically(temporary / META, json.dumps(record, sort_keys=True).encode())
            with locked_folder(target.parent):
                if (target / META).is_file():
                    return  # another process was faster; its arrays are the same
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
        except OSError as error:
            raise UserError(
                f"cache {target}: {error.strerror or error}; free some space or set cache=FOLDER"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def files_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files named in settings, for a cache's key beside the settings themselves.

    Args:
        settings: of a data section, as JSON.

    Returns:
        a digest per setting that is a path: of a file's content; of the names, sizes and times of change in a folder.
    """
    digests = {}
    for name, value in settings.items():
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, str) and part and (path := Path(part)).exists():
                digests[f"files.{name}.{number}"] = _digest(path)
    return digests


def _digest(root: Path) -> str:
    if root.is_file():
        return sha256_of(root)
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Readable:
    """Replaces an unreadable picture by the next one, as the training loop does, with one warning.

    Args:
        count: pictures.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.bad: set[int] = set()

    def __call__(self, index: int, load: Callable[[int], Sample]) -> Sample:
        """``load(index)``, or of the first picture after it that can be read.

        Raises:
            BadImageError: clearly more than 1 % of the pictures cannot be, the loop's own rule.
        """
        for step in range(self.count):
            other = (index + step) % self.count
            if other in self.bad:
                continue
            try:
                return load(other)
            except BadImageError as error:
                self.bad.add(other)
                if too_many_bad(len(self.bad), self.count):
                    raise BadImageError(
                        error.path, f"{error.reason}; with it {len(self.bad)} of {self.count} pictures cannot be read"
                    ) from error
                warn(f"unreadable image replaced by the next one: {error}")
        raise UserError("cache: no picture can be read")


def pad_objects(instances: Instances) -> dict[str, NDArray[Any]]:
    """Boxes and classes of one picture in arrays of fixed shape.

    Raises:
        UserError: more than `MAX_OBJECTS` objects.
    """
    if len(instances) > MAX_OBJECTS:
        raise UserError(
            f"cache: a picture has {len(instances)} objects, at most {MAX_OBJECTS} are cached; set cache=null"
        )
    boxes, classes = np.zeros((MAX_OBJECTS, 4), dtype=np.float32), np.zeros(MAX_OBJECTS, dtype=np.int64)
    boxes[: len(instances)] = instances.gt_boxes.tensor.numpy()
    classes[: len(instances)] = instances.gt_classes.numpy()
    return {
        "boxes": boxes, "classes": classes, "objects": np.array(len(instances)), "size": np.array(instances.image_size)
    }  # fmt: skip


class CachedDetection:
    """`DetectionSource` over cached features: a sample is drawn as there, its picture is not decoded.

    Args:
        source: whose pictures, labels and flips; its transform must not crop or scale.
        caches: rows without and with a flip; one cache when nothing is flipped.
        features: names of the feature maps.
    """

    def __init__(self, *, source: DetectionSource, caches: list[FeatureCache], features: tuple[str, ...]) -> None:
        self.source, self.caches, self.features = source, caches, features

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures and labels."""
        return identity_of(self.source)

    def sample(self, index: int, draw: int) -> LabelledSample:
        """Features, labels and size of picture ``index``; pure function of (index, draw)."""
        rng = np.random.default_rng([self.source.seed, draw])
        rng.random()  # the scale, which the transform draws first
        flipped = len(self.caches) > 1 and bool(rng.random() < self.source.transform.flip)
        row = self.caches[int(flipped)].row(index)
        size, count = (int(row["size"][0]), int(row["size"][1])), int(row["objects"])
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.from_numpy(row["boxes"][:count]))
        instances.gt_classes = torch.from_numpy(row["classes"][:count])
        return {
            "features": {name: torch.from_numpy(row[name]) for name in self.features},
            "size": size,
            "instances": instances,
        }

    @staticmethod
    def collate(samples: list[LabelledSample]) -> list[LabelledSample]:
        """A list, as Detectron2's models take."""
        return samples


class CachedPatches:
    """`PatchSource` over cached features of pictures and embeddings of their patches.

    Args:
        cache: one row per picture: the maps, ``size``, ``patch_boxes`` (V, M, 4), ``patch_embeddings`` (V, M, D).
        features: names of the feature maps.
        source: that the cache was computed from.
    """

    def __init__(self, *, cache: FeatureCache, features: tuple[str, ...], source: object = None) -> None:
        self.cache, self.features, self.source = cache, features, source
        self.variants = cache.arrays["patch_boxes"].shape[1]

    def __len__(self) -> int:
        return len(self.cache)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures."""
        return identity_of(self.source)

    def sample(self, index: int, draw: int) -> PatchSample:
        """As `PatchSource.sample`, with ``features`` and ``embeddings`` in place of pictures and patches."""
        row = self.cache.row(index)
        variant = (draw // len(self)) % self.variants
        return {
            "features": {name: torch.from_numpy(row[name]) for name in self.features},
            "size": (int(row["size"][0]), int(row["size"][1])),
            "boxes": torch.from_numpy(row["patch_boxes"][variant]),
            "embeddings": torch.from_numpy(row["patch_embeddings"][variant]),
        }

    @staticmethod
    def collate(samples: list[PatchSample]) -> list[PatchSample]:
        """A list, as Detectron2's models take."""
        return samples
