# SPDX-License-Identifier: Apache-2.0
"""The shipped boxes named by a CLIP of open_clip's files: the code path of a published one, with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional as F

from ovd import Detector, calibrate, evaluate, predict
from ovd.inference.crop_classifier import CropClassifier, PhotoBoxes, embed_boxes
from ovd.training.inputs import resolve_encoder
from ovd.user_files import calibration_file, read_calibration
from ovd.weights import detector_folder, user_folder
from pretrain.engine.errors import UserError
from pretrain.nets.encoders import load_encoder
from tests.encoders.small import MODEL, PREPROCESS, photo, save_clip, spec_of, write_photos

PROPOSALS = detector_folder("vild-photo") / "proposals"  # its boxes; without a card there are 80 background words


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORDBOX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return spec_of(save_clip(tmp_path_factory.mktemp("clip")))


def load(clip: str, weights: str | Path = PROPOSALS) -> tuple[Detector, CropClassifier]:
    detector = Detector.load(weights, encoder=clip, regions=12)
    assert isinstance(detector.model, CropClassifier)
    return detector, detector.model


def test_crop_classifier__embeds_proposals_with_the_encoder(clip: str) -> None:
    detector, model = load(clip)
    regions = model.regions(photo())
    assert 0 < len(regions) <= 12 and regions.distilled.shape == (len(regions), MODEL["embed_dim"])
    encoder = load_encoder(clip)
    assert (encoder.image_size, encoder.image_mean) == (32, tuple(PREPROCESS["mean"]))
    x1, y1, x2, y2 = regions.boxes[0].tolist()
    assert detector.templates == ("a photo of {article} {}.",)
    # The crop again, by hand: 1.2 times the box, cut at the border, stretched to a square.
    from PIL import Image

    dx, dy = 0.1 * (x2 - x1), 0.1 * (y2 - y1)
    window = (max(x1 - dx, 0), max(y1 - dy, 0), min(x2 + dx, 128), min(y2 + dy, 96))
    crop = np.asarray(Image.fromarray(photo()).resize((32, 32), Image.Resampling.BICUBIC, box=window))
    pixels = (torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.inference_mode():
        expected = F.normalize(encoder.encode_image(pixels), dim=1)[0]
    np.testing.assert_allclose(regions.distilled[0], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_crop_scorer__equals_the_documented_formula(clip: str) -> None:
    detector, model = load(clip)
    regions = model.regions(photo())
    query = detector.query(["guitar", "animal"])
    rows = detector.text.embed(query.words)
    score = model.scorer(rows, [["guitar"], ["animal"]], model.background_words)(regions)
    scale = math.exp(float(load_encoder(clip).logit_scale.detach()))
    assert scale == pytest.approx(1 / 0.07, rel=1e-4) == pytest.approx(model.calibration.open_scale)
    cosines = scale * regions.distilled @ np.concatenate([rows[:1], model.background_words]).T
    expected = softmax(cosines, axis=1)[:, 0] * np.sqrt(regions.objectness)  # no noun of the 80 is kin of a guitar
    np.testing.assert_allclose(score[:, 0], expected, rtol=1e-4, atol=1e-6)
    kin = model.words.relations([["animal"]]).related[0]
    assert {"dog", "zebra"} <= {w for w, is_kin in zip(model.words.words, kin.tolist(), strict=True) if is_kin}
    rivals = model.background_words[~kin]
    named = softmax(scale * regions.distilled @ np.concatenate([rows[1:], rivals]).T, axis=1)[:, 0]
    closed = regions.word_scores[:, model.proposal_words.relations([["animal"]]).same_or_below[0]].max(axis=1)  # type: ignore[index]
    np.testing.assert_allclose(score[:, 1], closed**0.8 * named**0.2, rtol=1e-3, atol=1e-5)
    alone = model.scorer(rows[:1], [["guitar"]], model.background_words)(regions)
    np.testing.assert_allclose(alone[:, 0], score[:, 0], rtol=1e-5)  # no column depends on another


def test_crop_scorer__attribute_competes_with_its_noun(clip: str) -> None:
    detector, model = load(clip)
    phrases = [["red car"], ["cars"], ["car"]]
    scorer = model.scorer(detector.text.embed(detector.resolve(["red car", "cars", "car"])), phrases,
                          model.background_words)  # fmt: skip
    car = model.words.words.index("car")
    assert [bool(row[car]) for row in scorer.competitor_mask] == [True, False, False]  # type: ignore[attr-defined]
    assert [bool(row[car]) for row in scorer.hyponyms] == [False, True, True]  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", ["vild-photo", "vild-sticker"])
def test_with_encoder__works_with_both_shipped_detectors(clip: str, weights: str) -> None:
    detector, _ = load(clip, weights)
    found = detector.find(photo(), ["dog", "guitar"], threshold=0.0)
    assert len(found) and (found.box_masks is None) == (weights == "vild-photo")
    assert any("not calibrated" in notice for notice in found.notices)
    assert f"{weights} + {clip}" == detector.card["name"] and "not calibrated" in detector.card["text"]
    assert "metrics" not in detector.card and detector.card["calibrated"] is False
    by_crop = detector.find(photo(), examples={"thing": photo()[20:70, 10:60]}, threshold=0.0)
    assert by_crop.names == ("thing",) and len(by_crop)


def test_crop_classifier__skips_thin_boxes(clip: str) -> None:
    _, model = load(clip)
    large = np.kron(photo(), np.ones((16, 16, 1), dtype=np.uint8))
    regions = model.source(large)
    regions.boxes = np.concatenate([np.array([[5, 5, 6, 50]], np.float32), regions.boxes[1:]])
    embedded = embed_boxes(regions, large, model.encoder)
    assert len(embedded) == len(regions) - 1
    assert np.array_equal(embedded.boxes, regions.boxes[1:]) and embedded.word_scores is not None
    assert np.array_equal(embedded.word_scores, regions.word_scores[1:])  # type: ignore[index]


def test_calibrate__stores_the_fit_in_the_users_folder(clip: str, tmp_path: Path, home: Path) -> None:
    data = write_photos(tmp_path / "set", 48)
    card = (detector_folder("vild-photo") / "model.json").read_bytes()
    assert calibrate.main(["--weights", str(PROPOSALS), "--encoder", clip, "--data", data, "--scenes", "24",
                           "--report", str(tmp_path / "report.json")]) in (0,)  # fmt: skip
    encoder = load_encoder(clip)
    file = calibration_file(PROPOSALS, clip, encoder)
    assert file.parent == home / "calibrations" and file.is_file()
    stored = read_calibration(PROPOSALS, encoder)
    assert stored is not None and stored.data == data and stored.scenes == 24
    assert stored.calibration == json.loads((tmp_path / "report.json").read_text())["calibration"]
    detector, model = load(clip)
    assert model.calibrated and model.calibration.threshold == stored.calibration["threshold"] == detector.threshold
    assert detector.find(photo(), ["dog"]).notices == () and data in detector.card["text"]
    assert (detector_folder("vild-photo") / "model.json").read_bytes() == card
    with torch.no_grad():
        encoder.logit_scale += 1  # another encoder
    assert read_calibration(PROPOSALS, encoder) is None
    file.write_text("{}")
    with pytest.raises(UserError, match=r"no calibration .* remove it"):
        load(clip)


def test_encoder_flag__is_accepted_by_every_command(clip: str, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "set", 3)
    out = tmp_path / "found"
    given = ["--weights", str(PROPOSALS), "--encoder", clip]
    assert predict.main([str(tmp_path / "set/images"), *given, "--classes", "dog", "--out", str(out)]) == 0
    assert clip in json.loads((out / "job.json").read_text())["weights"]
    for more in ([], ["--embeddings", "crops"]):
        assert evaluate.main([*given, "--data", data, "--regions", "9", "--out", str(tmp_path / "e"), *more]) == 0
        record = json.loads((tmp_path / "e/metrics.json").read_text())["run"]
        assert record["encoder"] == clip and record["calibrated"] is False
    with pytest.raises(UserError, match="--encoder names the boxes of --weights"):
        evaluate.main([*given, "--data", data, "--vild"])
    with pytest.raises(UserError, match="--encoder needs --data"):
        calibrate.main(given)


def test_encoder_name__an_unknown_one_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no encoder 'ViT-B-32'; there is: clip-photo, .*open_clip:MODEL:TAG"):
        resolve_encoder("ViT-B-32")
    with pytest.raises(UserError, match="no encoder 'clip-foto' - did you mean 'clip-photo'"):
        resolve_encoder("clip-foto")
    with pytest.raises(UserError, match="vild-photo is a detector; give an encoder"):
        load_encoder(detector_folder("vild-photo"))


def test_user_files__follow_the_environment() -> None:
    folder = user_folder("text", "XDG_CACHE_HOME", ".cache", environment={"XDG_CACHE_HOME": "/c"})
    assert folder == Path("/c/wordbox/text")
    assert user_folder("text", "XDG_CACHE_HOME", ".cache", environment={"WORDBOX_HOME": "/w"}) == Path("/w/text")
    assert user_folder("t", "X", ".cache", environment={}) == Path.home() / ".cache/wordbox/t"


def test_sides__set_the_proposal_networks_input_sizes(clip: str) -> None:
    detector = Detector.load(PROPOSALS, encoder=clip, regions=12, sides=[96, 64, 96])
    model = detector.model
    assert isinstance(model, CropClassifier) and isinstance(model.source, PhotoBoxes)
    assert model.source.proposer.sides == (96, 64)
    assert detector.card["settings"].endswith(" sides 96 64 96")  # `predict` goes on with a folder of the same only
    with pytest.raises(UserError, match="one or more numbers of 64 to 2048 pixels"):
        Detector.load(PROPOSALS, encoder=clip, sides=[20])
    with pytest.raises(UserError, match="this one looks at pictures in one size"):
        Detector.load("vild-sticker", sides=[320])
