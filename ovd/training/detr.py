# SPDX-License-Identifier: Apache-2.0
"""What ``python -m ovd.train`` does with a configuration of a detection transformer: UP-DETR's pretext, or training.

python -m ovd.train --config updetr.yaml                                   patches, no labels
python -m ovd.train --config detr.yaml weights=runs/updetr/exported       fine-tune on labels
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.config_detr import DetrTrainConfig
from pretrain.engine.config import config_hash, find_config
from pretrain.engine.config_yaml import read_chain
from pretrain.engine.errors import BadImageError, ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ovd.data.catalog import Labelled, LabelledImages
    from ovd.data.mapper import DetectionSource
    from ovd.data.patches import PatchSource
    from ovd.modeling.detr.conditioning import ClassCrops
    from ovd.modeling.detr.network import Detr
    from ovd.modeling.region_head import Tower
    from ovd.modeling.task import DetectionTask
    from pretrain.engine.sampling import Source
    from pretrain.nets.towers import JointEncoder

CROP_SCALES = (1.0, 1.5)  # of the joint space's regions (ViLD §3.2)
CACHE_BATCH = 16
CROPS_PER_CLASS = 8  # that queries may be told in training
CROP_PICTURES = 2000  # labelled pictures that are searched for them, at most
START_SAMPLES = 32  # pictures whose features tell where the projections start


def arch_of(argv: Sequence[str]) -> str | None:
    """``model.arch`` of a command line's configuration, None where it has none: then it is a Mask R-CNN's.

    A configuration that cannot be read has none: whoever reads it next explains what is wrong with it.
    """
    words = list(argv)
    for number, word in enumerate(words):
        key, _, value = word.removeprefix("--").partition("=")
        if key == "model.arch":
            return value or "".join(words[number + 1 : number + 2])
    given = [w.partition("=")[2] for w in words if w.startswith("--config=")]
    given += [b for a, b in itertools.pairwise(words) if a == "--config"]
    if not given:
        return None
    try:
        roots, _ = read_chain(find_config(given[-1]))
    except ConfigError:
        return None
    for root in roots:
        plain = root.plain()
        if isinstance(plain, dict) and isinstance(plain.get("model"), dict) and "arch" in plain["model"]:
            return str(plain["model"]["arch"])
    return None


def is_transformer(argv: Sequence[str]) -> bool:
    """Whether a command line's configuration describes a detection transformer (``model.arch``)."""
    return arch_of(argv) not in (None, "nanodet")


