# SPDX-License-Identifier: Apache-2.0
"""Running a model: generated scenes, COCO pictures, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from ovd.data.splits import Split
from ovd.detector import Detector
from ovd.evaluate import main
from ovd.evaluation.coco import Metrics, evaluate
from ovd.evaluation.model import _with_soft_nms
from ovd.evaluation.options import DEFAULT_COUNT, DEFAULT_SEED, DataSpec, EvaluationOptions
from ovd.evaluation.predictor import Predictor, predictor_for
from ovd.evaluation.run import run_images, run_source
from ovd.inference.scoring import RegionSet
from ovd.vocabulary import Vocabulary
from pretrain.data.scenes import Scene, SceneSource, coco_objects
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture

COLOURS = {1: "red", 5: "green", 9: "blue", 20: "yellow"}
SPLIT = Split(name="colours", base=(1, 9), novel=(5, 20), names=COLOURS)
RECTANGLES = [
    [("red", 10, 20, 50, 70), ("blue", 80, 30, 150, 110)],
    [("green", 5, 5, 60, 60), ("yellow", 70, 10, 100, 100), ("red", 110, 60, 150, 110)],
]


@pytest.fixture(scope="module")
def source() -> SceneSource:
    return SceneSource(Stickers.load(), split="val", seed=3, size=96, length=4)


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Two pictures of coloured rectangles with exact annotations: (folder, annotation file, its content)."""
    ids = {name: i for i, name in COLOURS.items()}
    gt: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in COLOURS.items()],
    }
    for n, rectangles in enumerate(RECTANGLES):
        Image.fromarray(picture(rectangles)).save(tmp_path / f"{n}.png")
        gt["images"].append({"id": 40 + n, "file_name": f"{n}.png", "width": 160, "height": 120})
        for name, x1, y1, x2, y2 in rectangles:
            box = [x1, y1, x2 - x1, y2 - y1]
            polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            gt["annotations"].append(
                {"id": len(gt["annotations"]) + 1, "image_id": 40 + n, "category_id": ids[name], "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0, "segmentation": polygon}
            )  # fmt: skip
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    return tmp_path, tmp_path / "gt.json", gt


def use_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, weights, **_: make_detector()))
    monkeypatch.setattr("ovd.weights.detector_folder", lambda weights: Path("nowhere"))


def evaluate_source(source: SceneSource, predict: Any, **options: Any) -> Metrics:
    gt, results, proposals = run_source(source, predict, **options)
    return evaluate(gt, results, Split.load("stickers"), proposals=proposals)


class Oracle:
    """Knows the scenes: answers with their labels, of some categories only."""

    def __init__(self, source: SceneSource, known: frozenset[int]) -> None:
        self.scenes: list[Scene] = [source.scene(i) for i in range(len(source))]
        self.known = known

    def __call__(self, image: np.ndarray, image_id: Any) -> list[dict[str, Any]]:
        scene = self.scenes[image_id - 1]
        assert (scene.image == image).all()
        _, objects = coco_objects(scene, image_id=image_id, first_annotation_id=1)
        keys = ("image_id", "category_id", "bbox", "segmentation")
        return [{k: o[k] for k in keys} | {"score": 1.0} for o in objects if o["category_id"] - 1 in self.known]


def test_fine_tuned_classes__a_box_that_two_share_is_proposed_once() -> None:
    """Listed twice it would draw the warning of results that were put together twice."""
    detector = make_detector(masks=False)
    network = detector.model.regions

    def shared(image: np.ndarray) -> RegionSet:
        found = network(image)
        boxes, objectness, text = (np.concatenate([x, x]) for x in (found.boxes, found.objectness, found.text))
        return replace(found, boxes=boxes, objectness=objectness, text=text)

    detector.model.regions = shared  # type: ignore[method-assign]
    predictor = Predictor(detector=detector, category_ids=(1,), scorer=lambda regions: regions.text[:, :1])
    proposals = predictor.propose(picture(RECTANGLES[0]), 40)
    assert [p["bbox"] for p in proposals[:2]] == [[10, 20, 40, 50], [80, 30, 70, 80]]
    assert len(proposals) == len(network(picture(RECTANGLES[0])))


