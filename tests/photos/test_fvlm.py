# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs: targets of regions, what is pooled, how words are scored, and one training whole."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from ovd import Detector, calibrate
from ovd import train as ovd_train
from ovd.data.photo_words import Photo, PhotoLabels, WordTable, nouns_of, region_targets
from ovd.data.pooled import PooledSource, RegionBatch
from ovd.evaluation.photo_calibration import photos_of
from ovd.formats.read import read_labels
from ovd.formats.shapes import labelled_pictures
from ovd.formats.write import write_labels
from ovd.inference.everyday import GROUPS, INDISTINCT, KINDS, OTHER_THINGS
from ovd.inference.fvlm_regions import FvlmRegionModel, WordScorer
from ovd.inference.hyponyms import TrainingWords
from ovd.inference.known_words import WordList, singulars
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.fvlm.criterion import WordCriterion
from ovd.modeling.fvlm.head import FrozenFeatureHead
from ovd.modeling.fvlm.network import FvlmDetector
from ovd.modeling.fvlm.tower import FrozenTower, averages
from ovd.modeling.proposals.build import PROPOSAL_WORDS, PhotoProposer
from pretrain.config import CbowTower, EncoderConfig
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError
from pretrain.nets.towers import JointEncoder, build_encoder
from tests.photos.conftest import arguments

LEXICON = read_lexicon()
WORDS = WordList(words=PROPOSAL_WORDS, lexicon=LEXICON)


@pytest.mark.parametrize(
    ("phrase", "same", "above"),
    [
        ("dog", {"dog"}, set()),
        ("Dogs", {"dog"}, set()),
        ("the dog", {"dog"}, set()),
        ("golden retriever", set(), {"dog"}),
        ("tabby", set(), {"cat"}),
        ("television", {"tv"}, set()),
        ("sofa", {"couch"}, set()),
        ("mobile phone", {"cell phone"}, set()),
        ("people", {"person"}, set()),
        ("women", set(), {"person"}),
        ("saxophone", set(), set()),
        ("zzyzx", set(), set()),
    ],
)  # fmt: skip
def test_word_list__related_known_words(phrase: str, same: set[str], above: set[str]) -> None:
    relations = WORDS.relations([[phrase]])
    named = {PROPOSAL_WORDS[i] for i in np.flatnonzero(relations.same_or_below[0])}
    over = {PROPOSAL_WORDS[i] for i in np.flatnonzero(relations.above[0])}
    assert (named, over) == (same, above)


@pytest.mark.parametrize(
    ("phrase", "general"),
    [("kitten", "cat"), ("Puppies", "dog"), ("young women", "person"), ("policemen", "person"),
     ("tennis player", "person"), ("SUV", "car"), ("cat", None), ("golden retriever", None),
     ("wine glass", None), ("zzyzx", None)],
)  # fmt: skip
def test_word_list__kinds_that_cannot_be_told_apart(phrase: str, general: str | None) -> None:
    assert WORDS.general_of(phrase) == general
    words = {PROPOSAL_WORDS[i] for i in np.flatnonzero(WORDS.relations([[phrase]]).indistinct[0])}
    assert words == ({general} if general else set())


@pytest.mark.parametrize(
    ("phrase", "word"),
    [("surf board", "surfboard"), ("hot-dog", "hot dog"), ("firehydrant", "fire hydrant"),
     ("wine-glasses", "wine glass"),
     ("tooth brush", "toothbrush"), ("cellphones", "cell phone")],
)  # fmt: skip
def test_word_list__compounds_however_they_are_written(phrase: str, word: str) -> None:
    assert WORDS.meaning_of(phrase) == WORDS.meaning_of(word) is not None


@pytest.mark.parametrize("phrase", ["wheel", "plug", "painter", "chargers", "volume"])
def test_word_list__misleading_names_in_wordnet_are_not_taken(phrase: str) -> None:
    """A wheel is no bicycle, a plug no fire hydrant, a painter no cougar."""
    relations = WORDS.relations([[phrase]])
    assert WORDS.meaning_of(phrase) is None and not relations.related.any()


