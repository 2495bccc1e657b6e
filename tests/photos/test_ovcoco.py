# SPDX-License-Identifier: Apache-2.0
"""OV-COCO's way on photographs: proposals that know no words, words that stay unknown, crops that are distilled."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

import ovd
from ovd import embed as ovd_embed
from ovd import evaluate as ovd_evaluate
from ovd import train as ovd_train
from ovd.data.pooled import OfflineBatch, RegionBatch
from ovd.inference.fvlm_ensemble import EnsembleScorer, head_exponents
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.export import read_card
from ovd.modeling.fvlm.criterion import WordCriterion
from ovd.modeling.fvlm.head import FrozenFeatureHead, ImageHead
from ovd.modeling.fvlm.network import FvlmDetector
from ovd.modeling.proposals.build import PhotoProposer, load_proposals
from pretrain.data.lexicon import read_lexicon
from pretrain.data.photos import novel_names
from pretrain.engine.checkpoint import save_weights
from pretrain.engine.errors import UserError
from pretrain.nets.timm_tower import TimmImage
from pretrain.nets.towers import JointEncoder
from tests.photos.conftest import arguments

NETWORK = "timm:tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def run(trained: Path, encoder: JointEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proposals of two steps on a library's network, the crops of three photos, and where more can be written."""
    root = tmp_path_factory.mktemp("ovcoco")
    for name in ("images", "encoder", "boxes.json", "labels.json"):
        (root / name).symlink_to(trained / name)
    assert isinstance(encoder.visual, TimmImage)
    save_weights(root / "lite0.safetensors", dict(encoder.visual.backbone.state_dict()), {})
    assert ovd_train.main(
        [
            "--config", "photos/lite_ovcoco_proposals.yaml", f"out={root}/rpn", f"weights={root}/lite0.safetensors",
            f"model.backbone.name={NETWORK}", "sides=[64]", f"data.images={root}/images",
            f"data.annotations=[{root}/boxes.json]", "data.side=64", "loop.steps=2", "loop.batch_size=2",
            "optim.warmup_steps=0", "loop.log_every=1", "loop.save_every=2", "model.post_nms=20",
        ]
    ) == 0  # fmt: skip
    (root / "proposals").symlink_to(root / "rpn/exported")
    assert ovd_embed.main(
        [
            "--config", "photos/lite_ovcoco_embed.yaml", f"out={root}/regions", f"proposer={root}/proposals",
            f"encoder={root}/encoder", f"pictures.images={root}/images", f"pictures.annotations={root}/boxes.json",
            "pictures.part=train", "proposals_per_image=3",
        ]
    ) == 0  # fmt: skip
    return root


def train(root: Path, variant: str, *more: str) -> Path:
    """The exported detector of a training of two steps; dogs are unknown to it."""
    regions = f"{root}/regions" if variant in ("vild", "ensemble") else "null"
    kept = [a for a in arguments(root) if not a.startswith(("--config", "photos/", "out=", "cache="))]
    out = root / variant
    command = ["--config", "photos/lite_ovcoco.yaml", *kept, f"out={out}", "cache=null", f"model.variant={variant}"]
    assert ovd_train.main([*command, f"regions={regions}", "data.novel=[dog]", *more]) == 0
    return out / "exported"


def trained_once(root: Path, variant: str) -> Path:
    """The same for the tests that share it, whichever comes first."""
    folder = root / variant / "exported"
    return folder if folder.exists() else train(root, variant)


def test_pyramid__learns_while_its_network_is_frozen(run: Path, encoder: JointEncoder) -> None:
    proposer = load_proposals(run / "proposals", precision=torch.float32)
    assert isinstance(encoder.visual, TimmImage)
    theirs = encoder.visual.backbone.state_dict()
    state = proposer.model.backbone.network.network.state_dict()
    assert {name for name in state if not name.endswith("num_batches_tracked")} <= set(theirs)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.float(), theirs[name].half().float(), msg=name)
    found = proposer.regions(np.full((48, 64, 3), 90, np.uint8), top=10)
    assert found.words.shape == (len(found.boxes), 0)
    assert json.loads((run / "proposals/model.json").read_text())["model"]["backbone"]["pixel_mean"] == [127.5] * 3


