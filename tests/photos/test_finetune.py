# SPDX-License-Identifier: Apache-2.0
"""Classes of one's own: the canvases they are learned from, their losses, and what a detector says afterwards."""

from __future__ import annotations

import json
import math
import re
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch

from ovd import Detector, calibrate
from ovd import train as ovd_train
from ovd.config_finetune import FinetuneDataConfig
from ovd.data.finetune_photos import FinetunePhotos
from ovd.data.mosaic import MosaicSource
from ovd.data.negatives import NegativePhotos
from ovd.detections import Detections
from ovd.formats.read import read_labels
from ovd.formats.shapes import labelled_pictures
from ovd.formats.write import write_labels
from ovd.inference.fvlm_regions import WordScorer
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.proposals.architecture import ARCHITECTURES, Arch
from ovd.modeling.proposals.assign import PredictedBoxes, assign, class_losses
from ovd.modeling.proposals.classes import ClassBranch
from ovd.picture_files import PACKAGED_PHOTOS
from ovd.training.finetune import FinetuneTask
from ovd.training.negatives import negatives_of
from ovd.weights import weights_folder
from pretrain.data.coco import check_ground_truth
from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import UserError

COLOURS = {"blob": (220, 30, 30), "tile": (30, 60, 220)}


def photo(rng: np.random.Generator, things: list[str]) -> tuple[np.ndarray, list[list[float]]]:
    """Grey noise with discs and squares, and their boxes (x, y, w, h)."""
    image = rng.integers(100, 150, (96, 128, 3), dtype=np.uint8)
    boxes = []
    for number, thing in enumerate(things):
        side = int(rng.integers(24, 32))
        x, y = 4 + 60 * (number % 2) + int(rng.integers(20)), 4 + int(rng.integers(50))
        if thing == "blob":
            centre = (x + side // 2, y + side // 2)
            cv2.circle(image, centre, side // 2, COLOURS[thing], -1)
        else:
            image[y : y + side, x : x + side] = COLOURS[thing]
        boxes.append([float(x), float(y), float(side), float(side)])
    return image, boxes


def write_photos(folder: Path, contents: list[list[str]], *, seed: int = 0, **extra: Any) -> Path:
    """Photos and their COCO file."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    names = sorted({thing for things in contents for thing in things})
    gt: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n + 1, "name": name} for n, name in enumerate(names)],
    }
    for number, things in enumerate(contents):
        image, boxes = photo(rng, things)
        cv2.imwrite(str(folder / f"images/{number}.png"), image[:, :, ::-1])
        gt["images"].append({"id": number, "file_name": f"{number}.png", "width": 128, "height": 96})
        for thing, box in zip(things, boxes, strict=True):
            gt["annotations"].append(
                {
                    "id": len(gt["annotations"]) + 1,
                    "image_id": number,
                    "category_id": names.index(thing) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    **extra,
                }
            )
    (folder / "labels.json").write_text(json.dumps(gt))
    return folder / "labels.json"


def own_photos(labels: Path, **options: float) -> FinetunePhotos:
    truth = check_ground_truth(json.loads(labels.read_text()), where=str(labels))
    return FinetunePhotos(
        folder=labels.parent / "images", truth=truth, **({"confident": 0.3, "doubtful": 0.1} | options)
    )


UNCHANGED: dict[str, Any] = {"scale": (1.0, 1.0), "mosaic": 0.0, "flip": 0.0, "colour": 0.0, "negative_share": 0.0}


def canvases(photos: FinetunePhotos, negatives: NegativePhotos | None = None, **augment: Any) -> MosaicSource:
    return MosaicSource(
        photos=photos,
        chosen=range(len(photos)),
        augment=FinetuneDataConfig(annotations="", side=128, **(UNCHANGED | augment)),
        seed=0,
        negatives=negatives,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": 1.0}, {"flip_vertical": 1.0}, {"mosaic": 1.0}, {"scale": (1.5, 1.5)}, {"scale": (0.5, 0.5)}],
    ids=str,
)
def test_mosaic__boxes_move_with_their_pixels(tmp_path: Path, options: dict[str, Any]) -> None:
    photos = own_photos(write_photos(tmp_path, [["blob", "tile"], ["tile"], [], ["blob"]]))
    source = canvases(photos, **options)
    seen = 0
    for draw in range(6):
        sample = source.sample(draw % 4, draw)
        image = sample["image"].permute(1, 2, 0).numpy().astype(int)
        assert image.shape == (128, 128, 3)
        for box, number in zip(sample["boxes"].tolist(), sample["classes"].tolist(), strict=True):
            if number < 0:
                continue
            x1, y1, x2, y2 = box
            middle = image[int((y1 + y2) / 2), int((x1 + x2) / 2)]
            assert np.abs(middle - COLOURS[photos.names[number]]).max() < 40
            seen += 1
        again = source.sample(draw % 4, draw)
        assert torch.equal(again["image"], sample["image"]) and torch.equal(again["boxes"], sample["boxes"])
    assert seen


def test_mosaic__truncated_objects_are_ignored(tmp_path: Path) -> None:
    photos = own_photos(write_photos(tmp_path, [["tile", "tile"]] * 2))
    source = canvases(photos, scale=(4.0, 4.0))
    kinds = {int(n) for draw in range(40) for n in source.sample(0, draw)["classes"]}
    assert kinds == {0, -1}


def test_photos__doubtful_boxes_are_ignored_empty_photos_used(tmp_path: Path) -> None:
    labels = write_photos(tmp_path, [["tile"], []], score=0.2)
    with pytest.raises(UserError, match="no box to train on"):
        own_photos(labels, confident=0.3, doubtful=0.25)
    photos = own_photos(labels, confident=0.15)
    assert len(photos) == 2 and photos.names == ("tile",)
    content = json.loads(labels.read_text())
    content["annotations"].append({**content["annotations"][0], "id": 2, "image_id": 1, "score": 0.9})
    labels.write_text(json.dumps(content))
    mixed = own_photos(labels)
    assert [mixed.boxes(i).classes.tolist() for i in range(2)] == [[-1], [0]]
    assert [one["iscrowd"] for one in mixed.as_coco([0, 1])["annotations"]] == [1, 0]


def test_held_out__is_a_share_and_keeps_rare_classes_in_training(tmp_path: Path) -> None:
    photos = own_photos(write_photos(tmp_path, [["tile"]] * 18 + [["blob", "tile"]] + [[]]))
    for seed in range(8):
        kept, held = photos.divided(0.4, limit=None, seed=seed)
        assert sorted([*kept, *held]) == list(range(20))
        assert 18 in kept and 7 <= len(held) <= 8
    kept, held = photos.divided(0.25, limit=8, seed=0)
    assert len(kept) + len(held) == 8 and photos.divided(0.0, limit=None, seed=0)[1] == []


@pytest.mark.parametrize("kind", ["copy", "augmented"])
def test_held_out__has_no_duplicates_in_training(tmp_path: Path, kind: str) -> None:
    labels = write_photos(tmp_path, [["tile"]] * 12)
    content = json.loads(labels.read_text())
    for number, image in reversed(list(enumerate(content["images"]))):
        if kind == "copy" and number:
            shutil.copyfile(tmp_path / f"images/{number // 3}.png", tmp_path / f"images/{number}.png")
        elif kind == "augmented":
            image["file_name"] = f"photo{number // 3}_png.rf.{number:032x}.png"
            (tmp_path / f"images/{number}.png").rename(tmp_path / "images" / image["file_name"])
    labels.write_text(json.dumps(content))
    photos = own_photos(labels)
    assert "8 photos are another one's copies or augmentations" in " ".join(photos.notices)
    for seed in range(8):
        kept, held = photos.divided(0.3, limit=None, seed=seed)
        assert held and not {photo // 3 for photo in kept} & {photo // 3 for photo in held}
        assert sorted([*kept, *held]) == list(range(12))


def test_photos__boxes_must_fit_when_no_size_is_stated(tmp_path: Path) -> None:
    labels = write_photos(tmp_path, [["tile"]] * 3)
    content = json.loads(labels.read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    content["annotations"][0]["bbox"] = [120, 10, 20, 20]
    labels.write_text(json.dumps(content))
    assert "1 boxes reach over the border" in " ".join(own_photos(labels).notices)
    content["annotations"][0]["bbox"] = [130, 10, 20, 20]
    labels.write_text(json.dumps(content))
    photos = own_photos(labels)
    assert len(photos) == 2 and "1 of 3 photos cannot be used" in " ".join(photos.notices)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"score": 0.05}, "of 2, 2 have a score below data.confident=0.3"),
        ({"iscrowd": 1}, "of 2, 2 are crowds"),
        ({"bbox": [1, 1, 0, 5]}, "of 2, 2 are without area"),
    ],
    ids=str,
)
def test_photos__say_why_there_is_no_box(tmp_path: Path, extra: dict[str, Any], reason: str) -> None:
    labels = write_photos(tmp_path, [["tile"], ["tile"]])
    content = json.loads(labels.read_text())
    for annotation in content["annotations"]:
        annotation |= extra
    labels.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"no box to train on: {reason}"):
        own_photos(labels)


@pytest.mark.parametrize("name", ["\u200b", "\ufeff\u2060"], ids=ascii)
def test_names__invisible_characters_only_are_refused(tmp_path: Path, name: str) -> None:
    labels = write_photos(tmp_path, [["tile"]])
    content = json.loads(labels.read_text())
    content["categories"][0]["name"] = name
    labels.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is of invisible characters only; give it a name"):
        own_photos(labels)


def test_class_targets__are_iou_per_class() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 28.0], [50.0, 50.0, 60.0, 60.0]])
    centres = torch.tensor([[5.0, 5.0], [25.0, 24.0], [55.0, 55.0]])
    objects, classes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]), torch.tensor([1, 0])
    words, sides = torch.randn(3, 2), torch.randn(3, 4, 11)
    given = assign(boxes, words.sigmoid()[:, classes], centres, objects, torch.zeros(0, 4))
    assert given.gt_index.tolist() == [0, 1, -1]
    losses = class_losses(
        words=words,
        predicted=PredictedBoxes(boxes, sides, centres, torch.full((3,), 8.0)),
        objects=objects,
        classes=classes,
        assignment=given,
    )
    expected = 0.0  # quality focal loss, cell by cell: the best cell's target is its IoU
    for cell, target in enumerate([[0.0, 1.0], [0.8, 0.0], [0.0, 0.0]]):
        for column in range(2):
            p = 1 / (1 + math.exp(-float(words[cell, column])))
            t = target[column]
            expected -= (t - p) ** 2 * (t * math.log(p) + (1 - t) * math.log(1 - p))
    assert float(losses.scores) == pytest.approx(expected, rel=1e-4)
    assert float(losses.weight) == pytest.approx(1.8, rel=1e-5)
    assert float(losses.box) == pytest.approx(0.8 * 0.2, rel=1e-4)  # 1 − GIoU of a box within the object is 1 − IoU


def test_branch__boxes_score_their_class_only() -> None:
    regions = RegionSet(
        boxes=np.array([[0.0, 0.0, 10.0, 10.0]] * 2, dtype=np.float32),
        objectness=np.array([0.5, 0.0], dtype=np.float32),
        text=np.eye(4, dtype=np.float32)[:2],
        image=np.eye(4, dtype=np.float32)[:2],
        masks=None,
        size=(20, 20),
        word_scores=np.array([[0.9], [0.0]], dtype=np.float32),
        bias=np.zeros(2, np.float32),
        finetuned=np.array([[0.0, 0.0], [0.7, 0.0]], dtype=np.float32),
    )
    scorer = WordScorer(
        rows=np.eye(4, dtype=np.float32)[[0, 1, 2]],
        competitors=np.eye(4, dtype=np.float32),
        competitor_mask=np.zeros((3, 4), dtype=bool),
        word_rows=np.eye(4, dtype=np.float32)[:1],
        hyponyms=np.array([[True], [False], [False]]),
        related=np.array([[True], [False], [False]]),
        scale=4.0,
        calibration=Calibration(),
        finetuned=np.array([[True, False], [True, False], [False, True]]),
        finetuned_only=np.array([False, True, True]),
    )
    score = scorer(regions)
    assert float(score[0, 0]) > 0.5 and float(score[1, 0]) == pytest.approx(0.7)  # known, and a kind that was added
    assert score[:, 1].tolist() == pytest.approx([0.0, 0.7])
    assert score[:, 2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(scorer.select([1])(regions)[:, 0], score[:, 1])


def arguments(labels: Path, out: Path, weights: Path | str = "vild-photo") -> list[str]:
    return [
        "--config", "photos/finetune.yaml", f"out={out}", f"weights={weights}", f"data.annotations={labels}",
        "data.side=128", "data.scale=[0.8, 1.2]", "loop.batch_size=4", "loop.log_every=20", "loop.save_every=60",
    ]  # fmt: skip


THINGS = [["blob", "tile"], ["tile"], ["blob"], [], ["tile", "tile"], ["blob", "blob"]]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped detector after learning two classes from twelve photos."""
    root = tmp_path_factory.mktemp("own")
    labels = write_photos(root / "photos", THINGS * 2)
    assert ovd_train.main([*arguments(labels, root / "run"), "loop.steps=80"]) == 0
    return root


def find(detector: Detector, picture: np.ndarray, *words: str, threshold: float = 0.3) -> Detections:
    return detector.embed(picture).classify(list(words), threshold=threshold)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_finetune__the_whole_trunk_has_its_learning_rate(arch: Arch) -> None:
    branch = ClassBranch(ARCHITECTURES[arch], classes=2)
    photos = cast(FinetunePhotos, None)  # they are not looked at here
    task = FinetuneTask(branch=branch, photos=photos, held_out=[], side=64, nms=0.6, top=100, trunk_lr_scale=0.25)
    scales = {
        id(parameter): group["lr_scale"]
        for group in task.param_groups(OptimConfig(name="adamw", lr=0.001))
        for parameter in group["params"]
    }
    assert {scales[id(parameter)] for parameter in branch.trunk.parameters()} == {0.25}
    assert {scales[id(parameter)] for parameter in branch.heads.parameters()} == {1.0}


def test_finetune__learns_new_classes_from_few_photos(learned: Path) -> None:
    detector = Detector.load(learned / "run", regions=30)
    card = json.loads((learned / "run/exported/model.json").read_text())["own"]
    assert [one["names"] for one in card] == [["blob", "tile"]] and card[0]["metrics"]["held_out_ap50"] > 0.6
    rng = np.random.default_rng(5)
    hits = 0
    for things in (["blob", "tile"], ["tile", "blob"], ["blob", "blob"]):
        picture, boxes = photo(rng, things)
        found = find(detector, picture, "Blobs", "tile")
        for thing, (x, y, w, h) in zip(things, boxes, strict=True):
            name = "Blobs" if thing == "blob" else "tile"
            near = np.abs(found.xyxy - [x, y, x + w, y + h]).max(axis=1, initial=0) < 8
            hits += any(n and found.names[c] == name for n, c in zip(near, found.class_id, strict=True))
    assert hits >= 5
    assert detector.card["purpose"] == "Finds blob, tile; answers all other words as vild-photo does."
    assert "blob" not in detector.query("everything").names  # on other photos it would find them where nothing is
    assert detector.query(["blob"]).notices == ()  # a word that the encoder does not know, and need not


def test_finetune__other_words_are_unchanged(learned: Path) -> None:
    before, after = Detector.load("vild-photo", regions=30), Detector.load(learned / "run", regions=30)
    picture = photo(np.random.default_rng(5), ["blob", "tile"])[0]
    for word in ("person", "animal", "terrier", "red car", "zzyzx"):
        ours, theirs = (find(detector, picture, word, threshold=0.001) for detector in (after, before))
        np.testing.assert_array_equal(ours.xyxy, theirs.xyxy)
        # Sums over more regions may be rounded otherwise.
        np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=1e-5, atol=1e-7)


def test_finetune__adds_and_replaces_classes(learned: Path, tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "photos", [["tile"], ["tile", "tile"], []], seed=3)
    content = json.loads(labels.read_text())
    content["categories"].append({"id": 2, "name": "moon"})
    content["annotations"][-1]["category_id"] = 2
    labels.write_text(json.dumps(content))
    options = [*arguments(labels, tmp_path / "run", learned / "run"), "data.held_out=0", "loop.steps=2"]
    assert ovd_train.main([*options, "optim.warmup_steps=0"]) == 0
    detector = Detector.load(tmp_path / "run", regions=30)
    first = Detector.load(learned / "run", regions=30)
    picture = photo(np.random.default_rng(5), ["blob", "tile"])[0]
    ours, theirs = (find(one, picture, "blob") for one in (detector, first))
    np.testing.assert_array_equal(ours.confidence, theirs.confidence)  # the earlier branch is untouched
    assert len(find(first, picture, "tile")) and not len(find(detector, picture, "tile"))  # two steps teach nothing
    assert detector.query(["moon", "blob"]).notices == ()
    (tmp_path / "run/exported/classes/01.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"classes/01\.safetensors: is not the file that .*model\.json describes"):
        Detector.load(tmp_path / "run")


def test_labels__yolo_is_read_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_photos(tmp_path / "photos", THINGS)
    pictures = labelled_pictures(read_labels(labels, images=labels.parent / "images"))
    write_labels(pictures, tmp_path / "yolo", "yolo", picture_mode="copy")
    assert ovd_train.main([*arguments(tmp_path / "yolo/data.yaml", tmp_path / "run"), "--check"]) == 0
    assert "5 photos to learn from, 1 held out; classes: blob, tile" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_labels__several_files_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_photos(tmp_path / "photos", THINGS)
    content = json.loads(labels.read_text())
    halves = []
    for half in (content["images"][:3], content["images"][3:]):  # each numbers its photos from 1
        number = {image["id"]: n for n, image in enumerate(half, 1)}
        mine = [{**a, "image_id": number[a["image_id"]]} for a in content["annotations"] if a["image_id"] in number]
        images = [{**image, "id": number[image["id"]]} for image in half]
        halves.append(labels.with_name(f"half{len(halves)}.json"))
        halves[-1].write_text(json.dumps({**content, "images": images, "annotations": mine}))
    given = [*arguments(labels, tmp_path / "run"), f"data.annotations=[{halves[0]}, {halves[1]}]"]
    assert ovd_train.main([*given, "--check"]) == 0
    assert "5 photos to learn from, 1 held out; classes: blob, tile" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.annotations: an empty list"):
        ovd_train.main([*given, "data.annotations=[]", "--check"])
    with pytest.raises(UserError, match=r"data\.annotations: .*gone\.json: no such file"):
        ovd_train.main([*given, f"data.annotations=[{halves[0]}, {tmp_path / 'gone.json'}]", "--check"])


def test_labels__missing_file_is_named_by_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.annotations: .*gone\.json: no such file or folder; give a COCO \.json"):
        ovd_train.main([*arguments(tmp_path / "gone.json", tmp_path / "run"), "--check"])


def test_weights__unfinished_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("out: run\n")
    with pytest.raises(UserError, match=r"no detector at .*: the training in .*run is unfinished; continue .*--resume"):
        Detector.load(tmp_path / "run" / "exported")


def test_weights__must_be_a_detector_of_photographs(tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "photos", THINGS)
    with pytest.raises(UserError, match="weights=vild-sticker: classes are added to a detector of photographs"):
        ovd_train.main([*arguments(labels, tmp_path / "run", "vild-sticker"), "--check"])


def test_weights__an_export_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vild-photo"
    folder.mkdir()
    shutil.copyfile(weights_folder("vild-photo") / "model.json", folder / "model.json")
    labels = write_photos(tmp_path / "photos", THINGS)
    with pytest.raises(UserError, match="is an export to ONNX.* cannot be trained; give the weights"):
        ovd_train.main([*arguments(labels, tmp_path / "run", folder), "--check"])


@pytest.mark.parametrize("file", ["conse.safetensors", "quality.safetensors", "classes/01.safetensors"])
def test_weights__a_missing_file_is_named_before_the_training(learned: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(learned / "run/exported", tmp_path / "weights")
    (tmp_path / "weights" / file).unlink()
    labels = write_photos(tmp_path / "photos", THINGS)
    with pytest.raises(UserError, match=rf"{file}: no such file; copy the folder again"):
        ovd_train.main([*arguments(labels, tmp_path / "run", tmp_path / "weights"), "--check"])


def test_resume__refuses_another_detector(learned: Path, tmp_path: Path) -> None:
    shutil.copytree(learned / "run/exported", tmp_path / "weights")
    labels = write_photos(tmp_path / "photos", [["tile"]] * 2)
    options = [*arguments(labels, tmp_path / "run", tmp_path / "weights"), "loop.steps=2", "optim.warmup_steps=0"]
    options += ["data.negatives=null"]
    assert ovd_train.main(options) == 0
    card = tmp_path / "weights/model.json"
    card.write_text(card.read_text().replace('"slope": ', '"slope": 1'))
    with pytest.raises(UserError, match="cannot resume, the detector's files have changed"):
        ovd_train.main([*options, "--resume"])


def test_calibrate__fits_finetuned_classes_to_new_photos(learned: Path, tmp_path: Path) -> None:
    shutil.copytree(learned / "run/exported", tmp_path / "weights")
    labels = write_photos(tmp_path / "photos", THINGS * 4, seed=9)
    spec = f"coco:{labels.parent / 'images'}:{labels}"
    before = json.loads((tmp_path / "weights/model.json").read_text())
    assert calibrate.main(["--weights", str(tmp_path / "weights"), "--data", spec]) == 0
    after = json.loads((tmp_path / "weights/model.json").read_text())
    assert (after["own"][0]["slope"], after["own"][0]["offset"]) != (1.0, 0.0)
    after["own"][0] |= {"slope": before["own"][0]["slope"], "offset": before["own"][0]["offset"]}
    assert after == before
    few = write_photos(tmp_path / "few", [["tile"]], seed=2)
    with pytest.raises(UserError, match="more photos are needed to fit anything. Nothing was changed"):
        calibrate.main(["--weights", str(tmp_path / "weights"), "--data", f"coco:{few.parent / 'images'}:{few}"])


def test_negatives__appear_in_mosaics_without_labels(tmp_path: Path) -> None:
    photos = own_photos(write_photos(tmp_path / "labelled", [["tile"]] * 3))
    (tmp_path / "other").mkdir()
    green = np.full((64, 64, 3), (0, 255, 0), np.uint8)
    cv2.imwrite(str(tmp_path / "other/meadow.png"), green)
    negatives = NegativePhotos.of_folder(tmp_path / "other")
    source = canvases(photos, mosaic=1.0, negatives=negatives, negative_share=1.0)
    for draw in range(4):
        sample = source.sample(0, draw)
        image = sample["image"].permute(1, 2, 0).numpy()
        assert (image[4, 68] == green[0, 0]).all() and (image[68, 4] == green[0, 0]).all()
        assert sample["classes"].tolist() == [0] and bool((sample["boxes"] <= 64).all())  # of the first place
    assert ForkingPickler.dumps(source)  # so a data loading process may get it
    never = canvases(photos, mosaic=1.0, negatives=negatives, negative_share=0.0)
    assert not (never.sample(0, 0)["image"].permute(1, 2, 0).numpy() == green[0, 0]).all(axis=2).any()
    assert source.identity() != canvases(photos).identity()


def test_negatives__labelled_and_unreadable_photos_are_skipped(tmp_path: Path) -> None:
    labels = write_photos(tmp_path, [["tile"]] * 2)
    photos, folder = own_photos(labels), tmp_path / "images"
    with pytest.raises(UserError, match=r"2 of 2 photos in .* are labelled ones and no negatives; none is left"):
        NegativePhotos.of_folder(folder, labelled=photos.paths())
    shutil.copyfile(folder / "0.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "meadow.png"), np.full((64, 64, 3), (0, 255, 0), np.uint8))
    negatives = NegativePhotos.of_folder(folder, labelled=photos.paths())
    assert negatives.names == ("meadow.png",)
    assert [re.sub(r" in .*| \(.*", "", notice) for notice in negatives.notices] == [
        "data.negatives: 3 of 5 photos",
        "data.negatives: 1 photos cannot be read and are left out",
    ]


def test_negatives__boxes_that_may_be_a_class_are_ignored(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 64, 3), 90, np.uint8))
    doubtful = {"a.png": np.array([[0, 0, 64, 64]], np.float32)}
    negatives = NegativePhotos(folder=tmp_path, names=["a.png"], doubtful=doubtful)
    photos = own_photos(write_photos(tmp_path / "labelled", [["tile"]]))
    source = canvases(photos, mosaic=1.0, negatives=negatives, negative_share=1.0)
    kinds = [number for draw in range(8) for number in source.sample(0, draw)["classes"].tolist()]
    assert kinds.count(0) == 8 and -1 in kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "nowhere"}, "data.negatives: nowhere: no such folder"),
        ({"negatives": "."}, ". contains no picture (.jpg"),
    ],
)
def test_negatives__empty_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FinetuneDataConfig(annotations="labels.json", **options)
    photos = own_photos(write_photos(tmp_path.parent / f"{tmp_path.name}_labelled", [["tile"]]))
    with pytest.raises(UserError, match=re.escape(message)):
        negatives_of(config, photos, [0], detector=tmp_path)