@pytest.mark.parametrize(
    ("phrase", "words"), [("van", {"car", "truck", "bus"}), ("sailboat", {"boat"}), ("streetcars", {"train", "bus"})]
)  # fmt: skip
def test_word_list__kinds_of_several_words_contradict_none_of_them(phrase: str, words: set[str]) -> None:
    relations = WORDS.relations([[phrase]])
    assert (
        words <= {PROPOSAL_WORDS[i] for i in np.flatnonzero(relations.above[0])} and not relations.same_or_below.any()
    )


def test_everyday_tables__are_consistent() -> None:
    named = {*INDISTINCT.values(), *(word for words in (*KINDS.values(), *GROUPS.values()) for word in words)}
    assert named <= set(PROPOSAL_WORDS)
    assert not KINDS.keys() & set(PROPOSAL_WORDS) and not OTHER_THINGS & set(PROPOSAL_WORDS)
    for word, general in INDISTINCT.items():
        assert not WORDS.relations([[word]]).same_or_below.any(), word
        assert WORDS.relations([[word]]).above[0, PROPOSAL_WORDS.index(general)], word


def test_word_list__hypernym_has_all_its_hyponyms() -> None:
    relations = WORDS.relations([["animal"], ["vehicle"], ["gizmo", "teddy bear"]])
    kinds = [{PROPOSAL_WORDS[i] for i in np.flatnonzero(row)} for row in relations.same_or_below]
    assert {"bird", "cat", "dog", "horse", "zebra"} <= kinds[0] and "car" not in kinds[0]
    assert {"car", "bus", "bicycle", "truck"} <= kinds[1] and "dog" not in kinds[1]
    assert kinds[2] == {"teddy bear"}


@pytest.mark.parametrize(
    ("word", "form"), [("wine glasses", "wine glass"), ("cherries", "cherry"), ("boxes", "box"), ("bus", "bus")]
)  # fmt: skip
def test_word_list__plurals_of_compounds(word: str, form: str) -> None:
    assert form in singulars(word)


TABLE = WordTable(words=("dog", "car", "terrier", "animal", "saxophone"), always_labelled=2, lexicon=LEXICON)
BOXES = np.array([[0, 0, 10, 10], [0, 0, 10, 9.4], [0, 0, 10, 5], [50, 50, 90, 90]], dtype=np.float32)


def photo(words: list[int], scores: list[float], noun: int | None = None) -> Photo:
    return Photo(
        file=Path("a.jpg"),
        size=None,
        boxes=np.array([[0, 0, 10, 10]] * len(words), dtype=np.float32).reshape(-1, 4),
        words=np.array(words, dtype=np.int64),
        scores=np.array(scores, dtype=np.float32),
        noun=noun,
    )


def test_region_targets__grow_with_iou_up_to_the_label_score() -> None:
    target, mask = region_targets(photo([0], [0.8]), BOXES, TABLE)
    assert target[:, 0].tolist() == pytest.approx([0.8, 0.8, 0.8 * (0.5 - 0.3) / 0.6, 0.0], abs=1e-6)
    assert target[:, 3].tolist() == pytest.approx(target[:, 0].tolist())  # a dog is an animal
    assert not target[:, [1, 2, 4]].any()
    # Labelled regions: a saxophone it is not, a terrier it may be. The others: only what is looked for everywhere.
    assert mask.tolist() == [
        [True, True, False, True, True],
        [True, True, False, True, True],
        [True, True, False, True, True],
        [True, True, False, False, False],
    ]


def test_region_targets__noun_labels_a_general_box_or_the_largest_proposal() -> None:
    refined, _ = region_targets(photo([0], [0.8], noun=2), BOXES, TABLE)
    assert refined[:, 2].tolist() == pytest.approx(refined[:, 0].tolist())
    largest, _ = region_targets(photo([], [], noun=4), BOXES, TABLE)
    assert largest[:, 4].tolist() == pytest.approx([0, 0, 0, 0.7], abs=1e-6)
    none, mask = region_targets(photo([], []), BOXES, TABLE)
    assert not none.any() and mask[:, :2].all() and not mask[:, 2:].any()