def test_run_source__base_only_predictor_has_no_novel_ap(source: SceneSource) -> None:
    values = evaluate_source(source, Oracle(source, source.stickers.base)).values
    for kind in ("bbox", "segm"):
        assert values[f"{kind}/AP_base"] == pytest.approx(1.0)
        assert values[f"{kind}/AR100_base"] == 1.0
        assert values[f"{kind}/AP_novel"] == 0.0


def test_run_source__recall_uses_the_proposals(source: SceneSource) -> None:
    everything = source.stickers.base | source.stickers.novel
    steps: list[tuple[int, int]] = []
    metrics = evaluate_source(
        source,
        Oracle(source, frozenset()),
        propose=Oracle(source, everything),
        on_image=lambda done, total: steps.append((done, total)),
    )
    assert metrics.values["bbox/AR100_novel"] == metrics.values["bbox/AR100_base"] == 1.0
    assert metrics.values["bbox/AP"] == 0.0
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_run_source__proposals_alone_have_recall_only(source: SceneSource) -> None:
    oracle = Oracle(source, source.stickers.base | source.stickers.novel)
    metrics = evaluate_source(source, None, propose=oracle)
    assert metrics.values["bbox/AR100_novel@50"] == 1.0
    assert not any("/AP" in key for key in metrics.values)
    assert "no detections" not in " ".join(metrics.warnings)


def test_run_source__ground_truth_has_every_label(source: SceneSource) -> None:
    gt, results, proposals = run_source(source, lambda image, image_id: [])
    assert (results, proposals) == ([], None)
    assert [i["id"] for i in gt["images"]] == [1, 2, 3, 4]
    assert len(gt["annotations"]) == sum(len(source.scene(i).classes) for i in range(4))
    assert [a["id"] for a in gt["annotations"]] == list(range(1, len(gt["annotations"]) + 1))
    assert evaluate(gt, [], Split.load("stickers")).counts["objects"] == len(gt["annotations"])


def test_run_source__source_with_hidden_labels_is_refused() -> None:
    source = SceneSource(Stickers.load(), split="val", seed=3, size=96, length=1, labels="base")
    with pytest.raises(UserError, match="hides the labels"):
        evaluate_source(source, lambda image, image_id: [])


