# SPDX-License-Identifier: Apache-2.0
"""Running a detector for ``python -m ovd.evaluate --weights``: the data, the classes, and the predictor for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.data.lvis import is_lvis, split_of
from ovd.data.splits import Split
from ovd.detections import CocoResult
from ovd.evaluation import coco
from ovd.evaluation.options import VILD_REGIONS, DataSpec, EvaluationOptions
from ovd.evaluation.predictor import ClosedSetPredictor, Predictor, PretextPredictor, proposals_of
from ovd.evaluation.run import Predict, run_images, run_source
from ovd.formats.read import read_spec
from pretrain.data.coco import check_ground_truth
from pretrain.data.coco_entries import CocoJson, ImageId
from pretrain.engine.distributed import pick_device
from pretrain.engine.errors import UserError, warn
from pretrain.engine.files import read_json, sha256_of

if TYPE_CHECKING:
    from ovd.detector import Detector
    from ovd.examples import Crop
    from ovd.modeling.export import ArchitectureRecord
    from pretrain.data.scenes import SceneSource

EVALUATED_PARTS = ("val", "test")  # of a data set in parts, the first that it has
DEFAULT_SCALE = 100.0  # ViLD's inverse temperature

Record = dict[str, object]  # settings of the run; `run` in metrics.json


@dataclass(kw_only=True)
class EvaluatedData:
    """Data of an evaluation: a COCO file and its folder, or generated scenes.

    Attributes:
        split: base and novel categories.
        gt: annotations; None: those of the scenes, which are generated with them.
        folder: of the COCO file's pictures.
        scenes: generated, where there is no COCO file.
        crops: COCO id → crops from annotated pictures, which are left out of ``gt``; None without ``--examples``.
        sha256: of the annotation file; None: of the content that is evaluated.
    """

    split: Split
    gt: CocoJson | None = None
    folder: Path | None = None
    scenes: SceneSource | None = None
    crops: dict[int, list[Crop]] | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """The results of a detector on its data.

    Attributes:
        gt: the annotations.
        results, proposals: COCO results; None for what the model does not give.
        split: base and novel categories.
        generated: whether ``gt`` is of scenes, not of a file.
        dataset_sha256: of the annotations.
        record: see `Record`.
    """

    gt: CocoJson
    results: list[CocoResult] | None
    proposals: list[CocoResult] | None
    split: Split
    generated: bool
    dataset_sha256: str
    record: Record = field(default_factory=dict)


def run_model(options: EvaluationOptions, *, on_image: Callable[[int, int], None]) -> ModelRun:
    """Run the detector of ``--weights`` over ``--data``.

    Args:
        options: the flags.
        on_image: called with (images done, images in all).

    Raises:
        UserError: flags that do not fit the detector or the data.
    """
    data = read_data(options)
    record: Record = {"weights": str(options.weights), "data": options.data, "regions": options.regions}
    predict, propose = predictors(options, data, record)
    if options.soft_nms is not None:
        predict = _with_soft_nms(predict, options, record)
    gt = data.gt
    if gt is not None:
        assert data.folder is not None
        results, proposals = run_images(
            gt, data.folder, predict, propose=propose, on_image=on_image, where=str(options.data)
        )
    else:
        assert data.scenes is not None
        gt, results, proposals = run_source(data.scenes, predict, propose=propose, on_image=on_image)
    return ModelRun(
        gt=gt,
        results=results,
        proposals=proposals,
        split=data.split,
        generated=data.scenes is not None,
        dataset_sha256=data.sha256 or coco.content_sha256(gt),
        record=record,
    )


def read_data(options: EvaluationOptions) -> EvaluatedData:
    """Read what ``--data`` and ``--split`` name, and cut the crops of ``--examples`` from photographs."""
    assert options.data is not None
    data = DataSpec.parse(options.data)
    if data.labels is None and data.annotations is None:
        from pretrain.data.scenes import SceneSource
        from pretrain.data.stickers import Stickers

        shipped = Split.load("stickers")
        split = Split.load(options.split, categories=shipped.names) if options.split else shipped
        scenes = SceneSource(Stickers.load(), split="val", seed=data.seed, size=options.size, length=data.count)
        return EvaluatedData(split=split, scenes=scenes)
    from ovd.evaluation.examples import coco_crops

    if data.labels is not None:
        labels = read_spec(data.labels, prefer=EVALUATED_PARTS)
        gt, where, folder, digest = labels.content, labels.where, labels.root, None
        for notice in labels.notices:
            warn(f"{where}: {notice}")
    else:
        assert data.images is not None and data.annotations is not None
        gt, where, folder = read_json(data.annotations), str(data.annotations), data.images
        digest = sha256_of(data.annotations)
    split = Split.everything(check_ground_truth(gt, where=where).categories)
    if options.split or is_lvis(gt):
        split = split_of(options.split or "lvis", gt, where=where)
    if not options.examples:
        return EvaluatedData(split=split, gt=gt, folder=folder, sha256=digest)
    crops, remaining = coco_crops(gt, folder, count=options.examples, categories=categories_of(options, split))
    return EvaluatedData(split=split, gt=remaining, folder=folder, crops=crops)


def categories_of(options: EvaluationOptions, split: Split) -> dict[int, str]:
    """COCO id → name of the categories that `--vocabulary` names; known: those left out of the means as well."""
    group = {"all": split.ids, "base": split.base, "novel": split.novel}.get(options.vocabulary, split.names)
    return {i: split.names[i] for i in group}


def predictors(
    options: EvaluationOptions, data: EvaluatedData, record: Record
) -> tuple[Predict | None, Predict | None]:
    """Functions that give the results and the proposals of a picture; None where there are none."""
    from ovd.weights import detector_folder

    assert options.weights is not None
    folder = detector_folder(options.weights)
    device = str(pick_device(options.device))
    architecture = _architecture(folder)
    variant = architecture.get("variant")
    is_pretext = variant == "agnostic" and "patches" in architecture.get("head", {})
    if options.examples and (variant == "closed" or (variant == "agnostic" and not is_pretext)):
        raise UserError(
            f"--examples: {options.weights} (model.variant={variant}) cannot search by crop; "
            "leave it out, or evaluate a detector of model.variant=text or a pretext's transformer"
        )
    if options.encoder:
        return _with_encoder(options, data, record)
    if variant == "agnostic" and not options.examples:
        from ovd.modeling.load import load_proposer

        record["protocol"] = "class-agnostic detector: recall only"
        return None, proposals_of(load_proposer(folder, device=device), top=options.regions)
    if variant == "closed":
        return _closed_set(folder, data.split, options, device, record)
    detector = load_detector(options, record)
    if data.scenes is not None and not detector.model.has_published_protocol:
        warn("these weights are made for photographs, Sticker Scenes are drawings")
    if options.examples:
        predictor = by_examples(detector, options, data, record)
        if not isinstance(predictor, Predictor):
            record |= {
                "protocol": "UP-DETR pretext: queries are conditioned on the crops", "scores": "objectness"
            }  # fmt: skip
            return predictor, proposals_of(predictor.model, top=options.regions)
    else:
        predictor = by_words(detector, options, data.split, record)
        if options.vild:
            predictor = with_vild_protocol(predictor, options, data, record)
    if options.queries == "words":
        predictor = with_conditioned_queries(predictor, record)
    return predictor, predictor.propose if options.agnostic == "proposals" else None


def _with_encoder(options: EvaluationOptions, data: EvaluatedData, record: Record) -> tuple[Predict, Predict | None]:
    """Boxes of any detector, named by the crops that another encoder sees."""
    detector = load_detector(options, record)
    predictor: Predict | PretextPredictor | Predictor
    if options.examples:
        predictor = by_examples(detector, options, data, record)
    else:
        predictor = by_words(detector, options, data.split, record)
    proposals = options.agnostic == "proposals" and isinstance(predictor, Predictor)
    return predictor, proposals_of(detector.model, top=options.regions) if proposals else None


def _with_soft_nms(predictor: Predict | None, options: EvaluationOptions, record: Record) -> Predictor:
    """The predictor with Soft-NMS; notes it in the record.

    Raises:
        UserError: it scores no regions by class.
    """
    if not isinstance(predictor, Predictor):
        raise UserError(f"--soft-nms: {options.weights} scores no regions by words or crops; leave it out")
    record["soft_nms"] = options.soft_nms
    return replace(predictor, soft_nms=options.soft_nms)


def _closed_set(
    folder: Path, split: Split, options: EvaluationOptions, device: str, record: Record
) -> tuple[Predict, Predict]:
    from ovd.inference.detr_regions import ClosedSetDetr
    from ovd.modeling.load import load_detector_model

    model = load_detector_model(folder, top=options.limit, device=device)
    assert isinstance(model, ClosedSetDetr)
    record["protocol"] = "detector of a closed list of classes"
    predictor = ClosedSetPredictor.of(model, split, limit=options.limit)
    return predictor, proposals_of(model, top=options.regions)


def load_detector(options: EvaluationOptions, record: Record) -> Detector:
    """The detector of `--weights`; notes in the record what it is."""
    from ovd.detector import Detector

    assert options.weights is not None
    detector = Detector.load(
        options.weights,
        device=options.device,
        crop_refinement=0 if options.embeddings == "crops" else options.crop_refinement,
        masks=options.iou_types != ["bbox"],
        regions=options.regions,
        encoder=options.encoder,
        sides=options.sides,
    )
    if options.sides:
        record["sides"] = options.sides
    card = detector.model.card
    if options.encoder:
        record |= {"encoder": options.encoder, "calibrated": bool(detector.card["calibrated"])}
    record |= {
        "weights_sha256": detector.card.get("sha256"),
        "config_hash": None if card is None else card.config_hash,
        "crop_refinement": detector.crop_refinement,
    }
    return detector


def by_words(detector: Detector, options: EvaluationOptions, split: Split, record: Record) -> Predictor:
    """A predictor for words; notes its settings in the record."""
    from ovd.evaluation.predictor import predictor_for
    from ovd.vocabulary import Vocabulary

    vocabulary = None
    if not options.by_category:
        vocabulary = Vocabulary.load(options.vocabulary, templates=detector.templates)
    scale = options.scale
    if options.embeddings == "crops":
        detector, encoder_scale = _with_crop_embeddings(detector, options)
        scale = scale or encoder_scale
    card = detector.model.card
    scale = scale or (DEFAULT_SCALE if card is None else float(card.model["head"].get("scale", DEFAULT_SCALE)))
    predictor = predictor_for(
        detector,
        split,
        vocabulary=vocabulary,
        categories=categories_of(options, split) if options.by_category else None,
        ensemble=options.ensemble,
        scores=options.scores,
        scale=scale,
        limit=options.limit,
    )
    record |= {
        "vocabulary": options.vocabulary,
        "words": len(predictor.category_ids),
        "scores": options.scores,
        "scale": scale if options.scores == "published" else None,
        "ensemble": options.ensemble,
        "agnostic": options.agnostic,
    }
    return predictor


def with_vild_protocol(
    predictor: Predictor, options: EvaluationOptions, data: EvaluatedData, record: Record
) -> Predictor:
    """The predictor with ViLD's limits before NMS, and its classes embedded with the synonyms that LVIS names."""
    from ovd.evaluation.predictor import predictor_for
    from ovd.vocabulary import Vocabulary, VocabularyClass

    synonyms = {c["id"]: tuple(map(str, c.get("synonyms") or ())) for c in (data.gt or {}).get("categories", ())}
    names = categories_of(options, data.split)
    classes = tuple(
        VocabularyClass(name, tuple(s for s in dict.fromkeys(synonyms.get(i, ())) if s != name))
        for i, name in names.items()
    )
    count, scale = sum(len(entry.synonyms) for entry in classes), record["scale"]
    record |= {"vild": True, "synonyms": count}
    if count:
        assert isinstance(scale, float)
        predictor = predictor_for(
            predictor.detector,
            data.split,
            vocabulary=Vocabulary(classes, templates=predictor.detector.templates),
            categories=names,
            ensemble=options.ensemble,
            scale=scale,
            limit=options.limit,
        )
    return replace(predictor, per_class=VILD_REGIONS)


