# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.embed --config embed.yaml``: write offline proposals and their embeddings.

A proposal model, trained on base labels only, finds boxes; an image encoder embeds their crops; the result is the
region store that ``ovd.train`` distils from. The same command again continues a store, and any number of machines that
share the folder may run it at the same time. ``python -m ovd.embed verify STORE`` checks every byte of one.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pretrain.engine.cli import command_line
from pretrain.engine.config import FREE, LATER, Section
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.files import read_json
from pretrain.engine.stages import require_stages

if TYPE_CHECKING:
    from ovd.regions.layout import ImageSource
    from ovd.regions.proposals import Proposer

GROUND_TRUTH = "ground-truth"


class PicturesConfig(Section):
    """The pictures whose regions are embedded; the same values as in ``data`` of the training."""

    kind: Literal["stickers", "coco", "yolo", "voc", "auto", "folder"] = Field(
        "stickers",
        description="Sticker Scenes, photos with labels (auto: in whatever form they are), or a folder of photos",
    )
    split: Literal["train", "val"] = Field("train", description="styles and photos the scenes are made of (stickers)")
    seed: int = Field(0, ge=0, description="seed of the scenes (stickers)")
    length: int = Field(4000, ge=1, description="how many scenes (stickers); a training may use fewer")
    size: int = Field(256, ge=64, le=2048, description="side of a scene in pixels (stickers)")
    extra_styles: bool = Field(False, description="scenes in the further training styles too (stickers)")
    images: str | None = Field(None, description="folder of pictures (coco, folder; else looked for)")
    annotations: str | None = Field(
        None, description="COCO annotation file, YOLO's data.yaml, or the folder of a data set (not stickers, folder)"
    )
    part: str | None = Field(
        None,
        description="part of a data set: train, val, …; null: train, where it has one (coco: all)",
        json_schema_extra=LATER,
    )

    @model_validator(mode="after")
    def _files(self) -> PicturesConfig:
        if self.kind in ("coco", "folder") and not self.images:
            raise ValueError(f"pictures.kind {self.kind} needs pictures.images")
        if self.kind not in ("stickers", "folder") and not self.annotations:
            raise ValueError(f"pictures.kind {self.kind} needs pictures.annotations")
        return self


class CropsConfig(Section):
    """How a box becomes the encoder's input."""

    scales: tuple[float, ...] = Field(
        (1.0, 1.5),
        min_length=1,
        max_length=4,
        description="one crop per scale of the box; embeddings are summed (ViLD: 1, 1.5)",
    )
    mode: Literal["squash", "center", "pad"] = Field(
        "squash",
        description="long boxes: stretched to a square, cut to the central square (CLIP's own way), or padded",
    )
    border: Literal["clamp", "fill"] = Field(
        "clamp", description="beyond the picture: cut the box at the border, or show the encoder's mean colour"
    )
    resample: Literal["bilinear", "bicubic"] = Field("bilinear", description="antialiased filter")
    normalise_each: bool = Field(False, description="normalise each crop's embedding before the sum too")

    @model_validator(mode="after")
    def _positive(self) -> CropsConfig:
        if not all(0.1 <= scale <= 3 for scale in self.scales):
            raise ValueError("crops.scales must lie between 0.1 and 3")
        return self


class EmbedConfig(Section):
    """``python -m ovd.embed``: offline proposals and their embeddings."""

    out: str = Field(
        ..., description="folder of the store; a store of the same settings in it is continued", json_schema_extra=FREE
    )
    proposer: str = Field(
        ...,
        description="detector that proposes: a folder exported by ovd.train, a name under weights/, or ground-truth",
    )
    encoder: str = Field(
        "clip-sticker",
        description="image-text encoder: a name under weights/, a folder, a CLIP checkpoint, or open_clip:MODEL:TAG",
    )
    pictures: PicturesConfig = Field(PicturesConfig(), description="which pictures")
    proposals_per_image: int = Field(100, ge=1, le=5000, description="best proposals kept per picture (ViLD: 300)")
    crops: CropsConfig = Field(CropsConfig(), description="box to crop to embedding")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the encoder")
    images_per_shard: int = Field(128, ge=1, le=100_000, description="pictures per shard, the unit of work and of loss")
    batch_size: int = Field(
        256,
        ge=1,
        le=65536,
        description="crops per forward of the encoder; on a CPU at most 32",
        json_schema_extra=FREE,
    )
    processes: int = Field(1, ge=1, le=256, description="local processes that share the work", json_schema_extra=FREE)
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads per process; null: leave it to torch", json_schema_extra=FREE
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$", description="where the models run", json_schema_extra=FREE
    )
    lease_seconds: float = Field(
        300.0, ge=5, description="a shard whose process was silent for this long is taken over", json_schema_extra=FREE
    )


def make_images(config: PicturesConfig) -> ImageSource:
    """The pictures that a section describes."""
    from ovd.regions.images import CocoPictures, FolderPictures, ScenePictures

    if config.kind == "folder":
        return FolderPictures(config.images or "")
    if config.kind != "stickers":
        from ovd.formats.read import read_labels

        labels = read_labels(
            config.annotations or "",
            kind=None if config.kind == "auto" else config.kind,
            images=Path(config.images) if config.images else None,
            part=config.part,
            prefer=() if config.kind == "coco" else ("train",),
        )
        photos = CocoPictures(labels.truth(), labels.root)
        for notice in photos.notices:
            warn(notice)
        return photos
    from pretrain.data.scenes import SceneSource
    from pretrain.data.stickers import Stickers

    stickers = Stickers.load(extra_styles=config.extra_styles)
    return ScenePictures(
        SceneSource(stickers, split=config.split, seed=config.seed, size=config.size, length=config.length)
    )


