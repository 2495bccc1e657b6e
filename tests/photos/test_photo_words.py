# SPDX-License-Identifier: Apache-2.0
"""Photos and boxes as captioned pictures: which are read, which class they have, what a picture may choose from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pretrain.config_photos import PhotoWords
from pretrain.data.lexicon import Lexicon, Meaning, Senses, build_lexicon, read_lexicon
from pretrain.data.nouns import Synset, WordNet
from pretrain.data.photos import PhotoWordSource, cut_square, read_photo_words, vocabulary_of
from pretrain.engine.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two scenes, blue with a red box, one of them for choosing, and two photos of one thing."""
    (tmp_path / "images").mkdir()
    scene = np.full((60, 80, 3), BLUE, np.uint8)
    scene[20:40, 30:60] = RED
    for name in ("a.png", "b.png", "cat.png", "ox.png"):
        cv2.imwrite(str(tmp_path / "images" / name), scene[..., ::-1])
    images = [
        {"id": 1, "file_name": "a.png", "split": "train", "content": "scene"},
        {"id": 2, "file_name": "b.png", "split": "val", "content": "scene"},
    ]
    box: dict[str, Any] = {"bbox": [30, 20, 30, 20]}
    first = [
        {"image_id": 1, "category_id": 1, "score": 0.9, **box},
        {"image_id": 1, "category_id": 1, "score": 0.2, **box},
        {"image_id": 1, "category_id": 1, "score": 0.9, "iscrowd": 1, **box},
        {"image_id": 2, "category_id": 1, "score": 0.9, **box},
    ]
    categories = [{"id": 1, "name": "tv"}]
    content = {"images": images, "annotations": first, "categories": categories}
    (tmp_path / "pseudo.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    second = [{"image_id": 1, "category_id": 7, **box}]
    content = {"images": images, "annotations": second, "categories": [{"id": 7, "name": "television"}]}
    (tmp_path / "true.json").write_text(json.dumps(content))
    (tmp_path / "labels.json").write_text(json.dumps({"cat.png": ["cat"], "ox.png": ["ox"], "a.png": ["sky"]}))
    (tmp_path / "leave.json").write_text(json.dumps(["ox"]))
    return tmp_path


def section(folder: Path, **changes: Any) -> PhotoWords:
    values: dict[str, Any] = {
        "kind": "photo_words", "images": folder / "images", "labels": folder / "labels.json",
        "annotations": [folder / "pseudo.json.gz", folder / "true.json"], **changes,
    }  # fmt: skip
    return PhotoWords.model_validate(values)


def read(folder: Path, **changes: Any) -> list[tuple[str, str, bool]]:
    words = read_photo_words(section(folder, **changes))
    return sorted((item.file.name, item.word, item.box is not None) for item in words.items)


def test_photos__doubtful_boxes_crowds_scenes_and_other_parts_are_skipped(folder: Path) -> None:
    train = [("a.png", "television", True), ("a.png", "tv", True), ("cat.png", "cat", False), ("ox.png", "ox", False)]
    assert read(folder) == train
    assert read(folder, part="val", annotations=[folder / "pseudo.json.gz"]) == [("b.png", "tv", True)]
    assert len(read(folder, min_score=0.1)) == len(train) + 1
    assert read(folder, leave_out=folder / "leave.json") == train[:3]
    assert read(folder, per_word=1, min_side=21, annotations=[folder / "true.json"]) == train[2:]


def test_boxes__oddities_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_photo_words(section(folder))
    assert f"warning: {folder / 'true.json'}: 1 annotations without area" in capsys.readouterr().err


def test_photos__two_spellings_are_one_class(folder: Path) -> None:
    words = read_photo_words(section(folder))
    number = {item.word: label for item, label in zip(words.items, words.class_ids, strict=True)}
    assert number["tv"] == number["television"]
    assert len(words.classes) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "val", "labels": None, "annotations": ["nosplit.json"]}, "has split 'val'"),
        ({"annotations": ["broken.json"]}, r"broken\.json: annotations\[0\]: bbox must be four finite numbers"),
        ({"min_score": 1.0, "labels": None, "annotations": ["pseudo.json.gz"]}, "leaves anything"),
        ({"images": Path("elsewhere")}, "pictures are not there, such as elsewhere"),
    ],
)
def test_photos__errors_name_the_file_or_key(folder: Path, change: dict[str, Any], message: str) -> None:
    bare = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}
    split = [{"id": 1, "file_name": "a.png", "split": "train"}]
    (folder / "nosplit.json").write_text(json.dumps(bare))
    broken, categories = {"image_id": 1, "category_id": 1, "bbox": [0, 0, "wide", 1]}, [{"id": 1, "name": "tv"}]
    (folder / "broken.json").write_text(
        json.dumps({**bare, "images": split, "annotations": [broken], "categories": categories})
    )
    if "annotations" in change:
        change = {**change, "annotations": [folder / name for name in change["annotations"]]}
    with pytest.raises(UserError, match=message):
        read_photo_words(section(folder, **change))


