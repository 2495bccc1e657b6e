# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.scale``: predict or embed more pictures than one machine holds, on a Ray cluster.

    python -m ovd.scale predict s3://bucket/photos --classes "dog, mug: cup" --out s3://bucket/found --workers 16
    python -m ovd.scale embed --workers 16 --config embed.yaml out=/shared/regions

``predict`` streams the files through Ray Data and writes Parquet, one row per detection. ``embed`` runs ``ovd.embed``
on every worker; they share the store's folder, whose leases keep them apart, and one that dies is started again.
Both need the optional extra ``scale`` (``ray[data]``); on one machine ``ovd.predict`` and ``ovd.embed`` do.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import BadImageError, UserError, run_cli
from pretrain.engine.flags import integer, share

if TYPE_CHECKING:
    from ovd.embed import EmbedConfig

# Workers hold their share of the CPUs to the end. With whole ones, as many workers as CPUs would leave nothing to read
# and write files with, and Ray would hang.
CPUS_OF_WORKER, CPUS_OF_FILES = 0.9, 0.05

COLUMNS = ("path", "class_name", "score", "x", "y", "width", "height", "mask", "error")


class PredictPictures:
    """Ray worker: loads the detector once, then turns batches of files into rows of detections.

    Args:
        weights: as for :meth:`ovd.Detector.load`.
        classes: the words, as typed.
        threshold: lowest score; None takes the calibrated default.
        masks: fill the column ``mask``.
        device: as for :meth:`ovd.Detector.load`.
    """

    def __init__(
        self,
        *,
        weights: str,
        classes: str,
        threshold: float | None = None,
        masks: bool = False,
        device: str = "auto",
    ) -> None:
        from ovd.detector import Detector

        self.detector = Detector.load(weights, device=device, masks=masks, cache_size=0)
        self.query = self.detector.query(classes)
        self.threshold = self.detector.threshold_for(self.query, threshold)
        self.masks = masks

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Predict some files.

        Args:
            batch: ``path`` and ``bytes`` of each, as ``ray.data.read_binary_files`` gives them.

        Returns:
            the columns ``path, class_name, score, x, y, width, height`` (pixels of the upright picture), ``mask`` (the
            counts of COCO's run-length code, or "") and ``error``: a file that is no picture has one row that says so
            there, and "" for its class.
        """
        rows: list[tuple[Any, ...]] = []
        for path, content in zip(batch["path"], batch["bytes"], strict=True):
            rows += self._rows(str(path), bytes(content))
        return {name: [row[n] for row in rows] for n, name in enumerate(COLUMNS)}

    def _rows(self, path: str, content: bytes) -> list[tuple[Any, ...]]:
        from ovd.pictures import to_rgb

        try:
            pixels = to_rgb(content)
        except BadImageError as problem:
            return [(path, "", 0.0, 0.0, 0.0, 0.0, 0.0, "", problem.reason)]
        detections = self.detector.answer(pixels, self.query, threshold=self.threshold)
        return [
            (path, name, entry["score"], *entry["bbox"], entry.get("segmentation", {}).get("counts", ""), "")
            for name, entry in zip(detections.class_name, detections.to_coco(0, masks=self.masks), strict=True)
        ]


def ray_or_explain() -> Any:
    """The ray package.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports clusters to its maker otherwise
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"python -m ovd.scale needs Ray ({error}): pip install 'wordbox[scale]'; on one machine use ovd.predict "
            "and ovd.embed, which need nothing more"
        ) from error
    return ray


def predict(paths: Sequence[str], out: str, *, workers: int, gpus: float, batch_size: int, **options: Any) -> None:
    """Stream files through ``workers`` copies of `PredictPictures` into Parquet files under ``out``.

    Args:
        paths: files and folders, local (then on every machine) or of a store that pyarrow knows (``s3://`` …).
        out: folder, of the same kinds.
        workers: processes, each with a detector.
        gpus: GPUs per worker; may be a fraction, 0 runs on CPUs.
        batch_size: files handed to a worker at a time.
        options: of `PredictPictures`.
    """
    ray = ray_or_explain()
    aside = {"num_cpus": CPUS_OF_FILES}
    files = ray.data.read_binary_files(list(paths), include_paths=True, ray_remote_args=aside)
    detections = files.map_batches(
        PredictPictures,
        fn_constructor_kwargs={**options, "device": "cuda" if gpus else "cpu"},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=CPUS_OF_WORKER,
        num_gpus=gpus,
    )
    detections.write_parquet(out, ray_remote_args=aside)


def embed(config: EmbedConfig, *, workers: int, gpus: float) -> None:
    """Run ``ovd.embed`` in ``workers`` Ray tasks on one store; a task whose machine dies is run again.

    Args:
        config: as for ``ovd.embed``; ``out`` is a folder that every machine sees.
        workers: tasks.
        gpus: GPUs per task.
    """
    from ovd.embed import run

    ray = ray_or_explain()
    if not ray.is_initialized():
        ray.init()
    task = ray.remote(num_gpus=gpus, max_retries=3)(run)
    ray.get([task.remote(config) for _ in range(workers)])


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--workers", type=int, default=2, help="processes over the whole cluster (default 2)")
    shared.add_argument("--gpus", type=float, default=0.0, help="GPUs per worker, also a fraction (default 0)")
    parser = argparse.ArgumentParser(
        prog="python -m ovd.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    flags = commands.add_parser("predict", parents=[shared], help="pictures to a table of detections")
    flags.add_argument("paths", nargs="+", help="files and folders, local or s3:// and the like")
    flags.add_argument("--classes", required=True, help='"dog, mug: cup, -poster"')
    flags.add_argument("--out", required=True, help="folder for Parquet files")
    flags.add_argument("--threshold", type=share, help="lowest score (default: the calibrated one)")
    flags.add_argument("--weights", default="default", help="name of shipped weights, or a folder on every machine")
    flags.add_argument("--masks", action="store_true", help="also masks, as COCO run lengths")
    flags.add_argument("--batch-size", type=integer(1), default=16, help="files per call of a worker (default 16)")
    commands.add_parser("embed", parents=[shared], help="ovd.embed on every worker; takes its --config and key=value")
    args, overrides = parser.parse_known_args(argv)
    if args.workers < 1 or not 0 <= args.gpus < math.inf:
        raise UserError("--workers must be at least 1, --gpus at least 0 and finite")
    if args.command == "embed":
        from ovd.embed import EmbedConfig
        from pretrain.engine.cli import command_line

        config, _ = command_line(EmbedConfig, overrides, prog="python -m ovd.scale embed", doc=__doc__ or "", flags=())
        embed(config, workers=args.workers, gpus=args.gpus)
        return 0
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; see python -m ovd.scale predict --help")
    predict(
        args.paths,
        args.out,
        workers=args.workers,
        gpus=args.gpus,
        batch_size=args.batch_size,
        weights=args.weights,
        classes=args.classes,
        threshold=args.threshold,
        masks=args.masks,
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