@dataclass(frozen=True)
class FirstImages:
    """The first pictures of a data set: what a fraction of the labels is."""

    images: LabelledImages
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""
        return self.images.names

    @property
    def novel(self) -> frozenset[int]:
        """Novel classes."""
        return self.images.novel

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def load(self, index: int) -> Labelled:
        """Picture ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.images.load(index)


def build(config: DetrTrainConfig) -> dict[str, Any]:
    """Everything a training needs: model, task, source, encoder and the pieces of the card."""
    import torch

    from ovd.modeling.backbone import load_resnet
    from ovd.modeling.detr.build import build_detr, read_start, refuse_other_attention, start_detr
    from ovd.text import embed_vocabulary
    from ovd.training.inputs import labelled_images, resolve_encoder
    from ovd.vocabulary import Vocabulary
    from pretrain.engine.distributed import pick_device, seed_everything

    seed_everything(config.loop.seed)
    encoder = resolve_encoder(config.encoder)
    mean, std, backbone = read_backbone(config, encoder)
    images: LabelledImages | None = None
    rows = trainable = None
    novel: frozenset[int] = frozenset()
    if config.pretext is None:
        images = labelled_images(config.data)
        novel = images.novel if config.data.labels == "base" else frozenset()
        rows = embed_vocabulary(Vocabulary.of(images.names), encoder)
        trainable = torch.ones(len(images.names), dtype=torch.bool)
        trainable[sorted(novel)] = False
        if config.model.conditioned > int(trainable.sum()):
            raise UserError(
                f"model.conditioned: {config.model.conditioned} classes are asked of each picture, but only "
                f"{int(trainable.sum())} can be trained; set model.conditioned to at most that"
            )
        if config.images_limit is not None:
            images = FirstImages(images, config.images_limit)
    model = build_detr(
        config.model,
        embed_dim=encoder.embed_dim,
        rows=rows,
        trainable=trainable,
        classes=len(images.names) if images is not None else 0,
        pixel_mean=mean,
        pixel_std=std,
    )
    load_resnet(model.backbone, backbone, source=config.backbone_weights or f"encoder {config.encoder}")
    if model.region_tower is not None:
        print(start_region_tower(config, model.region_tower, encoder, backbone))
    if config.weights is not None:
        state, own_backbone = read_start(Path(config.weights))
        refuse_other_attention(Path(config.weights), state, config.model)
        report = start_detr(model, state, source=config.weights, backbone=own_backbone)
        print(f"weights={config.weights}: {report}")
    # Before the loop does it: what is cached or embedded ahead of the first step is computed there too.
    device = pick_device(config.loop.device)
    model.to(device)
    encoder.to(device)
    parts: dict[str, Any] = {
        "encoder": encoder, "images": images, "rows": rows, "novel": novel, "model": model, "mean": mean, "std": std
    }  # fmt: skip
    if config.pretext is not None:
        parts |= pretext_parts(config, model, encoder)
    else:
        assert images is not None and trainable is not None
        parts |= training_parts(config, model, images)
        if config.model.crop_conditions:
            model.class_crops = class_crops(images, trainable, encoder, share=config.model.crop_conditions).to(device)
            print(f"queries are told {len(model.class_crops.rows_RD)} crops of labelled things too")
    if config.weights is None and config.model.arch == "conditional":  # the original starts as its authors had it
        print(start_inputs(config, parts))
    return parts


def start_region_tower(
    config: DetrTrainConfig, tower: Tower, encoder: JointEncoder, backbone: Mapping[str, Tensor]
) -> str:
    """Start the region tower as the backbone's last stage and the encoder's projection; returns what was done."""
    from ovd.modeling.region_head import start_body, start_projection
    from pretrain.nets.towers import ResNetImage

    start_body(tower, backbone, source=config.backbone_weights or f"encoder {config.encoder}")
    if config.backbone_weights is not None:
        return "region_tower starts as the backbone's last stage, its projection at random"
    assert isinstance(encoder.visual, ResNetImage)  # read_backbone refuses others
    start_projection(tower, encoder.visual.proj.weight)
    return f"region_tower starts as the last stage and projection of encoder {config.encoder}"


def start_inputs(config: DetrTrainConfig, parts: Mapping[str, Any]) -> str:
    """Start the projections of tokens and patches from the first samples; returns what was done, for the log."""
    import torch

    from ovd.modeling.detr.build import start_projections
    from ovd.modeling.detr.updetr import PatchPretext
    from pretrain.nets.towers import ResNetImage

    model, task, source, encoder = parts["model"], parts["task"], parts["source"], parts["encoder"]
    was = model.training
    model.eval()
    embeddings = projection = None
    with torch.no_grad():
        batch = []
        for index in range(min(START_SAMPLES, len(source))):
            try:
                batch.append(source.sample(index, 0))
            except BadImageError:  # the loop lists it, and stops if there are too many
                continue
        if not batch:
            return f"input_proj starts at random: none of the first {START_SAMPLES} pictures can be read"
        # One by one: pictures may differ in size, and padding is no token.
        tokens = torch.cat([model.joined(model.maps_of([one])[0])[0].flatten(1).T for one in batch])
        if isinstance(task, PatchPretext):
            embeddings = task.embeddings(batch).flatten(0, 1)
            if config.backbone_weights is None and isinstance(encoder.visual, ResNetImage):
                if config.model.embed_space == "clip" and config.model.backbone.features[-1] == "res5":
                    projection = encoder.visual.proj.weight
    model.train(was)
    return start_projections(model, tokens_SC=tokens, embeddings_PD=embeddings, projection_DC=projection)


def read_backbone(
    config: DetrTrainConfig, encoder: JointEncoder
) -> tuple[list[float], list[float], Mapping[str, Tensor]]:
    """(mean, std in 0…255, torchvision-named tensors) of the backbone that the configuration names.

    Raises:
        UserError: no ResNet there.
    """
    from ovd.training.inputs import backbone_tensors
    from pretrain.nets.towers import ResNetImage, export_backbone

    look: tuple[tuple[float, ...], tuple[float, ...]] | None = (encoder.image_mean, encoder.image_std)
    if config.backbone_weights is not None:
        bb = config.model.backbone
        state, own = backbone_tensors(config.backbone_weights, stem=bb.stem, norms={"model.backbone.norm": bb.norm})
        look = own or look
    elif isinstance(encoder.visual, ResNetImage):
        state = export_backbone(encoder)
    else:
        raise UserError(
            f"encoder {config.encoder}: its image tower is no ResNet, so no backbone can start from it; "
            "set backbone_weights=FILE or the exported/ folder of a pretrain run"
        )
    assert look is not None
    return [255.0 * v for v in look[0]], [255.0 * v for v in look[1]], state


# --- the pretext


def pretext_parts(config: DetrTrainConfig, model: Detr, encoder: JointEncoder) -> dict[str, Any]:
    """Task and source of the pretext."""
    from ovd.data.features import Readable
    from ovd.modeling.detr.updetr import PatchPretext
    from pretrain.engine.distributed import world_size

    pretext = config.pretext
    assert pretext is not None
    embed = patch_embedder(config, model, encoder)
    space = encoder.fingerprint() if config.model.embed_space == "clip" else "backbone"
    train = patch_source(config, pretext.images, seed=config.loop.seed)
    source: Source = train
    if config.cache is not None:
        source = cached_patches(
            config, model, embed, train, pretext.images, variants=pretext.patches.variants, space=space
        )
    held_out: list[list[dict[str, Any]]] = []
    if pretext.held_out_count:
        other = patch_source(
            config, pretext.held_out, seed=config.loop.seed + 1, count=pretext.held_out_count, augmented=False
        )
        held: Source = other
        if config.cache is not None:
            held = cached_patches(config, model, embed, other, pretext.held_out, variants=1, space=space)
        readable = Readable(len(held))
        batch = [readable(index, lambda index: held.sample(index, 0)) for index in range(len(held))]
        size = max(1, config.loop.batch_size // (world_size() * config.loop.accumulate))  # as in a training step
        held_out = [batch[i : i + size] for i in range(0, len(batch), size)]
    task = PatchPretext(
        model=model,
        embed=embed,
        grouped=pretext.grouped,
        attention_mask=pretext.attention_mask,
        shuffle=pretext.shuffle,
        mask_queries=pretext.mask_queries,
        held_out=held_out,
        evaluate_every=pretext.evaluate_every,
        pretrained_lr_scale=config.pretrained_lr_scale,
    )
    return {"task": task, "source": source}


def patch_embedder(config: DetrTrainConfig, model: Detr, encoder: JointEncoder) -> Callable[[Tensor], Tensor]:
    """(P, K, 3, S, S) uint8 → (P, D): by the frozen backbone, or by the joint space's image encoder."""
    from ovd.regions.crops import embed_crops

    def own(patches: Tensor) -> Tensor:
        return model.pooled(patches[:, 0])

    def joint(patches: Tensor) -> Tensor:
        return embed_crops(encoder, patches).to(model.device)

    return joint if config.model.embed_space == "clip" else own