def test_crop__contains_the_box_and_is_deterministic(folder: Path) -> None:
    config = section(folder, labels=None, crop_side=(0.9, 1.0), resolution=(32, 32))
    source = PhotoWordSource(read_photo_words(config), size=32, seed=0, config=config)
    image, word, label = source.sample(5)
    assert image.shape == (3, 32, 32) and word in ("tv", "television") and label == 0
    assert image[0, 16, 16] > 200 and image[2, 16, 16] < 50  # red in the middle
    assert np.array_equal(image, source.sample(5)[0])
    assert not np.array_equal(image, source.sample(5, 1)[0])


def test_crop__window_beyond_the_border_is_padded() -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    picture[:, 5:] = 255
    square = cut_square(picture, (-10.0, -5.0, 20.0, 20.0), 20)
    assert square[0].tolist() == [[127] * 3] * 20  # five rows of grey above
    assert square[10, :10].tolist() == [[127] * 3] * 10
    assert square[10, 10:15].max() == 0 and square[10, 15:].min() == 255


def test_loss__related_words_are_not_negatives() -> None:
    meanings = {
        "animal": Meaning(("animal",), None), "dog": Meaning(("dog", "hound"), "animal"),
        "pug": Meaning(("pug",), "dog"), "cat": Meaning(("cat",), "animal"),
    }  # fmt: skip
    lexicon = Lexicon(meanings=meanings, nouns={}, imagenet=())
    from pretrain.data.photos import LabelledPhotos

    words = LabelledPhotos(
        items=(), class_ids=(), classes=("dog", "pug", "cat"), lexicon=lexicon, excluded=frozenset({"hound"})
    )
    vocabulary, spared, captions = vocabulary_of(words)
    kept = [{vocabulary[i] for i in np.flatnonzero(row)} for row in spared]
    assert kept == [{"dog", "pug", "animal"}, {"pug", "dog", "animal"}, {"cat", "animal"}]
    assert [vocabulary[i] for i in captions[1].hypernyms] == ["dog", "animal"]
    assert "hound" not in vocabulary


def test_lexicon__senses_prefer_manual_then_imagenet() -> None:
    synsets = {
        1: Synset(1, 5, ("mouse",), (9,), ()), 2: Synset(2, 6, ("mouse", "computer mouse"), (8,), ()),
        3: Synset(3, 10, ("bottle",), (), ()), 4: Synset(4, 6, ("bottle",), (8,), ()),
        8: Synset(8, 6, ("artifact",), (), ()), 9: Synset(9, 5, ("rodent",), (), ()),
    }  # fmt: skip
    senses = {"mouse": (1, 2), "computer mouse": (2,), "bottle": (3, 4)}
    wordnet = WordNet(synsets=synsets, senses=senses, counts={}, first_sense_counts={}, exceptions={})

    def offset(noun: str, chosen: dict[str, str], seen: frozenset[int] = frozenset()) -> int | None:
        found = Senses(wordnet, chosen=chosen, photographed=[seen]).of(noun)
        return None if found is None else found.offset

    assert offset("mouse", {}) == 1
    assert offset("mouse", {}, frozenset({2})) == 2
    assert offset("mouse", {"mouse": "mouse#2"}) == 2
    assert [offset(noun, {}) for noun in ("bottles", "glass bottle", "bottle of milk", "gizmo")] == [4, 4, 4, None]
    with pytest.raises(UserError, match="WordNet does not have"):
        offset("mouse", {"mouse": "mouse#3"})
    content = build_lexicon(wordnet, ["mouse"], Senses(wordnet, chosen={}, photographed=[]), [2])
    assert content["meanings"]["n00000001"] == {"names": ["mouse"], "above": "n00000009"}
    assert content["meanings"]["n00000002"]["above"] is None  # "artifact" tells nothing


def test_lexicon__shipped_one_joins_spellings() -> None:
    lexicon = read_lexicon()
    assert len(lexicon.imagenet) == 1000
    for one, other in [("tv", "television"), ("couch", "sofa"), ("cell phone", "mobile phone"),
                       ("hair drier", "hair dryer"), ("remote", "remote control"), ("toy", "plaything")]:  # fmt: skip
        assert lexicon.meaning(one) == lexicon.meaning(other) is not None
    assert {"dog", "animal"} <= set(lexicon.hypernyms("golden retriever"))
    assert lexicon.meaning("mouse") == lexicon.meaning("computer mouse")


@pytest.mark.parametrize(
    ("noun", "above"),
    [("turtle", "reptile"), ("dolphin", "mammal"), ("cherry", "edible fruit"), ("onion", "vegetable"),
     ("spices", "food"), ("sunflower", "plant"), ("glove", "clothing"), ("tube", "conduit"), ("entree", "food"),
     ("yo-yo", "plaything")],
)  # fmt: skip
def test_lexicon__shipped_one_has_the_meaning_that_photos_show(noun: str, above: str) -> None:
    """A turtle is no turtleneck; of a name that several meanings have, the one that it is the first name of."""
    assert above in read_lexicon().hypernyms(noun)