def test_run_images__gives_boxes_and_masks_by_name(photos: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, _, gt = photos
    predict = predictor_for(make_detector(), SPLIT, scale=20.0)
    results, proposals = run_images(gt, folder, predict, propose=predict.propose)
    values = evaluate(gt, results, SPLIT, proposals=proposals).values
    for key in ("bbox/AP50_base", "bbox/AP50_novel", "bbox/AP", "segm/AP50", "bbox/AR100_novel", "segm/AR100_novel"):
        assert values[key] == pytest.approx(1.0), key
    bare = [{k: v for k, v in p.items() if k != "segmentation"} for p in proposals or ()]
    assert "segm/AR100" not in evaluate(gt, results, SPLIT, proposals=bare).values


def test_published_scores__are_a_softmax_over_words_and_background() -> None:
    detector = make_detector()
    predict = predictor_for(detector, SPLIT, scale=20.0)
    regions = detector.embed(picture()).regions
    score = predict.scorer(regions)
    logits = 20.0 * regions.text @ np.concatenate([predict.scorer.rows, detector.model.background[None]]).T
    assert np.allclose(score, softmax(logits, axis=1)[:, :4], atol=1e-6)


def test_calibrated_scores__equal_the_detectors() -> None:
    detector = make_detector()
    predict = predictor_for(detector, SPLIT, scores="calibrated")
    score = predict.scorer(detector.embed(picture()).regions)
    found = detector.embed(picture()).classify(list(COLOURS.values()), threshold=0.0)
    for region, class_id, confidence in zip(found.region, found.class_id, found.confidence, strict=True):
        assert float(score[region, class_id]) == pytest.approx(float(confidence), abs=1e-6)


def two_heads(regions: RegionSet) -> RegionSet:
    regions.image = np.roll(regions.text, 1, axis=0)
    return regions


def test_ensemble__base_novel_weights_the_heads_by_group() -> None:
    detector = make_detector()
    regions = two_heads(detector.embed(picture()).regions)
    predict = predictor_for(detector, SPLIT, ensemble="base-novel", scale=20.0)
    scale, rows = 20.0, predict.scorer.rows
    text = softmax(scale * regions.text @ np.concatenate([rows, detector.model.background[None]]).T, axis=1)[:, :4]
    assert regions.image is not None
    image = softmax(scale * regions.image @ rows.T, axis=1)
    score = predict.scorer(regions)
    for column, category in enumerate(predict.category_ids):
        e = 2 / 3 if category in SPLIT.base else 1 / 3
        assert np.allclose(score[:, column], text[:, column] ** e * image[:, column] ** (1 - e), atol=1e-6)


def test_results__are_sorted_limited_and_suppressed_per_class() -> None:
    predict = predictor_for(make_detector(), SPLIT, limit=5)
    results = predict(picture(), 7)
    scores = [d["score"] for d in results]
    assert len(results) == 5
    assert scores == sorted(scores, reverse=True)
    assert all(d["image_id"] == 7 for d in results)
    assert {results[0]["category_id"], results[1]["category_id"]} == {1, 9}


def test_soft_nms__keeps_overlapping_boxes_with_lower_scores() -> None:
    predict = predictor_for(make_detector(), SPLIT)
    hard = replace(predict, nms_iou=0.01)(picture(), 7)
    soft = replace(predict, soft_nms=0.5, limit=10**6)(picture(), 7)
    assert len(soft) > len(hard)
    assert soft[0] == hard[0]
    assert [d["score"] for d in soft] == sorted((d["score"] for d in soft), reverse=True)
    assert len(replace(predict, soft_nms=0.5, limit=5)(picture(), 7)) == 5


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "half"])
def test_soft_nms__sigma_must_be_above_0(value: str) -> None:
    with pytest.raises(UserError, match="above 0"):
        EvaluationOptions.parse(["--weights", "default", "--data", "stickers-val", f"--soft-nms={value}"])