@dataclass(frozen=True)
class _First:
    """The first pictures of an unlabelled set."""

    images: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def image(self, index: int) -> Any:
        return self.images.image(index)

    def label(self, index: int) -> int:
        return -1


def patch_source(
    config: DetrTrainConfig, images: Any, *, seed: int, count: int | None = None, augmented: bool = True
) -> PatchSource:
    """Patches of the pictures that a section describes; held-out ones are measured in one size and as they are."""
    from ovd.data.mapper import TrainingTransform
    from ovd.data.patches import PatchSource
    from pretrain.data.images import build_images

    assert config.pretext is not None
    patches, data = config.pretext.patches, config.data
    pictures = build_images(images)
    return PatchSource(
        images=pictures if count is None else _First(pictures, count),
        transform=TrainingTransform(
            short_side=data.short_side,
            long_side=data.long_side,
            scale=data.scale if augmented else (1.0, 1.0),
            crop=None,
            flip=0.0,
        ),
        seed=seed,
        sampler=patches.sampler,
        count=patches.count,
        size=patches.size,
        min_side=patches.min_side,
        scale=patches.scale,
        max_aspect=patches.max_aspect,
        max_iou=patches.max_iou,
        crop_scales=CROP_SCALES if config.model.embed_space == "clip" else (1.0,),
        jitter=patches.jitter and augmented,
        variants=patches.variants,
    )