def _with_crop_embeddings(detector: Detector, options: EvaluationOptions) -> tuple[Detector, float]:
    """The detector with its encoder's embeddings of crops, and the encoder's own inverse temperature."""
    from ovd.inference.strategies import CropEmbeddings
    from pretrain.nets.towers import JointEncoder

    encoder = detector.text.encoder
    if not isinstance(encoder, JointEncoder):
        raise UserError(f"--embeddings crops: the encoder of {options.weights} has no image tower")
    crops = CropEmbeddings(model=detector.model, encoder=encoder)
    return detector.with_model(crops), float(encoder.logit_scale.detach().exp())


def by_examples(
    detector: Detector, options: EvaluationOptions, data: EvaluatedData, record: Record
) -> Predictor | PretextPredictor:
    """A predictor for crops: those of the pictures, or stickers."""
    from ovd.evaluation.examples import category_crops, example_predictor
    from pretrain.data.stickers import Stickers

    assert options.examples is not None
    crops: Mapping[int, Sequence[Crop]] | None = data.crops
    if crops is None:
        crops = category_crops(Stickers.load(), categories_of(options, data.split), count=options.examples)
    record |= {"examples": options.examples, "scores": "calibrated"}
    present = None
    if options.present:
        present = present_categories(data)
        record["present"] = "each picture is searched for what is in it only"
    return example_predictor(detector, crops, present=present, limit=options.limit)