def test_proposals__training_continues_from_an_export(run: Path) -> None:
    command = [
        "--config", "photos/lite_ovcoco_proposals.yaml", f"out={run}/further", f"weights={run}/proposals",
        f"model.backbone.name={NETWORK}", "sides=[64]", f"data.images={run}/images",
        f"data.annotations=[{run}/boxes.json]", "data.side=64", "loop.steps=1", "loop.batch_size=2",
        "optim.warmup_steps=0", "loop.save_every=1", "model.post_nms=20",
    ]  # fmt: skip
    assert ovd_train.main([*command, "optim.lr=1e-9"]) == 0
    before, after = (load_proposals(run / name, precision=torch.float32) for name in ("proposals", "further/exported"))
    assert torch.equal(before.model.pixel_mean, after.model.pixel_mean)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    torch.testing.assert_close(
        before.regions(picture, top=5).objectness, after.regions(picture, top=5).objectness, rtol=1e-3, atol=1e-4
    )


def test_proposals__nanodet_cannot_start_a_library_backbone(run: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="model.backbone=null"):
        ovd_train.main(
            ["--config", "photos/lite_ovcoco_proposals.yaml", f"out={run}/no", f"weights={trained}/proposals"]
        )


@pytest.mark.parametrize("variant", ["text", "fvlm", "vild", "ensemble"])
def test_variants__train_without_the_novel_word(run: Path, variant: str) -> None:
    folder = trained_once(run, variant)
    card = read_card(folder)
    assert card.classes == ("car",)
    assert not {"dog", "domestic dog", "canine"} & set(card.background_words)
    detector = ovd.Detector.load(folder)
    found = detector.find(np.full((48, 64, 3), 90, np.uint8), ["dog", "car"], threshold=0.0)
    assert len(found) and set(found.class_name) <= {"dog", "car"}
    scorer = detector.model.scorer(np.eye(2, 16, dtype=np.float32), [["dog"], ["car"]], detector.model.background_words)
    assert isinstance(scorer, EnsembleScorer)
    alone = variant in ("text", "vild")
    assert scorer.exponent.tolist() == pytest.approx([1, 1] if alone else [0.1, 2 / 3])


def test_ovcoco__evaluated_on_all_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained_once(run, "ensemble")
    assert ovd_evaluate.main(["--weights", str(folder), "--data", f"coco:{run}/images:{run}/boxes.json"]) == 0
    assert "AP50" in capsys.readouterr().out


def test_offline_regions__have_no_words(run: Path) -> None:
    with pytest.raises(UserError, match="known=false"):
        train(run, "vild", "model.known=true")


@pytest.mark.parametrize(("variant", "regions"), [("text", "{root}/regions"), ("ensemble", "null")])
def test_offline_regions__only_for_variants_that_distil(run: Path, variant: str, regions: str) -> None:
    with pytest.raises(UserError, match="python -m ovd.embed"):
        train(run, variant, "regions=" + regions.format(root=run))


def test_proposals__without_words_cannot_rank_by_them(run: Path) -> None:
    with pytest.raises(UserError, match="ranking words"):
        ovd_train.main(["--config", "photos/lite_ovcoco_proposals.yaml", "model.ranking=words", f"out={run}/x"])


def test_novel_words__withhold_synonyms_and_hyponyms() -> None:
    lexicon = read_lexicon()
    names = novel_names(["dog", "couch"], lexicon)
    assert {"dog", "domestic dog", "golden retriever", "sofa", "sofa bed"} <= names
    assert not {"cat", "animal", "chair", "hot dog"} & names
    with pytest.raises(UserError, match="'no such word'"):
        novel_names(["no such word"], lexicon)