def test_criterion__is_binary_cross_entropy_of_scaled_cosines() -> None:
    torch.manual_seed(0)
    head = FrozenFeatureHead(features=6, words=2, hidden=16, embed_dim=4, dropout=0.0, scale=5.0)
    rows = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    model = FvlmDetector(proposer=cast(PhotoProposer, None), tower=cast(FrozenTower, None), head=head, reads_words=True)
    criterion = WordCriterion(model=model, rows=rows, always_labelled=1, noun_weight=0.25).eval()
    batch = RegionBatch(
        features=torch.randn(2, 6),
        word_scores=torch.rand(2, 2),
        target=torch.tensor([[0.4, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
    )
    out = head(batch.features, batch.word_scores)
    expected = 0.0
    for n in range(2):
        for v in range(3):
            if not batch.mask[n, v]:
                continue
            logit = 5.0 * float((out.embedding[n] @ rows[v]).detach()) + float(out.bias[n].detach())
            p, t = 1 / (1 + math.exp(-logit)), float(batch.target[n, v])
            expected -= (1.0 if v == 0 else 0.25) * (t * math.log(p) + (1 - t) * math.log(1 - p)) / 2
    assert float(criterion(batch)["loss_words"].detach()) == pytest.approx(expected, rel=1e-5)


def test_tower__whole_picture_box_equals_the_encoders_embedding(encoder: JointEncoder) -> None:
    tower = FrozenTower(encoder, side=64, pool=2, context=1.5, precision=torch.float32)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    features = tower.pooled(image, torch.tensor([[0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 32.0, 32.0]]))
    assert features.shape == (2, tower.features)
    pixels = encoder.normalise(torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255)
    with torch.no_grad():
        whole = torch.nn.functional.normalize(encoder.encode_image(pixels), dim=1)
    cosine = tower.embed(features) @ whole.T
    assert float(cosine[0]) > 0.99 > float(cosine[1])


def test_averages__are_roi_aligns() -> None:
    last, boxes = torch.randn(1, 40, 5, 7), torch.tensor([[0.0, 0, 224, 160], [10, 20, 31, 150], [100, 3, 101, 4]])
    expected = roi_align(last, [boxes], 1, 1 / 32, sampling_ratio=0, aligned=True).flatten(1)
    torch.testing.assert_close(averages(last, boxes), expected)
    assert averages(last, boxes[:0]).shape == (0, 40)


def test_tower__of_another_kind_is_refused(encoder: JointEncoder) -> None:
    other = build_encoder(
        EncoderConfig(embed_dim=16, text=CbowTower(kind="cbow", width=16, hidden=32, context_length=16))
    )
    with pytest.raises(UserError, match="of timm"):
        FrozenTower(other, side=64, pool=2, context=1.5)


def regions(scores: list[list[float]]) -> RegionSet:
    count = len(scores)
    return RegionSet(
        boxes=np.array([[0.0, 0.0, 10.0, 10.0]] * count, np.float32),
        objectness=np.full(count, 0.5, np.float32),
        text=np.eye(4, dtype=np.float32)[:count],
        image=np.eye(4, dtype=np.float32)[:count],
        masks=None,
        size=(20, 20),
        word_scores=np.array(scores, np.float32),
        bias=np.full(count, -1, np.float32),
    )


def scorer(hyponyms: list[list[bool]]) -> WordScorer:
    count = len(hyponyms)
    return WordScorer(
        rows=np.eye(4, dtype=np.float32)[:count],
        competitors=np.eye(4, dtype=np.float32),
        competitor_mask=~np.eye(4, dtype=bool)[:count],
        word_rows=np.eye(4, dtype=np.float32)[:2],
        hyponyms=np.array(hyponyms),
        related=np.array(hyponyms),
        scale=4.0,
        calibration=Calibration(head_weight=0.25, open_scale=10.0),
    )


def test_scores__known_words_are_a_geometric_mean_and_independent() -> None:
    both = scorer([[True, False], [True, True]])
    score = both(regions([[0.2, 0.6], [0.9, 0.1]]))
    same, other = 1 / (1 + math.exp(-3.0)), 1 / (1 + math.exp(1.0))  # the head's, of a region with this row and another
    assert float(score[0, 0]) == pytest.approx(0.2**0.75 * same**0.25, rel=1e-4)
    assert float(score[1, 1]) == pytest.approx(max(0.9**0.75 * other**0.25, 0.1**0.75 * same**0.25), rel=1e-4)
    alone = both.select([1])(regions([[0.2, 0.6], [0.9, 0.1]]))
    np.testing.assert_allclose(alone[:, 0], score[:, 1], rtol=1e-6)


def test_scores__of_a_hypernym_are_the_best_of_its_words_and_of_a_synonym_the_same() -> None:
    """However the class's own embedding lies: *food* is where a banana or a pizza is."""
    seen = regions([[0.2, 0.6], [0.9, 0.1], [0.3, 0.3]])
    score = scorer([[True, False], [False, True], [True, True], [False, True]])(seen)
    np.testing.assert_array_equal(score[:, 2], score[:, :2].max(axis=1))
    np.testing.assert_array_equal(score[:, 3], score[:, 1])


def test_scores__of_a_word_that_the_head_did_not_learn_are_the_proposal_networks() -> None:
    words = replace(scorer([[True, False], [False, True]]), word_rows=np.eye(4, dtype=np.float32)[[0, 0]] * [[1], [0]])
    score = words(regions([[0.2, 0.6]]))
    assert float(score[0, 1]) == pytest.approx(0.6, rel=1e-4) and float(score[0, 0]) != pytest.approx(0.2, rel=1e-2)


def with_hyponyms(words: WordScorer, below: list[list[bool]]) -> WordScorer:
    """The scorer with four words of a training, unrelated to each other; ``below``: those that are each class."""
    known = np.array([[True, False], [False, True], [False, False], [False, False]])
    return replace(
        words,
        training=TrainingWords(rows=np.eye(4, dtype=np.float32), related=np.eye(4, dtype=bool), known=known),
        below=np.array(below),
        calibration=replace(words.calibration, open_fallback=0.5),
    )


def test_scores__of_a_known_word_that_is_not_found_are_half_the_image_embeddings_cubed() -> None:
    seen = replace(regions([[0.01, 0.9], [0.01, 0.0]]), objectness=np.ones(2, np.float32))
    plain = scorer([[True, False], [False, True], [True, True]])
    words = with_hyponyms(plain, [[True, False, False, False], [False, True, False, False], [True, True, False, False]])
    before, score = plain(seen), words(seen)
    own, other = math.exp(10.0), 3.0
    image = own / (own + other) * 0.25**0.25
    assert float(score[0, 0]) == pytest.approx(0.5 * (image * (1 - before[:, 0].max())) ** 3, rel=1e-4)
    assert score[0, 0] > before[0, 0]
    np.testing.assert_allclose(score[:, 2], before[:, 2], rtol=1e-6)  # one of the group's words is found
    np.testing.assert_allclose(words.select([0])(seen)[:, 0], score[:, 0], rtol=1e-6)
    np.testing.assert_allclose(words.shown(seen, threshold=0.1).best, score.max(axis=0), rtol=1e-6)


def test_scores__of_a_general_word_are_at_least_half_of_a_hyponyms() -> None:
    """Of an open one: *rodent* is where a guinea pig is, however the embedding of *rodent* lies."""
    seen = replace(regions([[0.0, 0.0]] * 4), objectness=np.ones(4, np.float32))
    plain = scorer([[False, False]] * 3)
    below = [[True, False, False, False], [False, False, True, True], [False] * 4]  # of the first the class itself
    words = with_hyponyms(plain, below)
    before, score = plain(seen), words(seen)
    np.testing.assert_array_equal(score[:, [0, 2]], before[:, [0, 2]])
    one = with_hyponyms(plain, [[False, False, False, True], *below[1:]])(seen)  # a word below it that is not itself
    np.testing.assert_array_equal(one[3, 0], score[3, 1])
    own, other = math.exp(10.0), 3.0
    assert score[2:, 1] == pytest.approx(0.5 * own / (own + other) * 0.25**0.25, rel=1e-4)
    np.testing.assert_array_equal(score[:2, 1], before[:2, 1])
    shown = words.shown(seen, threshold=0.1)
    np.testing.assert_allclose(shown.best, score.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(shown.score_RS, score[:, shown.classes], rtol=1e-6)


def test_scores__compete_with_contradicting_words() -> None:
    score = scorer([[False, False], [True, False]])(regions([[0.0, 0.0], [1.0, 0.0]]))
    whole = 0.5 * 0.25**0.25  # objectness, and a box of a quarter of the picture
    own, other = math.exp(10.0), 3.0  # cosine 1 with its own row, 0 with the three others
    assert float(score[0, 0]) == pytest.approx(own / (own + other) * whole, rel=1e-4)
    assert float(score[1, 0]) == pytest.approx(1 / (1 + own + 2) * whole, rel=1e-3)  # a rival has cosine 1


def test_training__exports_an_open_vocabulary_detector(trained: Path) -> None:
    detector = Detector.load(trained / "run", regions=10)
    picture = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = detector.embed(picture).classify(["dog", "animal", "saxophone", "zzyzx"], threshold=0.0)
    assert found.names == ("dog", "animal", "saxophone", "zzyzx") and found.box_masks is None
    assert (found.best > 0).all() and (found.best < 1).all()
    assert found.xyxy.min() >= 0 and (found.xyxy.max(axis=0) <= [80, 60, 80, 60]).all()
    alone = detector.embed(picture).classify(["saxophone"], threshold=0.0)
    assert alone.best[0] == pytest.approx(found.best[2], abs=1e-6)


def test_naming__does_not_depend_on_the_order_of_related_words(trained: Path) -> None:
    """A dog is as much an animal as a dog: the narrower word names the box, also if it is typed last."""
    detector = Detector.load(trained / "run", regions=10)
    names = set()
    for seed in range(8):
        seen = detector.embed(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))
        first, last = (seen.classify(words, threshold=0.0) for words in (["bird", "animal"], ["animal", "bird"]))
        assert first.class_name == last.class_name
        np.testing.assert_array_equal(first.confidence, last.confidence)
        assert (np.diff(first.confidence) <= 0).all()
        names |= set(first.class_name)
    assert "bird" in names


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["dog", "animal"], {("dog", "animal")}),
        (["animal", "dog", "dogs"], {("dog", "animal"), ("dogs", "animal")}),
        (["pet", "dog"], {("dog", "pet")}),  # a group of words
        (["dog", "beagle"], set()),  # of a word that the proposal network knows
        (["cat", "kitten"], set()),
        (["dog", "cat"], set()),
        (["dog", "brown dog"], set()),
        (["zzyzx", "dog"], set()),
    ],
)
def test_kinds__of_typed_classes(trained: Path, words: list[str], kinds: set[tuple[str, str]]) -> None:
    kind_of = Detector.load(trained / "run").model.kind_of([[word] for word in words])
    assert {(words[i], words[j]) for i, j in np.argwhere(kind_of)} == kinds