def test_negatives__packaged_photos_ignore_possible_objects(tmp_path: Path) -> None:
    """A class is recognised by its name, or by a labelled object where the name says nothing."""
    detector = Detector.load("vild-photo", cache_size=0)
    horse = detector.find(PACKAGED_PHOTOS / "horses.jpg", "horse").xyxy[0].tolist()
    (tmp_path / "images").mkdir()
    shutil.copyfile(PACKAGED_PHOTOS / "horses.jpg", tmp_path / "images/0.jpg")
    height, width = cv2.imread(str(tmp_path / "images/0.jpg")).shape[:2]
    box = [horse[0], horse[1], horse[2] - horse[0], horse[3] - horse[1]]
    rest = {"area": 1.0, "iscrowd": 0, "image_id": 0}
    gt = {
        "images": [{"id": 0, "file_name": "0.jpg", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "Fury"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": 1, "category_id": 1, "bbox": box, **rest},
            {"id": 2, "category_id": 2, "bbox": [0.0, 0.0, 9.0, 9.0], **rest},  # too small to compare with
        ],
    }
    (tmp_path / "labels.json").write_text(json.dumps(gt))
    config = FinetuneDataConfig(annotations="labels.json")
    negatives = negatives_of(config, own_photos(tmp_path / "labels.json"), [0], detector=weights_folder("vild-photo"))
    assert negatives is not None and len(negatives) == 8
    found = {name for name, boxes in negatives.doubtful.items() if len(boxes)}
    assert {"horses.jpg", "parked_cars.jpg"} <= found and not {"living_room.jpg", "coffee.jpg"} & found


def test_negatives__need_a_mosaic() -> None:
    with pytest.raises(ValueError, match="negatives are shown in mosaics"):
        FinetuneDataConfig(annotations="labels.json", negatives="photos", mosaic=0.0)
    assert FinetuneDataConfig(annotations="labels.json", mosaic=0.0).negatives == "packaged"