def test_image_head__starts_as_the_tower_and_learns_from_crops_only() -> None:
    torch.manual_seed(0)
    head = FrozenFeatureHead(features=6, words=0, hidden=16, embed_dim=4, dropout=0.0, scale=5.0)
    image_head = ImageHead(features=6, hidden=16, embed_dim=4, dropout=0.0)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.device = nn.Linear(6, 4), torch.device("cpu")

        def embed(self, features: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.proj(features), dim=1).detach()

    tower = Tower()
    model = FvlmDetector(
        proposer=cast(PhotoProposer, None),
        tower=tower,
        head=head,
        reads_words=False,
        image_head=image_head,  # type: ignore[arg-type]
    )
    features, target = torch.randn(5, 6), nn.functional.normalize(torch.randn(5, 4), dim=1)
    torch.testing.assert_close(model.image_embedding(features), tower.embed(features))
    batch = RegionBatch(
        features=torch.randn(2, 6), word_scores=torch.zeros(2, 0), target=torch.zeros(2, 3),
        mask=torch.zeros(2, 3, dtype=torch.bool), offline=OfflineBatch(features=features, target=target),
    )  # fmt: skip
    criterion = WordCriterion(model=model, rows=torch.eye(3, 4), always_labelled=3, noun_weight=1.0, image_weight=0.5)
    losses = criterion(batch)
    expected = 0.5 * float((tower.embed(features) - target).abs().sum(1).mean())
    assert float(losses["loss_image"].detach()) == pytest.approx(expected, rel=1e-5)
    losses["loss_image"].backward()
    assert image_head.projection.weight.grad is not None and bool(image_head.projection.weight.grad.any())
    assert all(p.grad is None for p in head.parameters())


def test_scores__are_vilds_geometric_mean() -> None:
    regions = RegionSet(
        boxes=np.array([[0, 0, 10, 10]], np.float32), objectness=np.array([0.64], np.float32),
        text=np.array([[1, 0, 0]], np.float32), image=np.array([[0, 1, 0]], np.float32), masks=None, size=(20, 20),
        word_scores=None, bias=np.array([-2], np.float32),
    )  # fmt: skip
    scorer = EnsembleScorer(
        rows=np.eye(3, dtype=np.float32)[:2], competitors=np.eye(3, dtype=np.float32),
        competitor_mask=~np.eye(3, dtype=bool)[:2],
        exponent=head_exponents("fvlm", np.array([True, False]), novel=1 / 3), scale=3.0,
        labelled_rows=np.eye(3, dtype=np.float32)[:1], related=np.array([[True], [False]]),
        is_labelled=np.array([True, False]), calibration=Calibration(open_scale=2.0, open_objectness=0.5),
    )  # fmt: skip
    labelled, novel = scorer(regions)[0].tolist()
    text = [1 / (1 + math.exp(2 - 3)), 1 / (1 + math.exp(2))]
    image = [0.8 / (1 + math.e**2 + 1), 0.8 * math.e**2 / (math.e**2 + 2)]
    assert labelled == pytest.approx(text[0] ** (2 / 3) * image[0] ** (1 / 3), rel=1e-4)
    assert novel == pytest.approx(text[1] ** (1 / 3) * image[1] ** (2 / 3), rel=1e-4)
    assert scorer.select([1])(regions)[0].tolist() == pytest.approx([novel])
    unknown = replace(scorer, calibration=replace(scorer.calibration, open_unknown=2.0))
    expected = [labelled, novel * (1 - text[0]) ** 2]  # the head is sure of the labelled word, which contradicts it
    assert unknown(regions)[0].tolist() == pytest.approx(expected, rel=1e-4)
    related = replace(unknown, related=np.array([[True], [True]]))
    assert related(regions)[0].tolist() == pytest.approx([labelled, novel], rel=1e-4)