def test_check__computes_no_cache_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    changed = [f"out={tmp_path}/run", f"cache={tmp_path}/cache", "--check"]
    assert ovd_train.main([*arguments(trained), *changed]) == 0
    assert list(tmp_path.iterdir()) == []


def test_export__has_words_and_proposals(trained: Path) -> None:
    card = json.loads((trained / "run/exported/model.json").read_text())
    assert card["model"]["arch"] == "fvlm" and card["classes"] == card["bank"][:2] == ["dog", "car"]
    assert {"saxophone", "lamp", "animal"} <= set(card["bank"])
    theirs, ours = (
        folder / "model.safetensors" for folder in (trained / "proposals", trained / "run/exported/proposals")
    )
    assert theirs.read_bytes() == ours.read_bytes()


def photos(trained: Path, **options: object) -> PhotoLabels:
    defaults: dict[str, object] = {
        "folder": trained / "images",
        "annotations": [trained / "boxes.json"],
        "labels": trained / "labels.json",
        "lexicon": LEXICON,
        "part": "train",
        "min_score": 0.08,
    }
    return PhotoLabels(**(defaults | options))  # type: ignore[arg-type]


def test_photos__part_all_is_every_photo(trained: Path) -> None:
    every = [photo.file.name for photo in photos(trained, part=None).photos]
    assert [photo.file.name for photo in photos(trained, part="all").photos] == every
    assert len(every) > len(photos(trained).photos)