def fingerprint(config: DetrTrainConfig, model: Detr) -> dict[str, Any]:
    """What determines cached features beside the pictures: the backbone's weights and the input size."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    mean, std = model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()
    return {
        "backbone": digest.hexdigest(),
        "features": list(config.model.backbone.features),
        "pixels": [mean, std],
        "sides": [config.data.short_side, config.data.long_side],
        "precision": config.cache_precision,
    }


def _maps(model: Detr, images: list[Any], precision: str) -> dict[str, Any]:
    """Feature maps of pictures of one size as arrays.

    Raises:
        UserError: pictures of several sizes.
    """
    import torch

    if len({tuple(image.shape) for image in images}) > 1:
        raise UserError("cache: the pictures have different sizes after the resize; set cache=null")
    with torch.no_grad():
        maps = model.maps(model.normalised(torch.stack(images)))
    dtype = torch.float16 if precision == "float16" else torch.float32
    return {name: value.to(dtype).cpu().numpy() for name, value in maps.items()}


def cached_patches(
    config: DetrTrainConfig,
    model: Detr,
    embed: Callable[[Tensor], Tensor],
    source: PatchSource,
    images: Any,
    *,
    variants: int,
    space: str,
) -> Source:
    """The same samples from cached features and embeddings."""
    import numpy as np

    from ovd.data.features import CachedPatches, FeatureCache, Readable, files_of

    assert config.pretext is not None
    readable = Readable(len(source))

    def variants_of(index: int) -> list[dict[str, Any]]:
        return [source.variant(index, v) for v in range(variants)]

    def compute(indices: list[int]) -> dict[str, Any]:
        import torch

        samples = [readable(index, variants_of) for index in indices]
        patches = torch.stack([one["patches"] for group in samples for one in group])  # (n·V, M, K, 3, S, S)
        with torch.no_grad():
            z = embed(patches.flatten(0, 1).to(model.device)).cpu()
        dtype = np.float16 if config.cache_precision == "float16" else np.float32
        return {
            **_maps(model, [group[0]["image"] for group in samples], config.cache_precision),
            "size": np.array([group[0]["size"] for group in samples]),
            "patch_boxes": np.stack([np.stack([one["boxes"].numpy() for one in group]) for group in samples]),
            "patch_embeddings": z.numpy().astype(dtype).reshape(len(indices), variants, source.count, -1),
        }

    patches = config.pretext.patches.model_dump(mode="json") | {"variants": variants}
    described = images.model_dump(mode="json")
    key = {
        **fingerprint(config, model),
        "images": described,
        **files_of(described),
        "patches": patches,
        "seed": source.seed,
        "space": space,
    }
    model.eval()
    cache = FeatureCache.open(Path(config.cache or ""), key=key, count=len(source), compute=compute, batch=CACHE_BATCH)
    return CachedPatches(cache=cache, features=config.model.backbone.features)


# --- labels


def class_crops(images: LabelledImages, trainable: Tensor, encoder: JointEncoder, *, share: float) -> ClassCrops:
    """Crops of the first labelled things of each class, embedded as examples are when a person shows them.

    Args:
        images: labelled pictures.
        trainable: (C,) bool.
        encoder: with an image tower, on the device of the training.
        share: see `ClassCrops`.

    Raises:
        UserError: an encoder without an image tower, or no thing is large enough to be shown.
    """
    import torch

    from ovd.examples import MIN_SIDE
    from ovd.modeling.detr.conditioning import ClassCrops
    from ovd.regions.crops import embed_regions

    if encoder.visual is None:
        raise UserError("model.crop_conditions: this encoder knows texts only; it cannot say what a crop shows")
    had = torch.zeros(len(trainable), dtype=torch.int64)
    wanted = CROPS_PER_CLASS * int(trainable.sum())
    rows, labels = [], []
    for index in range(min(CROP_PICTURES, len(images))):
        if int(had.sum()) == wanted:
            break
        try:
            labelled = images.load(index)
        except BadImageError:  # the loop lists it, and stops if there are too many
            continue
        height, width = labelled.image.shape[:2]
        boxes = labelled.boxes.clip(0, [width, height, width, height])
        chosen = []
        for number, (box, label) in enumerate(zip(boxes, labelled.classes.tolist(), strict=True)):
            large = min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE
            if large and bool(trainable[label]) and had[label] < CROPS_PER_CLASS:
                chosen.append(number)
                had[label] += 1
        if chosen:
            rows.append(embed_regions(encoder.eval(), labelled.image, boxes[chosen]).cpu())
            labels.append(torch.from_numpy(labelled.classes[chosen]).long())
    if not rows:
        raise UserError(
            f"model.crop_conditions: no labelled thing of {MIN_SIDE} pixels in the first {CROP_PICTURES} pictures; "
            "set it to 0"
        )
    return ClassCrops(rows_RD=torch.cat(rows), labels_R=torch.cat(labels), classes=len(trainable), share=share)


def training_parts(config: DetrTrainConfig, model: Detr, images: LabelledImages) -> dict[str, Any]:
    """Task and source of training on labels."""
    from ovd.data.mapper import DetectionSource, TrainingTransform
    from ovd.modeling.task import DetectionTask

    data = config.data
    source = DetectionSource(
        images=images,
        transform=TrainingTransform(
            short_side=data.short_side,
            long_side=data.long_side,
            scale=data.scale,
            crop=data.crop,
            cut=data.cut,
            flip=data.flip,
        ),
        seed=config.loop.seed,
        agnostic=config.model.variant == "agnostic",
    )
    task: DetectionTask = DetectionTask(
        model=model, pretrained_prefixes=("backbone.", "region_tower."), pretrained_lr_scale=config.pretrained_lr_scale
    )
    setattr(task, "find_unused_parameters", True)  # noqa: B010  # conditions and embeddings rest in some configurations
    if config.model.backbone.frozen:
        setattr(task, "untracked", ("model.backbone.",))  # noqa: B010
    return {"task": task, "source": source if config.cache is None else cached_detection(config, model, source)}


def cached_detection(config: DetrTrainConfig, model: Detr, source: DetectionSource) -> Source:
    """The same samples from cached features, with and without a flip."""
    from dataclasses import replace

    import numpy as np

    from ovd.data.features import CachedDetection, FeatureCache, Readable, files_of, pad_objects
    from ovd.data.mapper import TrainingTransform, map_sample

    images = source.images
    whole = images.images if isinstance(images, FirstImages) else images  # fractions share one cache
    data = config.data
    described = data.model_dump(mode="json", exclude={"flip", "cut"})
    readable, files = Readable(len(whole)), files_of(described)
    caches = []
    model.eval()
    for flip in (0.0, 1.0) if data.flip else (0.0,):
        transform = TrainingTransform(short_side=data.short_side, long_side=data.long_side, flip=flip)

        def compute(indices: list[int], transform: TrainingTransform = transform) -> dict[str, Any]:
            rng = np.random.default_rng(0)
            samples = []
            for index in indices:
                labelled = readable(index, whole.load)
                # Masks are not learned here; empty ones would drop their boxes, so none are passed on.
                full = np.ones((len(labelled.boxes), *labelled.image.shape[:2]), dtype=bool)
                samples.append(
                    map_sample(
                        replace(labelled, masks=full), transform=transform, rng=rng, offline=None, regions_per_image=0
                    )
                )
            labels = [pad_objects(one["instances"]) for one in samples]
            return {
                **_maps(model, [one["image"] for one in samples], config.cache_precision),
                **{name: np.stack([one[name] for one in labels]) for name in labels[0]},
            }

        key = {**fingerprint(config, model), "data": described, **files, "flip": flip, "agnostic": False}
        caches.append(
            FeatureCache.open(Path(config.cache or ""), key=key, count=len(whole), compute=compute, batch=CACHE_BATCH)
        )
    return CachedDetection(source=source, caches=caches, features=config.model.backbone.features)


def export(config: DetrTrainConfig, parts: dict[str, Any], folder: Path) -> None:
    """Write the trained transformer with its card."""
    from dataclasses import asdict

    import torch

    from ovd.inference.scoring import Calibration
    from ovd.modeling.vild.build import DetectorCard, save_detector

    encoder, images = parts["encoder"], parts["images"]
    names: tuple[str, ...] = images.names if images is not None else ()
    bank = [i for i in range(len(names)) if i not in images.novel] if images is not None else []
    variant = "agnostic" if images is None else config.model.variant
    worded = variant == "text"
    head: dict[str, Any] = {"scale": config.model.scale}  # what commands read of any detector's card
    if config.pretext is not None:
        head |= {"patches": config.pretext.patches.count, "patch_size": config.pretext.patches.size}
    card = DetectorCard(
        model={**config.model.model_dump(mode="json"), "variant": variant, "head": head},
        embed_dim=encoder.embed_dim,
        pixel_mean=tuple(parts["mean"]),
        pixel_std=tuple(parts["std"]),
        encoder=config.encoder,
        encoder_fingerprint=encoder.fingerprint(),
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        classes=names if variant != "agnostic" else (),
        novel=tuple(sorted(parts["novel"])) if worded else (),
        bank=tuple(names[i] for i in bank) if worded else (),
        calibration=asdict(
            Calibration(logit_scale=config.model.scale, objectness_weight=1.0, example_objectness_weight=1.0)
        ),
        config_hash=config_hash(config),
    )
    rows = parts["rows"][torch.tensor(bank)] if worded else torch.zeros(0, encoder.embed_dim)
    save_detector(folder, parts["model"], card, bank=rows)