@pytest.mark.parametrize("flags", [["--vild"], ["--queries", "words"]])
def test_soft_nms__excludes_vild_and_word_queries(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--soft-nms"):
        EvaluationOptions.parse(["--weights", "default", "--data", "stickers-val", "--soft-nms", *flags])
    assert EvaluationOptions.parse(["--weights", "default", "--data", "stickers-val", "--soft-nms"]).soft_nms == 0.5


def test_soft_nms__needs_scored_regions() -> None:
    options = EvaluationOptions.parse(["--weights", "mine", "--data", "stickers-val", "--soft-nms"])
    with pytest.raises(UserError, match="--soft-nms: mine scores no regions"):
        _with_soft_nms(None, options, {})


def test_vocabulary_file__words_must_name_categories() -> None:
    detector = make_detector()
    partly = predictor_for(detector, SPLIT, vocabulary=Vocabulary.parse(["Blue: navy", "red"]))
    assert partly.category_ids == (9, 1)
    with pytest.raises(UserError, match="'purple' is not a category"):
        predictor_for(detector, SPLIT, vocabulary=Vocabulary.parse(["purple"]))
    with pytest.raises(UserError, match="negative words"):
        predictor_for(detector, SPLIT, vocabulary=Vocabulary.parse(["red", "-blue"]))


def test_command__written_files_reproduce_the_metrics(
    photos: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, annotations, _ = photos
    SPLIT.save(folder / "split.json")
    use_fake(monkeypatch)
    out = folder / "out"
    data = f"coco:{folder}:{annotations}"
    split = ["--split", str(folder / "split.json")]
    assert main(["--weights", "x", "--data", data, *split, "--out", str(out), "--agnostic", "results"]) == 0
    first = json.loads((out / "metrics.json").read_text())
    assert first["metrics"]["bbox/AP50_novel"] == pytest.approx(1.0)
    assert first["run"]["weights_sha256"] == "0" * 64
    printed = capsys.readouterr().out
    written = {part.strip() for part in printed.partition("written: ")[2].splitlines()[0].split(",")}
    assert "AP50" in printed and written == {str(path) for path in out.iterdir()}
    again = folder / "again"
    files = ["--annotations", str(annotations), "--predictions", str(out / "results.json")]
    assert main([*files, *split, "--out", str(again)]) == 0
    second = json.loads((again / "metrics.json").read_text())
    assert second["metrics"] == first["metrics"]
    assert second["dataset_sha256"] == first["dataset_sha256"]


def test_command__runs_on_sticker_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch)
    out = tmp_path / "out"
    assert main(["--weights", "x", "--data", "stickers-val:3:5", "--size", "96", "--out", str(out)]) == 0
    run = json.loads((out / "metrics.json").read_text())
    assert run["split"]["name"] == "stickers"
    assert run["counts"]["images"] == 3
    assert run["run"]["words"] == run["split"]["base"] + run["split"]["novel"]
    assert json.loads((out / "proposals.json").read_text())
    gt = json.loads((out / "annotations.json").read_text())
    assert gt["info"]["seed"] == 5


def test_device__missing_one_is_refused_before_running(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch)
    with pytest.raises(UserError, match="device: 'tpu' is not a device name; use auto, cpu or cuda"):
        main(["--weights", "x", "--data", "stickers-val:3", "--device", "tpu"])


def test_pictures__missing_ones_are_named(photos: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^coco:a:b\.json: 2 of its 2 pictures are not there.*is .*empty the folder"):
        run_images(photos[2], tmp_path / "empty", None, where="coco:a:b.json")


def test_pictures__all_that_cannot_be_read_are_named(photos: tuple[Path, Path, dict[str, Any]]) -> None:
    """One message for all of them: a person repairs a folder once."""
    folder, _, gt = photos
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)^2 pictures cannot be evaluated:\n  .*0\.png: .*\n  .*1\.png: is empty"):
        run_images(gt, folder, lambda image, image_id: [])
    gt["images"] += [{**gt["images"][0], "id": 100 + n} for n in range(38)]
    with pytest.raises(UserError, match=r"^40 pictures cannot be evaluated:") as caught:
        run_images(gt, folder, lambda image, image_id: [])
    assert str(caught.value).endswith("and 30 more")


def test_pictures__size_must_match_the_annotations(photos: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, _, gt = photos
    gt["images"][1]["width"] = 120
    gt["images"][1]["height"] = 160
    with pytest.raises(UserError, match=r"1\.png: 160×120 px, but the annotations say 120×160"):
        run_images(gt, folder, lambda image, image_id: [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("stickers-val", DataSpec(count=DEFAULT_COUNT, seed=DEFAULT_SEED)),
        ("stickers-val:20", DataSpec(count=20, seed=DEFAULT_SEED)),
        ("stickers-val:20:7", DataSpec(count=20, seed=7)),
        ("coco:a/b:c.json", DataSpec(images=Path("a/b"), annotations=Path("c.json"))),
    ],
)
def test_data_spec__is_parsed(text: str, expected: DataSpec) -> None:
    assert DataSpec.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["stickers-val:x", "stickers-val:0", "stickers-val:1:2:3", "coco:a", "coco::b", "voc", ""]
)
def test_data_spec__unknown_one_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected stickers-val\[:COUNT\[:SEED\]\], coco"):
        DataSpec.parse(text)


def test_vild_flag__regions_class_limit_and_synonyms(
    photos: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, path, gt = photos
    gt["categories"][0]["synonyms"] = ["red", "crimson", "crimson"]
    path.write_text(json.dumps(gt))
    given: dict[str, Any] = {}

    def load(cls: type[Detector], weights: str, **options: Any) -> Detector:
        given.update(options)
        return make_detector()

    monkeypatch.setattr(Detector, "load", classmethod(load))
    monkeypatch.setattr("ovd.weights.detector_folder", lambda weights: Path("nowhere"))
    arguments = ["--weights", "x", "--data", f"coco:{folder}:{path}", "--vild", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert given["regions"] == 1000 and given["crop_refinement"] == 0
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())["run"]
    assert run["vild"] is True and run["synonyms"] == 1 and run["words"] == 4
    with pytest.raises(UserError, match="--vild uses the published scores"):
        main([*arguments, "--scores", "calibrated"])