def test_photos__part_and_left_out_words(trained: Path) -> None:
    assert [p.file.name for p in photos(trained).photos] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    without = photos(trained, leave_out=["saxophone"], withheld=["car"])
    assert [p.file.name for p in without.photos] == ["1.png", "2.png", "3.png", "5.png"]  # its photo goes as well
    assert "car" not in without.table.words and "saxophone" not in without.table.words
    assert sum(len(p.boxes) for p in without.photos) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "test"}, r"no image has this split \(there: train, val\); 'all' takes"),
        ({"withheld": ["cars"]}, "mean 'car'"),
    ],
)
def test_photos__unknown_part_or_name_is_refused(trained: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        photos(trained, **options)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_photos__are_equal_in_any_label_format(trained: Path, tmp_path: Path, form: str) -> None:
    boxes, labels = trained / "boxes.json", trained / "labels.json"
    spec = f"coco:{trained / 'images'}:{boxes}"
    if form != "coco":
        write_labels(
            labelled_pictures(read_labels(boxes, images=trained / "images")), tmp_path, form, picture_mode="copy"
        )
        spec = str(tmp_path / "data.yaml" if form == "yolo" else tmp_path)
    expected, read = photos(trained, labels=None), photos_of(spec, labels=None, part="train")
    assert [p.file.name for p in read.photos] == [p.file.name for p in expected.photos]
    assert sorted(read.table.words) == sorted(expected.table.words)  # VOC's classes have no order
    for ours, theirs in zip(read.photos, expected.photos, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
        assert [read.table.words[w] for w in ours.words] == [expected.table.words[w] for w in theirs.words]
    assert [p.file.stem for p in photos_of(spec, labels=None, part=None).photos] == ["0"]  # val, as there is one
    assert len(photos_of(spec, labels=None, part="all")) == 6
    if form == "coco":
        named = photos_of(spec, labels=labels, part="train")
        assert [p.noun for p in named.photos] == [p.noun for p in photos(trained).photos]


def test_calibrate__needs_photos(trained: Path) -> None:
    weights = ["--weights", str(trained / "run/exported")]
    with pytest.raises(UserError, match="is calibrated on photos: give --data"):
        calibrate.main(weights)
    with pytest.raises(UserError, match="boxes.json: 1 photo with boxes; at least 40 are needed"):
        calibrate.main([*weights, "--data", f"coco:{trained / 'images'}:{trained / 'boxes.json'}"])


def test_pooled_source__row_of_another_photo_has_its_labels() -> None:
    """A cache replaces a photo that cannot be read by the next one."""
    photos = cast(PhotoLabels, SimpleNamespace(photos=[photo([0], [0.9]), photo([1], [0.9])], table=TABLE))
    row = {"features": np.zeros((4, 6), np.float16), "known": np.zeros((4, 0), np.float16), "boxes": BOXES}
    rows = [{**row, "size": np.array([100, 100], np.float32), "regions": np.array(4), "photo": np.array(1)}] * 2
    target = PooledSource(photos=photos, row=rows.__getitem__).sample(0, 0).target
    np.testing.assert_array_equal(target.numpy(), region_targets(photo([1], [0.9]), BOXES, TABLE).target)
    assert target[:, 1].any() and not target[:, 0].any()


def test_nouns_of__reads_a_list_or_lists_by_reason(tmp_path: Path) -> None:
    for content in (["kitchen"], {"place": ["kitchen"], "part": []}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert nouns_of(str(tmp_path / "a.json")) == {"kitchen"}
    (tmp_path / "a.json").write_text('{"place": "kitchen"}')
    with pytest.raises(UserError, match="neither a JSON list"):
        nouns_of(str(tmp_path / "a.json"))
    assert nouns_of(None) == frozenset()


def test_notices__phrase_is_searched_by_noun_and_unknown_word_is_named(trained: Path) -> None:
    detector = Detector.load(trained / "run", regions=4)
    query = detector.query(["red car", "dogs", "zzyzx", "cup of coffee"])
    assert query.notices[0] == "'red car' is searched as 'car': the other words are ignored"
    assert query.notices[1].startswith("'zzyzx' is not a word these weights were trained on; nearest known words: ")
    assert query.notices[2].startswith("'cup of coffee' is searched as 'cup'") and len(query.notices) == 3
    picture = np.zeros((32, 48, 3), dtype=np.uint8)
    scores = detector.embed(picture).scores(detector.query(["red car", "car"])).score_RC
    assert (scores[:, 0] > 0).any()
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize(
    ("phrase", "head"),
    [
        ("a man wearing a hat", "man"),
        ("people sitting on a bench", "people"),
        ("dog with a ball", "dog"),
        ("the red car", "car"),
        ("plate of food", "plate"),
        ("a large group of people", "people"),
        ("pairs of black skis on a wall", "skis"),
        ("a man with a pair of skis", "man"),
        ("woman holding a slice of pizza", "woman"),
        ("a photo of a group of people", "people"),
        ("picture of a dog", "dog"),
        ("a family of elephants", "elephants"),
        ("family of four", "family"),
        ("a sleeping cat", "cat"),
        ("orange cat sleeping on a sofa", "cat"),
        ("black riding boots", "boots"),
        ("home made bread", "bread"),
        ("a glass full of water", "glass"),
        ("a full glass", "glass"),
        ("next to a dog", "dog"),
        ("of", None),
        ("logo on a shirt", None),  # about no shirt
    ],
)
def test_word_list__a_phrase_is_about_the_noun_before_its_prepositions(phrase: str, head: str | None) -> None:
    assert WORDS.head_of(phrase) == head


@pytest.mark.parametrize(
    ("phrase", "noun"), [("plush toy", "toy"), ("large monitor", "monitor"), ("red vehicles", "vehicle")]
)
def test_word_list__a_phrase_has_the_members_of_its_noun(phrase: str, noun: str) -> None:
    assert WORDS.members_of(phrase) == WORDS.members_of(noun) != frozenset()
    phrases, nouns = WORDS.relations([[phrase]]), WORDS.relations([[noun]])
    np.testing.assert_array_equal(phrases.same_or_below, nouns.same_or_below)


def test_word_list__kinds_of_a_groups_members_are_of_the_group() -> None:
    words = WordList(words=("dog", "terrier", "school bus", "golf ball", "guitar"), lexicon=LEXICON)
    relations = words.relations([["pet"], ["vehicles"], ["sports gear"]])
    members = [{words.words[i] for i in np.flatnonzero(row)} for row in relations.same_or_below]
    assert members == [{"dog", "terrier"}, {"school bus"}, {"golf ball"}]


def test_notices__name_the_word_that_a_kind_cannot_be_told_from(trained: Path) -> None:
    detector = Detector.load(trained / "run", regions=4)
    query = detector.query(["kitten", "cat"])
    assert query.notices == ("'kitten' is searched as 'cat', at half its score: these weights cannot tell",)
    scores = detector.embed(np.zeros((32, 48, 3), dtype=np.uint8)).scores(query).score_RC
    np.testing.assert_allclose(scores[:, 0], scores[:, 1] / 2, rtol=1e-6)  # it is one, or it is not
    assert "kitten" not in detector.model.prompt_free_words().names


def test_notices__say_that_a_crowd_is_boxed_person_by_person(trained: Path) -> None:
    detector = Detector.load(trained / "run", regions=4)
    assert isinstance(detector.model, FvlmRegionModel)
    detector.model.proposal_words = WordList(words=("person",), lexicon=LEXICON)
    embedding = np.eye(1, detector.model.background_words.shape[1], dtype=np.float32)
    for phrase in ("crowd", "crowds", "a large crowd"):
        notice = f"{phrase!r} is searched as 'person': one box for each"
        assert detector.model.notices([[phrase]], embedding) == (notice,)
    assert detector.model.notices([["people"]], embedding) == ()
    notice = "'crowd of people' is searched as 'people': the other words are ignored"
    assert detector.model.notices([["crowd of people"]], embedding) == (notice,)


def test_detector__copy_is_equal_and_any_picture_shape_works(trained: Path) -> None:
    detector = Detector.load(trained / "run", regions=10)
    again = copy.deepcopy(detector)  # as pickling does it
    for shape in ((60, 80), (1, 1), (2, 300), (300, 3)):
        picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        here, there = (one.embed(picture).classify(["dog", "lamp"], threshold=0.0) for one in (detector, again))
        np.testing.assert_array_equal(here.confidence, there.confidence)
        assert (here.xyxy <= [shape[1], shape[0], shape[1], shape[0]]).all()