def present_categories(data: EvaluatedData) -> dict[ImageId, frozenset[int]]:
    """Image id → COCO ids of what is in it."""
    from pretrain.data.scenes import coco_objects

    present: dict[ImageId, set[int]] = {}
    if data.scenes is not None:  # as run_source numbers them
        for index in range(len(data.scenes)):
            _, objects = coco_objects(data.scenes.scene(index), image_id=index + 1, first_annotation_id=1)
            present[index + 1] = {annotation["category_id"] for annotation in objects}
    elif data.gt is not None:
        present = {entry["id"]: set() for entry in data.gt["images"]}
        for annotation in data.gt["annotations"]:
            if not annotation.get("iscrowd"):
                present[annotation["image_id"]].add(annotation["category_id"])
    return {image: frozenset(ids) for image, ids in present.items()}


def with_conditioned_queries(predictor: Predictor, record: Record) -> Predictor:
    """The predictor with the transformer's queries conditioned on its classes.

    Raises:
        UserError: its queries were not trained for that.
    """
    from ovd.config_detr import DetrConfig
    from ovd.inference.detr_regions import OpenVocabularyDetr
    from ovd.inference.strategies import ConditionedQueries

    model = predictor.detector.model
    architecture = model.card.architecture if model.card is not None else None
    per_pass = architecture.conditioned if isinstance(architecture, DetrConfig) else 0
    if not isinstance(model, OpenVocabularyDetr) or not per_pass:
        raise UserError(
            "--queries words: this detector's queries were not trained to take words; train configs/ov_detr.yaml"
        )
    record |= {"queries": "words", "words_at_once": per_pass}
    conditioned = ConditionedQueries(model=model, rows=predictor.scorer.rows, classes_per_pass=per_pass)
    return replace(predictor, detector=predictor.detector.with_model(conditioned))


def _architecture(folder: Path) -> ArchitectureRecord:
    """The model section of an exported detector's card; empty where there is none, which the loader explains."""
    from ovd.modeling.export import architecture_record

    card = read_json(folder / "model.json") if (folder / "model.json").is_file() else {}
    model = card.get("model", {}) if isinstance(card, dict) else {}
    return architecture_record(model if isinstance(model, dict) else {})
