# SPDX-License-Identifier: Apache-2.0
"""Forward passes on a GPU, pretended: nothing that is trained or served mixes tensors of two devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from ovd.config_fvlm import ConseConfig, FvlmConfig, QualityConfig
from ovd.data.mosaic import FinetuneSample
from ovd.data.pooled import BoxBatch, OfflineBatch, RegionBatch
from ovd.data.splits import Split
from ovd.detector import Detector
from ovd.evaluation.predictor import predictor_for
from ovd.evaluation.scene_calibration import typed_scenes
from ovd.evaluation.typed import run_typed
from ovd.inference.crop_classifier import CropClassifier, DetectorBoxes
from ovd.inference.detr_regions import OpenVocabularyDetr
from ovd.inference.fvlm_regions import FvlmRegionModel
from ovd.inference.fvlm_torch import TorchNetwork
from ovd.inference.known_words import WordList
from ovd.inference.rcnn_regions import RCNNRegionModel
from ovd.inference.scorers import CalibratedScorer
from ovd.inference.scoring import Calibration
from ovd.inference.strategies import CropEmbeddings
from ovd.modeling.detr.build import init_projections
from ovd.modeling.export import DetectorCard
from ovd.modeling.fvlm.conse import RegionConse
from ovd.modeling.fvlm.criterion import WordCriterion
from ovd.modeling.fvlm.network import build_fvlm
from ovd.modeling.proposals.architecture import ARCHITECTURES
from ovd.modeling.proposals.build import PROPOSAL_WORDS, PhotoProposals, PhotoProposer
from ovd.modeling.proposals.classes import ClassBranch
from ovd.modeling.proposals.nanodet import CHANNELS
from ovd.modeling.proposals.network import ProposalDetector, build_proposal_detector
from ovd.modeling.proposals.pyramid import FrozenPyramid
from ovd.regions.crops import embed_regions
from pretrain.config import CbowTower, EncoderConfig, ResNetTower
from pretrain.config_photos import TimmTower
from pretrain.config_views import InputSpec
from pretrain.data.lexicon import read_lexicon
from pretrain.data.stickers import Stickers
from pretrain.engine.loop import PRECISIONS
from pretrain.evaluate import embed_words
from pretrain.evaluation.features import features
from pretrain.evaluation.knn import accuracy, knn
from pretrain.health import Monitored
from pretrain.methods.build import build_method
from pretrain.methods.clip import Clip
from pretrain.nets.towers import JointEncoder, build_encoder
from tests.modeling import test_rcnn as rcnn
from tests.pretend_cuda import Mixed, pretend_cuda, to_cuda
from tests.ssl.small import backbone
from tests.ssl.ssl_cases import METHODS, section
from tests.updetr import small as detr
from tests.updetr.test_detr import region_tower
from tests.updetr.test_pretext import task as pretext_task

NAMES = tuple("abcde")


def picture(side: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def card(variant: str, classes: tuple[str, ...] = NAMES) -> DetectorCard:
    return DetectorCard(
        model={"variant": variant, "head": {"scale": 10.0}}, embed_dim=rcnn.D, pixel_mean=(127.5,) * 3,
        pixel_std=(64.0,) * 3, encoder="toy", encoder_fingerprint="0", short_side=96, long_side=192,
        classes=classes, novel=(), background_words=("a", "b"), calibration=Calibration().record(), config_hash="0",
    )  # fmt: skip


def small_encoder(dim: int = 8) -> JointEncoder:
    text = CbowTower(width=16, hidden=16, context_length=8)
    return build_encoder(EncoderConfig(embed_dim=dim, image=ResNetTower(image_size=32), text=text))


def precision(name: str) -> torch.autocast:
    """Autocast as the loop sets it on a GPU."""
    return torch.autocast("cuda", PRECISIONS[name], enabled=name != "fp32")


# --- the pretence: what a GPU refuses, and what it allows


def test_pretence__refuses_what_a_gpu_refuses() -> None:
    with pretend_cuda():
        on = torch.ones(3, device="cuda:0")
        with pytest.raises(Mixed, match=r"aten\.add"):
            on + torch.ones(3)
        with pytest.raises(Mixed):
            torch.cat([on, torch.ones(3)])
        with pytest.raises(Mixed):
            nn.Linear(3, 2)(on)
        with pytest.raises(Mixed):
            torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda:0")]
        with pytest.raises(RuntimeError, match="numpy"):
            on.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda:0", generator=torch.Generator())


def test_pretence__allows_what_a_gpu_allows_and_computes_it() -> None:
    with pretend_cuda():
        on = torch.tensor([1.0, 2.0, 3.0], device="cuda:0")
        assert on.device.type == "cuda" and (on * 2 + torch.tensor(1.0)).tolist() == [3.0, 5.0, 7.0]
        assert on[torch.tensor([2, 0])].cpu().numpy().tolist() == [3.0, 1.0]
        on[0] = 7
        on.add_(1)
        assert float(on.max()) == 8.0 and (on > 3.5).nonzero().tolist() == [[0], [2]]
        on.copy_(torch.zeros(3))
        assert on.sum().item() == 0.0 and torch.ones(2).to(on).device.type == "cuda"
        assert to_cuda(nn.Linear(3, 2))(on).device.type == "cuda"
        with precision("fp16"):
            assert (torch.ones(2, 3, device="cuda:0") @ on.view(3, 1)).dtype == torch.float16


# --- pretraining


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_self_supervised__steps_and_panel_stay_on_the_gpu(name: str, kind: str) -> None:
    task = Monitored(build_method(section(name), batch_size=8, device=torch.device("cpu")))
    with pretend_cuda():
        to_cuda(task).train()
        for step in range(3):  # queues fill, prototypes thaw
            views = [torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8).to("cuda:0") for _ in range(2)]
            with precision(kind):
                loss, _ = task({"views": views})
            task.after_step(step, 10)
            assert loss.device.type == "cuda" and loss.dtype == torch.float32 and bool(torch.isfinite(loss))
        assert all(np.isfinite(value) for value in task.report()[0].values())


@pytest.mark.parametrize("name", METHODS)
def test_self_supervised__gradients_in_bf16_are_finite(name: str) -> None:
    torch.manual_seed(0)
    views = [{"size": 64, "count": 2}]
    task = build_method(section(name, views=views), batch_size=8, device=torch.device("cpu")).train()
    batch = {"views": [torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8) for _ in range(2)]}
    with torch.autocast("cpu", PRECISIONS["bf16"]):
        loss, _ = task(batch)
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss))
    loss.backward()
    gradients = {key: p.grad for key, p in task.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    assert {key for key, _ in task.backbone.named_parameters(prefix="backbone")} <= set(gradients)  # type: ignore[operator, union-attr]
    assert float(gradients["backbone.conv1.weight"].abs().max()) > 0


def test_clip__trains_on_the_gpu_from_pictures_and_captions_of_the_loader() -> None:
    encoder = small_encoder()
    with pretend_cuda():
        task = to_cuda(Monitored(Clip(encoder=encoder, names=["dog", "cat", "mug", "bee"]))).train()
        image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8).to("cuda:0")
        words = {"caption": ["a dog", "a cat", "a mug", "a dog"], "class_id": torch.arange(4).to("cuda:0")}
        loss, _ = task({"image": image, **words})
        assert loss.device.type == "cuda"
        assert all(np.isfinite(value) for value in task.report()[0].values())


def test_probe__neighbours_are_found_on_the_gpu() -> None:
    pictures = SimpleNamespace(image=lambda index: picture(16) // (1 + index % 2))
    normalise = InputSpec(16, (0.5,) * 3, (0.25,) * 3)
    with pretend_cuda():
        rows = features(to_cuda(backbone()), pictures, range(6), normalise)  # type: ignore[arg-type]
        scores = knn(rows, rows, torch.arange(6) % 2, classes=2, k=3)
        assert scores.device.type == "cuda" and accuracy(scores, torch.arange(6) % 2) == 1.0


def test_clip__is_evaluated_on_the_gpu() -> None:
    encoder = small_encoder().eval()
    plain = embed_words(encoder, ["dog", "cat"], ("a {}", "{}"))
    with pretend_cuda():
        torch.testing.assert_close(embed_words(to_cuda(encoder), ["dog", "cat"], ("a {}", "{}")), plain)


# --- detection


@pytest.mark.parametrize("kind", [rcnn.C4, rcnn.FPN, rcnn.DETAIL], ids=["c4", "fpn", "detail"])
@pytest.mark.parametrize("variant", ["agnostic", "text", "image", "vild", "ensemble"])
def test_vild__losses_and_regions_are_computed_on_the_gpu(variant: str, kind: dict[str, Any]) -> None:
    model = rcnn.make(variant, kind, novel=(3,))
    with pretend_cuda():
        to_cuda(model).train()
        with precision("bf16"):
            losses = model(rcnn.batch(label=0 if variant in ("agnostic", "image") else 1))
        assert all(value.device.type == "cuda" and value.dtype == torch.float32 for value in losses.values())
        found = model.eval()([{"image": torch.from_numpy(picture()).permute(2, 0, 1)}])[0]
        assert found.boxes.device.type == "cuda"


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("options", [{}, {"denoising": 2}, {"denoising": 1, "conditioned": 2}])
def test_transformer__losses_and_detections_are_computed_on_the_gpu(options: dict[str, Any], tower: bool) -> None:
    model = detr.make(novel=(4,), region_tower=region_tower() if tower else None, **options)
    batch = [detr.picture(64, 96, [[8, 8, 40, 40], [50, 20, 90, 60]], [0, 2]), detr.picture(64, 64, [], [])]
    with pretend_cuda():
        to_cuda(model).train()
        for kind in ("fp32", "bf16", "fp16"):
            with precision(kind):
                losses = model(batch)
            assert all(value.device.type == "cuda" and value.dtype == torch.float32 for value in losses.values())
        assert model.eval()(batch)[0]["instances"].scores.device.type == "cuda"


@pytest.mark.parametrize("arch", ["detr", "conditional"])
def test_transformer__of_a_closed_list_trains_on_the_gpu(arch: str) -> None:
    model = detr.make(arch, variant="closed")
    with pretend_cuda():
        to_cuda(model).train()
        losses = model([detr.picture(64, 96, [[8, 8, 40, 40]], [3])])
        assert all(value.device.type == "cuda" for value in losses.values())


@pytest.mark.parametrize("denoising", [0, 2])
def test_pretext__finds_patches_on_the_gpu(denoising: int) -> None:
    task, batch = pretext_task(), detr.patch_batch(2, 3)
    task.detr.denoising.groups = denoising
    with pretend_cuda():
        to_cuda(task).train()
        with precision("bf16"):
            loss, _ = task(batch)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        assert 0 <= task.measure([batch])["patch_miou"] <= 1
        maps = task.detr.maps_of(batch)[0]["res4"]
        tokens, patches = maps.flatten(2).transpose(1, 2).flatten(0, 1), task.patch_embeddings(batch).flatten(0, 1)
        assert "the same map" in init_projections(task.detr, tokens_SC=tokens, embeddings_PD=patches)


# --- queries


def small_detector(crop_refinement: int) -> Detector:
    torch.manual_seed(0)
    encoder = small_encoder(rcnn.D).eval()
    model = RCNNRegionModel(
        model=rcnn.make("vild").eval(), card=card("vild"), background_words=torch.randn(4, rcnn.D).numpy()
    )
    return Detector(model=model, encoder=encoder, crop_refinement=crop_refinement)


def move(detector: Detector) -> None:
    to_cuda(detector.model.model)  # type: ignore[attr-defined]
    to_cuda(detector.text.encoder)  # type: ignore[arg-type]


@pytest.mark.parametrize("crop_refinement", [0, 5])
def test_detector__words_and_crops_are_answered_beside_a_gpu(crop_refinement: int) -> None:
    detector = small_detector(crop_refinement)
    plain = detector.find(picture(), "dog, -cat", examples={"this": picture(24)}, threshold=0.0)
    detector = small_detector(crop_refinement)
    with pretend_cuda():
        move(detector)
        found = detector.find(picture(), "dog, -cat", examples={"this": picture(24)}, threshold=0.0)
    assert found.class_name == plain.class_name
    np.testing.assert_allclose(found.xyxy, plain.xyxy, atol=1e-3)


@pytest.mark.parametrize("scores", ["published", "calibrated"])
def test_evaluation__names_regions_of_a_gpu(scores: Any) -> None:
    detector = small_detector(3)
    split = Split.everything({i + 1: name for i, name in enumerate(NAMES)})
    with pretend_cuda():
        move(detector)
        predict = predictor_for(detector, split, scores=scores, limit=5)
        assert len(predict(picture(), 1)) == 5 and predict.propose(picture(), 1)
        crops = CropEmbeddings(model=detector.model, encoder=detector.text.encoder)  # type: ignore[arg-type]
        assert len(predictor_for(detector.with_model(crops), split, scores=scores, limit=5)(picture(32), 1)) == 5


def test_another_encoder__names_crops_of_boxes_beside_a_gpu() -> None:
    detector = small_detector(0)
    lexicon = read_lexicon()
    names = CropClassifier(
        source=DetectorBoxes(model=detector.model),
        encoder=detector.text.encoder,  # type: ignore[arg-type]
        name="small",
        background_words=torch.randn(2, rcnn.D).numpy(),
        words=WordList(words=("cat", "car"), lexicon=lexicon),
        proposal_words=WordList(words=(), lexicon=lexicon),
        calibration=Calibration(),
        calibrated=False,
    )
    plain = detector.with_model(names).find(picture(), "dog, -cat", threshold=0.0)
    with pretend_cuda():
        move(detector)
        found = detector.with_model(names).find(picture(), "dog, -cat", threshold=0.0)
    np.testing.assert_allclose(found.confidence, plain.confidence, atol=1e-4)


def test_calibration__is_fitted_to_regions_of_a_gpu() -> None:
    detector, stickers = small_detector(3), Stickers.load()
    rows = torch.randn(len(stickers.nouns), rcnn.D).numpy()
    with pretend_cuda():
        move(detector)
        scenes = typed_scenes(detector, stickers, seed=1, count=2, size=96, base_only=True)
        scorer = CalibratedScorer(
            rows=rows,
            background_words=detector.model.background_words,
            background=detector.model.background,
            calibration=Calibration(),
        )
        run_typed(scenes, scorer, floor=0.0)


def test_devices__regions_of_a_store_are_embedded_on_a_gpu() -> None:
    encoder = small_encoder().eval()
    boxes = np.array([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 90.0, 80.0]])
    plain = embed_regions(encoder, picture(), boxes)
    with pretend_cuda():
        torch.testing.assert_close(embed_regions(to_cuda(encoder), picture(), boxes), plain)  # type: ignore[arg-type]


def test_transformer__answers_words_and_crops_beside_a_gpu() -> None:
    model = detr.make(region_tower=region_tower(), conditioned=2).eval()
    regions = OpenVocabularyDetr(model=model, card=card("text"), background_words=torch.randn(4, detr.D).numpy())
    with pretend_cuda():
        to_cuda(model)
        assert len(regions.regions(picture())) == model.queries
        assert regions.propose(picture(), top=3)[0].shape == (3, 4)
        rows = torch.randn(3, detr.D).numpy()
        assert isinstance(regions.conditioned_queries(picture(), rows, classes_per_pass=2).boxes, np.ndarray)


# --- photographs


def photo_encoder() -> JointEncoder:
    torch.manual_seed(0)
    return build_encoder(
        EncoderConfig(
            embed_dim=8,
            image=TimmTower(kind="timm", name="tf_efficientnet_lite0", image_size=64),
            text=CbowTower(kind="cbow", width=16, hidden=16, context_length=8),
        )
    ).eval()


def proposed_on_gpu(model: ProposalDetector) -> PhotoProposals:
    """Its boxes in a picture, after a step on the GPU."""
    with pretend_cuda():
        to_cuda(model)
        losses = model.train()(rcnn.batch(label=0, regions=False))
        assert all(loss.device.type == "cuda" for loss in losses.values())
        found = PhotoProposer(model=model, sides=(64,), precision=torch.float32).regions(picture(), top=10)
        assert found.boxes.device.type == "cpu"
    return found


def test_proposals__losses_and_boxes_are_computed_on_the_gpu() -> None:
    proposed_on_gpu(build_proposal_detector(ranking="objectness", nms=0.6, pre_nms=100, post_nms=20))


def test_proposals_of_a_pyramid__losses_and_boxes_are_computed_on_the_gpu() -> None:
    torch.manual_seed(0)
    backbone = FrozenPyramid("timm:tf_efficientnet_lite0", channels=CHANNELS)
    model = build_proposal_detector(
        ranking="both", nms=0.6, pre_nms=100, post_nms=20, backbone=backbone, pixel_mean=(127.0,) * 3
    )
    assert proposed_on_gpu(model).words.shape[1] == 0


def test_finetuned_classes__losses_and_boxes_are_computed_on_the_gpu() -> None:
    branch = ClassBranch(ARCHITECTURES["nanodet"], classes=2)
    image = torch.from_numpy(picture().transpose(2, 0, 1).copy())
    canvas = FinetuneSample(
        image=image, boxes=torch.tensor([[4.0, 4.0, 60.0, 60.0], [0.0, 0.0, 9.0, 9.0]]), classes=torch.tensor([1, -1])
    )
    with pretend_cuda():
        to_cuda(branch)
        losses = branch.train()([canvas, canvas])
        assert all(loss.device.type == "cuda" and bool(torch.isfinite(loss)) for loss in losses.values())
        boxes = branch.eval().detect(picture(), side=64, nms=0.6, top=10).boxes
        assert 0 < len(boxes) <= 10


def test_photographs__regions_are_embedded_on_the_gpu() -> None:
    encoder = photo_encoder()
    config = FvlmConfig(arch="fvlm", side=64, quality=QualityConfig(hidden=8))
    network = build_proposal_detector(ranking="words", nms=0.6, pre_nms=100, post_nms=20)
    with pretend_cuda():
        proposer = PhotoProposer(model=to_cuda(network), sides=(64,), precision=torch.float32)
        conse = RegionConse(ConseConfig(name="tf_efficientnet_lite0", side=64), embed_dim=8)
        detector = build_fvlm(config, proposer=proposer, encoder=encoder, conse=to_cuda(conse)).eval()
        to_cuda(detector.tower)
        to_cuda(detector)
        assert detector.quality is not None
        to_cuda(detector.quality)
        words = WordList(words=PROPOSAL_WORDS, lexicon=read_lexicon())
        model = FvlmRegionModel(
            network=TorchNetwork(detector),
            card=card("text"),
            background_words=np.eye(8, dtype=np.float32)[:5],
            proposal_words=words,
            training_words=words,
            top=10,
        )
        regions = model.regions(picture())
        assert isinstance(regions.text, np.ndarray) and regions.text.shape == (len(regions), 8)
        assert regions.conse is not None and regions.conse().shape == (len(regions), 8)
        assert regions.quality is not None and regions.quality.shape == (len(regions),)


def test_localization_quality__is_learned_on_the_gpu() -> None:
    """The head is trained there; the frozen tower, whose features are cached, stays on the CPU."""
    network = build_proposal_detector(ranking="words", nms=0.6, pre_nms=100, post_nms=20)
    detector = build_fvlm(
        FvlmConfig(arch="fvlm", side=64, quality=QualityConfig(hidden=8)),
        proposer=PhotoProposer(model=network, sides=(64,), precision=torch.float32),
        encoder=photo_encoder(),
    )
    criterion = WordCriterion(model=detector, rows=torch.eye(3, 8), always_labelled=2, noun_weight=0.1).train()
    batch = RegionBatch(
        features=torch.randn(4, detector.tower.features),
        word_scores=torch.rand(4, len(PROPOSAL_WORDS)),
        target=torch.rand(4, 3),
        mask=torch.ones(4, 3, dtype=torch.bool),
        boxes=BoxBatch(boxes=torch.rand(4, 4), sizes=torch.ones(4, 2), quality=torch.rand(4)),
    )
    with pretend_cuda():
        to_cuda(criterion)
        losses = criterion(batch)
        assert set(losses) == {"loss_words", "loss_quality"}
        assert all(loss.device.type == "cuda" and bool(torch.isfinite(loss)) for loss in losses.values())


@pytest.mark.parametrize("variant", ["vild", "ensemble"])
def test_photographs__crops_are_distilled_on_the_gpu(variant: Literal["vild", "ensemble"]) -> None:
    """The heads are trained there; the frozen tower, whose features are cached, stays on the CPU."""
    encoder = photo_encoder()
    network = build_proposal_detector(ranking="objectness", nms=0.6, pre_nms=100, post_nms=20)
    detector = build_fvlm(
        FvlmConfig(arch="fvlm", side=64, variant=variant, known=False),
        proposer=PhotoProposer(model=network, sides=(64,), precision=torch.float32),
        encoder=encoder,
    )
    criterion = WordCriterion(
        model=detector, rows=torch.eye(3, 8), always_labelled=2, noun_weight=0.1, image_weight=0.5
    ).train()
    pooled = torch.randn(4, detector.tower.features)
    batch = RegionBatch(
        features=pooled,
        word_scores=torch.zeros(4, 0),
        target=torch.rand(4, 3),
        mask=torch.ones(4, 3, dtype=torch.bool),
        offline=OfflineBatch(features=pooled, target=torch.eye(4, 8)),
    )
    with pretend_cuda():
        to_cuda(criterion)
        losses = criterion(batch)
        assert set(losses) == {"loss_words", "loss_image"}
        assert all(loss.device.type == "cuda" and bool(torch.isfinite(loss)) for loss in losses.values())