def make_proposer(spec: str, images: ImageSource, *, device: str) -> tuple[Proposer, str]:
    """A proposal model and its fingerprint.

    Raises:
        UserError: no such detector, or pictures without ground truth.
    """
    if spec == GROUND_TRUTH:
        from ovd.regions.images import CocoPictures
        from ovd.regions.layout import BoxedImageSource
        from ovd.regions.proposals import GroundTruthProposer

        if not isinstance(images, BoxedImageSource):
            raise UserError("proposer=ground-truth needs pictures with boxes: pictures.kind stickers or coco")
        if isinstance(images, CocoPictures):
            return GroundTruthProposer(images.boxes), f"{GROUND_TRUTH}:{images.boxes_fingerprint()}"
        return GroundTruthProposer(images.boxes), GROUND_TRUTH
    folder = Path(spec)
    if not folder.exists():
        from ovd.weights import weights_folder

        folder = weights_folder(spec)
    from ovd.modeling.load import load_proposer

    return load_proposer(folder, device=device), detector_fingerprint(folder)


def detector_fingerprint(folder: Path) -> str:
    """sha256 over what decides a detector's boxes: its weights, architecture and input size, not its calibration.

    Of a detector of photographs (``model.arch: fvlm``) that is its proposal network alone.
    """
    card = read_json(folder / "model.json")
    if isinstance(card.get("model"), dict) and card["model"].get("arch") == "fvlm":
        return detector_fingerprint(folder / "proposals")
    decisive = {key: card.get(key) for key in ("model", "pixel_mean", "pixel_std", "short_side", "long_side")}
    if "sides" in card:  # proposals without words; the others' fingerprints stay what they were
        decisive["sides"] = card["sides"]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    with open(folder / "model.safetensors", "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run(config: EmbedConfig, *, check: bool = False, overwrite: bool = False) -> None:
    """Write the store in this process, or, with ``check``, only try two pictures and print the estimate."""
    from ovd.regions.layout import Identity, StoreSettings
    from ovd.regions.shard import RegionEmbedder
    from ovd.regions.writer import estimate, plan_line, remove_store, write_regions
    from ovd.training.inputs import resolve_encoder
    from pretrain.engine.distributed import pick_device

    device = pick_device(config.device, threads=config.threads)
    images = make_images(config.pictures)
    encoder = resolve_encoder(config.encoder).to(device)
    proposer, proposals = make_proposer(config.proposer, images, device=str(device))
    identity = Identity(
        encoder=encoder.fingerprint(),
        dim=encoder.embed_dim,
        proposals=proposals,
        source="" if check else images.fingerprint(),  # reads every picture
        settings=StoreSettings(
            proposals_per_image=config.proposals_per_image,
            crop_size=encoder.image_size,
            scales=config.crops.scales,
            crop_mode=config.crops.mode,
            border=config.crops.border,
            resample=config.crops.resample,
            normalise_each=config.crops.normalise_each,
            precision=config.precision,
            images_per_shard=config.images_per_shard,
        ),
        notes={
            "encoder": config.encoder,
            "proposer": config.proposer,
            "pictures": config.pictures.model_dump(mode="json", exclude_none=True),
        },
    )
    if check:
        embedder = RegionEmbedder(
            source=images,
            proposer=proposer,
            encoder=encoder,
            settings=identity.settings,
            batch_size=config.batch_size,
        )
        print(plan_line(embedder, estimate(len(images), identity=identity), identity.dim))
        return
    if overwrite:
        remove_store(config.out)
    report = write_regions(
        config.out,
        source=images,
        proposer=proposer,
        encoder=encoder,
        identity=identity,
        batch_size=config.batch_size,
        lease_seconds=config.lease_seconds,
        log=lambda line: print(line, flush=True),
    )
    unreadable = (
        f"; {report.bad_images} unreadable pictures are listed in its shard-*.json files" if report.bad_images else ""
    )
    print(f"{config.out}: {report.written} shards written, {report.reused} were whole already{unreadable}", flush=True)


def verify(folder: str) -> int:
    """Check every byte of a store; returns the exit status."""
    from ovd.regions.store import RegionStore

    store = RegionStore.open(folder)
    problems = store.verify()
    for problem in problems:
        print(problem)
    if problems:
        print(
            f"{folder}: {len(problems)} problems: run the same `python -m ovd.embed` command again to repair the store"
        )
        return 1
    print(f"{folder}: whole: {len(store)} pictures, {store.manifest['regions']} regions of {store.dim} numbers")
    return 0


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    if argv[:1] == ["verify"]:
        if len(argv) != 2:
            raise UserError("usage: python -m ovd.embed verify STORE")
        return verify(argv[1])
    config, options = command_line(EmbedConfig, argv, prog="wordbox embed", doc=__doc__ or "")
    require_stages(config)
    # A terminated process gives its leases back on the way out; a killed one is found out by the others.
    signal.signal(signal.SIGTERM, _terminate)
    if options.check or config.processes == 1:
        run(config, check=options.check, overwrite=options.overwrite)
        return 0
    if options.overwrite:
        from ovd.regions.writer import remove_store

        remove_store(config.out)
    shared = [argument for argument in argv if argument != "--overwrite"]
    command = [sys.executable, "-m", "ovd.embed", *shared, "processes=1"]
    helpers = [subprocess.Popen(command) for _ in range(config.processes - 1)]
    try:
        run(config)
        failed = [helper.wait() for helper in helpers]
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
                helper.wait()
    count = sum(map(bool, failed))
    if count:
        warn(f"{count} of {len(helpers)} helper processes failed; the store is whole all the same")
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run_cli(main)
