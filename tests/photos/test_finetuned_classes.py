# SPDX-License-Identifier: Apache-2.0
"""Labels and names as people have them: which photos and classes are taken, and what a typed word asks for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch

from ovd import train as ovd_train
from ovd.config_finetune import FinetuneDataConfig
from ovd.data.finetune_photos import FinetunePhotos
from ovd.data.mosaic import MosaicSource
from ovd.data.negatives import NegativePhotos
from ovd.detector import Detector
from ovd.inference.example_scorers import centred_on_picture
from ovd.inference.finetuned_names import FinetunedNames
from ovd.inference.known_words import WordList
from ovd.inference.regions import Regions
from ovd.inference.scorers import QueryScores
from ovd.inference.scoring import RegionSet
from ovd.modeling.export import FinetunedCard
from ovd.modeling.fvlm.finetuned import remaining_branches
from ovd.query import Query
from ovd.vocabulary import Vocabulary
from pretrain.data.coco import check_ground_truth
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import BadImageError, UserError


def write_photos(folder: Path, boxes_of: list[list[int]], names: list[str]) -> Path:
    """Grey photos of 64 × 48 pixels, with a box for each class index."""
    folder.mkdir(parents=True)
    gt: dict[str, Any] = {"images": [], "annotations": []}
    gt["categories"] = [{"id": n + 1, "name": name} for n, name in enumerate(names)]
    for number, classes in enumerate(boxes_of):
        noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), noise)
        gt["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
        for one in classes:
            box = {"bbox": [8, 8, 24, 24], "area": 576, "iscrowd": 0, "image_id": number, "category_id": one + 1}
            gt["annotations"].append({"id": len(gt["annotations"]) + 1, **box})
    (folder / "labels.json").write_text(json.dumps(gt))
    return folder / "labels.json"


def read(labels: Path) -> FinetunePhotos:
    truth = check_ground_truth(json.loads(labels.read_text()), where=str(labels))
    return FinetunePhotos(folder=labels.parent, truth=truth, confident=0.3, doubtful=0.1)


def test_photos__too_small_boxes_are_reported(tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "a", [[0], [0], [0], []], ["ant"])
    photos = read(labels)  # 24 of 64 pixels
    assert photos.small_boxes_notice(64) is None and photos.small_boxes_notice(22) is None
    assert "3 of 3 boxes are below 8 pixels at data.side=20: " in (photos.small_boxes_notice(20) or "")
    content = json.loads(labels.read_text())
    content["annotations"][0]["bbox"] = [8, 8, 2, 2]
    labels.write_text(json.dumps(content))
    assert read(labels).small_boxes_notice(64) is None  # one of three


def cut_off(file: Path) -> None:
    """Leave the header, and a part of what it promises."""
    file.write_bytes(file.read_bytes()[:700])


def test_names__are_kept_as_typed(tmp_path: Path) -> None:
    names = [" red   cell", "Ba\u0308ume", "cup, mug", "Everything"]
    photos = read(write_photos(tmp_path / "a", [[0, 1, 2, 3]], names))
    assert photos.names == ("red cell", "B\u00e4ume", "cup, mug", "Everything")
    notes = [note for note in photos.notices if "cannot be typed as it is" in note]
    assert len(notes) == 2 and "'cup, mug'" in notes[0] and "'Everything'" in notes[1]
    with pytest.raises(UserError, match="classes 'cell ' and '.{4}' are the same when typed"):  # as in the file
        read(write_photos(tmp_path / "c", [[0, 1]], ["cell ", "\uff43\uff45\uff4c\uff4c"]))
    with pytest.raises(UserError, match="classes 'red  cell' and 'Red_Cell' are the same when typed; rename one"):
        read(write_photos(tmp_path / "b", [[0, 1]], ["red  cell", "Red_Cell"]))


def test_photos__unusable_ones_are_named_and_skipped(tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "photos", [[0], [1], [0], [0]], ["mug", "lamp"])
    (labels.parent / "1.jpg").write_bytes(b"no picture")
    photos = read(labels)
    assert photos.image_ids == [0, 2, 3] and photos.names == ("mug",)  # the only lamp was in the other
    assert any("1 of 4 photos cannot be used (first: " in note and "1.jpg" in note for note in photos.notices)
    cv2.imwrite(str(labels.parent / "0.jpg"), np.zeros((64, 48, 3), dtype=np.uint8))
    assert any("0.jpg: is 48 × 64 pixels upright, the annotations say 64 × 48" in note for note in read(labels).notices)
    (labels.parent / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="3 of 4 photos cannot be used .* repair or remove them"):
        read(labels)


def test_damaged_photo__is_left_out_before_the_training(tmp_path: Path) -> None:
    """Its header is good."""
    labels = write_photos(tmp_path / "photos", [[0]] * 8, ["mug"])
    cut_off(labels.parent / "3.jpg")
    photos = read(labels)
    assert photos.image_ids == [0, 1, 2, 4, 5, 6, 7]
    assert any("1 of 8 photos cannot be used (first: " in note and "3.jpg" in note for note in photos.notices)
    negatives = NegativePhotos.of_folder(labels.parent)
    assert len(negatives) == 7 and "1 photos cannot be read and are left out (first: " in negatives.notices[0]


def test_mosaic__with_a_damaged_photo_is_replaced(tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "photos", [[0]] * 8, ["mug"])
    photos = read(labels)
    cut_off(labels.parent / "3.jpg")  # since then
    data = FinetuneDataConfig(annotations="", side=64, mosaic=1.0)
    source = MosaicSource(photos=photos, chosen=range(8), augment=data, seed=0)

    def works(index: int, draw: int) -> bool:
        try:
            source.sample(index, draw)
        except BadImageError:
            return False
        return True

    failing = [draw for draw in range(30) if not works(0, draw)]
    assert failing  # 0 is fine, but stands beside 3
    assert all(any(works(index, draw) for index in (1, 2, 4, 5)) for draw in failing)


def test_held_out__photos_have_an_object(tmp_path: Path) -> None:
    photos = read(write_photos(tmp_path / "photos", [[0], [0], [0], [0], [0], []], ["mug"]))
    divisions = [photos.divided(0.34, limit=None, seed=seed) for seed in range(12)]
    assert all(sorted([*kept, *held]) == list(range(6)) for kept, held in divisions)
    assert not any(held == [5] for _, held in divisions)
    assert any(held for _, held in divisions)


WORDS = ("vehicle", "bus", "the north face", "red cell")


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        ("Vehicle", {"vehicle"}),  # as it was learned: that class alone
        ("vehicles", {"vehicle", "bus"}),  # what it means, and its kinds
        ("bus", {"bus"}),
        ("The North Face", {"the north face"}),
        ("face", set()),
        ("Red_Cell", {"red cell"}),
        ("red cells", {"red cell"}),
    ],
)
def test_finetuned_names__typed_word_to_classes(phrase: str, found: set[str]) -> None:
    finetuned = FinetunedNames(words=WordList(words=WORDS, lexicon=read_lexicon()))
    (row,) = finetuned.answering([[phrase]]).tolist()
    assert {word for word, yes in zip(WORDS, row, strict=True) if yes} == found
    assert finetuned.has(phrase) == bool(found)
    assert finetuned.answering([[phrase, "bus"]])[0, 1]  # a synonym adds what it finds


def test_branch__removed_when_all_classes_are_retrained() -> None:
    def card(number: int, *names: str) -> FinetunedCard:
        return FinetunedCard(names=names, file=f"classes/{number:02}.safetensors", sha256="", side=64, nms=0.6, top=10)

    first, second, third = card(1, "mug", "lamp"), card(2, "Lamp"), card(3, "fork")
    assert remaining_branches((first, second, third), ["spoon"]) == (first, second, third)
    assert remaining_branches((first, second, third), ["MUG"]) == (second, third)  # the second has the lamp
    assert remaining_branches((first, third), ["fork"]) == (first,)


def regions(added: int) -> RegionSet:
    """Three boxes, and as many again of an own class."""
    rows = torch.nn.functional.normalize(torch.randn(3 + added, 8, generator=torch.Generator().manual_seed(0)))
    finetuned = torch.zeros(3 + added, 1)
    finetuned[3:] = 0.4
    return RegionSet(
        boxes=torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(3 + added, 1) + 20 * torch.arange(3 + added)[:, None],
        objectness=torch.tensor([0.5] * 3 + [0.0] * added),
        text=rows,
        image=rows,
        masks=None,
        size=(100, 100),
        finetuned=finetuned if added else None,
    )


def test_search_by_crop__unchanged_by_finetuned_classes() -> None:
    crops = np.eye(8, dtype=np.float32)[:2]
    plain, (moved,) = centred_on_picture(regions(0), crops)
    beside, (moved_beside,) = centred_on_picture(replace_rows(regions(4), regions(0)), crops)
    np.testing.assert_allclose(beside.text[:3], plain.text)
    np.testing.assert_allclose(moved_beside, moved)


def replace_rows(larger: RegionSet, smaller: RegionSet) -> RegionSet:
    assert larger.image is not None and smaller.image is not None
    larger.image[:3] = smaller.image
    return larger


def test_finetuned_class__as_negative_removes_its_boxes() -> None:
    """*terrier* was added, and a person asks for "dog, -terrier": the box has one score, for both words."""
    scores = QueryScores(np.array([[0.8], [0.7], [0.0]], np.float32), np.array([[0.1], [0.7], [0.0]], np.float32))
    scorer = SimpleNamespace(
        shown=lambda regions, *, threshold: scores.shown(threshold=threshold),
        kind_of=lambda classes: np.zeros((len(classes), len(classes)), bool),
    )
    detector = SimpleNamespace(threshold_for=lambda query, level: 0.3, scorer=lambda query: scorer)
    seen = Regions(regions=regions(0), key="", detector=cast(Detector, detector))
    found = seen.classify(Query(Vocabulary.parse("dog, -terrier")))
    assert found.confidence.tolist() == pytest.approx([0.8])


def test_weights__in_the_output_folder_are_refused(tmp_path: Path) -> None:
    labels = write_photos(tmp_path / "photos", [[0]] * 4, ["mug"])
    out = tmp_path / "run"
    (out / "exported").mkdir(parents=True)
    (out / "exported/model.json").write_text("{}")
    options = ["--config", "photos/finetune.yaml", f"out={out}", f"data.annotations={labels}"]
    with pytest.raises(UserError, match="exported: lies in out=.*, which this training writes; give it another folder"):
        ovd_train.main([*options, f"weights={out}/exported", "--overwrite"])
    assert (out / "exported/model.json").is_file()
    with pytest.raises(UserError, match=r"optim\.warmup_steps=200: 4 photos are learned in 150 steps; take fewer"):
        ovd_train.main([*options, "optim.warmup_steps=200", "--check"])
