# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic proposals: boxes out of cells, who answers for what, and what an untrained network does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from ovd.modeling.proposals.architecture import ARCHITECTURES, Arch, Head
from ovd.modeling.proposals.assign import assign, distribution_focal_loss, quality_focal_loss
from ovd.modeling.proposals.build import (
    PROPOSAL_WORDS,
    PhotoProposer,
    ProposalCard,
    build_from_weights,
    load_proposals,
    read_card,
    save_proposals,
)
from ovd.modeling.proposals.cells import cell_centres, decode
from ovd.modeling.proposals.depthwise import depthwise
from ovd.modeling.proposals.nanodet import NanoDet
from ovd.modeling.proposals.network import ProposalDetector, build_proposal_detector, init_from_converted
from ovd.modeling.proposals.picodet import PicoDet, geometric_mean
from pretrain.engine.checkpoint import save_weights
from pretrain.engine.errors import UserError


@pytest.fixture(scope="module", params=["nanodet", "picodet"])
def arch(request: pytest.FixtureRequest) -> Arch:
    name: Arch = request.param
    return name


@pytest.fixture(scope="module")
def converted(arch: Arch) -> NanoDet | PicoDet:
    """As a converter writes it: random, but with answers that differ from cell to cell."""
    torch.manual_seed(0)
    model = NanoDet().eval() if arch == "nanodet" else PicoDet().eval()
    for head in model.heads:
        weight, _ = cast(Head, head).word_rows()
        torch.nn.init.normal_(weight, std=0.3 if arch == "nanodet" else 30.0)
    return model


@pytest.fixture(scope="module")
def network(arch: Arch, converted: NanoDet | PicoDet) -> ProposalDetector:
    model = build_proposal_detector(
        architecture=ARCHITECTURES[arch], ranking="objectness", nms=0.6, pre_nms=1000, post_nms=100
    )
    init_from_converted(model, converted.state_dict())
    return model


def instances(boxes: list[list[float]], classes: list[int]) -> Instances:
    out = Instances((64, 96))
    out.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    out.gt_classes = torch.tensor(classes)
    return out


def test_box_sides__are_expected_distances_from_the_cell_centre() -> None:
    centres, strides = cell_centres(64, 96, (8, 16, 32))
    assert len(centres) == 8 * 12 + 4 * 6 + 2 * 3
    sides = torch.full((len(centres), 4, 11), -40.0)
    sides[:, :, 2], sides[:, :, 3] = 40.0, 40.0  # halfway between two and three strides
    boxes = decode(sides, centres, strides)
    assert centres[1].tolist() == [12.0, 4.0]
    assert boxes[1].tolist() == pytest.approx([12 - 20, 4 - 20, 12 + 20, 4 + 20])
    assert boxes[-1].tolist() == pytest.approx([80 - 80, 48 - 80, 80 + 80, 48 + 80])


@pytest.mark.parametrize("ranking", ["words", "objectness"])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 160)])
def test_untrained_heads__rank_like_the_converted_network(
    converted: NanoDet | PicoDet,
    network: ProposalDetector,
    size: tuple[int, int],
    ranking: Literal["words", "objectness"],
) -> None:
    network.proposal_generator.ranking = ranking
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    normal = (pixels.float() - network.pixel_mean) / network.pixel_std
    with torch.no_grad():
        cells = converted(normal[None])
        (found,) = network.eval()([{"image": pixels}])
    centres, strides = cell_centres(*size, network.proposal_generator.architecture.strides)
    boxes = decode(cells.sides[0], centres, strides)
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[0])
    words = cells.words[0].sigmoid()
    best = words.amax(dim=1).argmax()
    assert torch.allclose(found.proposal_boxes.tensor[0], boxes[best], atol=1e-3)
    assert torch.allclose(found.words[0], words[best], atol=1e-5)
    assert found.words.shape[1] == len(PROPOSAL_WORDS) == 80


def test_padding__is_black_and_boxes_stay_within_the_picture(network: ProposalDetector) -> None:
    """A picture in a batch with a larger one: its boxes stay within it."""
    pictures = [torch.full((3, *size), 200, dtype=torch.uint8) for size in ((40, 70), (64, 96))]
    with torch.no_grad():
        small, _ = network.eval()([{"image": p} for p in pictures])
    assert small.image_size == (40, 70)
    assert bool((small.proposal_boxes.tensor[:, 2] <= 70).all() & (small.proposal_boxes.tensor[:, 3] <= 40).all())
    images = network.preprocess([{"image": p} for p in pictures])
    black = (0 - network.pixel_mean) / network.pixel_std
    assert torch.allclose(images.tensor[0, :, 63, 95], black.flatten())


def test_assignment__prefers_fit_and_ignores_doubtful_cells() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 4, 4], [30, 30, 40, 40], [60, 60, 70, 70.0]])
    centres = torch.tensor([[5, 5], [5, 5], [2, 2], [35, 35], [65, 65.0]])
    scores = torch.tensor([0.5, 0.5, 0.9, 0.9, 0.9])
    objects, ignored = torch.tensor([[0, 0, 10, 10.0]]), torch.tensor([[30, 30, 40, 38.0]])
    found = assign(boxes, scores, centres, objects, ignored, cells_per_object=2)
    assert found.gt_index.tolist() == [0, 0, -1, -1, -1]
    assert found.target.tolist() == pytest.approx([1.0, 0.9**6, 0, 0, 0])  # the best cell's target is its IoU
    assert found.valid.tolist() == [True, True, True, False, True]


def test_assignment__cell_takes_the_object_of_higher_iou() -> None:
    boxes, centres = torch.tensor([[0, 0, 10, 10.0]]), torch.tensor([[5, 5.0]])
    objects = torch.tensor([[0, 0, 20, 10], [0, 0, 10, 12.0]])
    found = assign(boxes, torch.tensor([0.5]), centres, objects, torch.zeros(0, 4))
    assert found.gt_index.tolist() == [1]
    assert found.target.tolist() == pytest.approx([10 / 12])


def test_proposal_losses__are_least_at_their_targets() -> None:
    logits = torch.linspace(-4, 4, 81)
    loss = quality_focal_loss(logits, torch.full_like(logits, 0.7))
    assert float(logits[loss.argmin()].sigmoid()) == pytest.approx(0.7, abs=0.02)
    wanted = torch.tensor([[2.25, 0.0, 3.0, 25.0]])
    sides = torch.log(torch.tensor([0.0, 0.0, 0.75, 0.25, *[0.0] * 7]) + 1e-9).expand(1, 4, 11)
    own = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    each = torch.stack([distribution_focal_loss(sides[:, i : i + 1], wanted[:, i : i + 1]) for i in range(4)]).flatten()
    assert float(each[0]) == pytest.approx(float(own), abs=1e-4)
    assert float(each[2]) == pytest.approx(-float(torch.tensor(0.25).log()), abs=1e-4)
    assert bool(each.isfinite().all())


def test_background__trains_only_objectness_and_words_never_change(network: ProposalDetector) -> None:
    network.train()
    network.backbone.freeze()
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)

    def gradients(truth: Instances) -> dict[str, float]:
        network.zero_grad()
        sum(network([{"image": pixels, "instances": truth}]).values()).backward()
        return {n: float(p.grad.abs().sum()) for n, p in network.named_parameters() if p.grad is not None}

    nothing = gradients(instances([], []))
    something = gradients(instances([[8.0, 8.0, 60.0, 50.0]], [0]))
    sides = "proposal_generator.nameless.{}.sides.weight"
    assert all(nothing[sides.format(n)] == 0 for n in range(3))
    assert any(something[sides.format(n)] > 0 for n in range(3))
    assert any(nothing[f"proposal_generator.nameless.{n}.scores.weight"] > 0 for n in range(3))
    assert not [n for n in something if n.startswith(("backbone.", "proposal_generator.heads."))]


def test_loss__doubtful_boxes_are_ignored(network: ProposalDetector) -> None:
    """All that the network boxes now, declared doubtful: no cell is background any more."""
    network.train()
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        maps = network.backbone(network.preprocess([{"image": pixels}]).tensor)
        centres, strides = cell_centres(64, 96, network.proposal_generator.architecture.strides)
        answer = torch.cat(
            [
                head(x).flatten(2).transpose(1, 2)
                for head, x in zip(network.proposal_generator.nameless, maps.values(), strict=True)
            ],
            dim=1,
        )
        boxes = decode(answer[0, :, 2:].unflatten(1, (4, -1)), centres, strides)
    everything = instances(boxes.tolist(), [-1] * len(boxes))
    losses = network([{"image": pixels, "instances": everything}])
    assert float(sum(losses.values()).detach()) == 0.0


def test_proposal_export__loads_again_with_boxes_in_pixels_of_the_picture(
    arch: Arch, network: ProposalDetector, tmp_path: Path
) -> None:
    card = ProposalCard(model={"arch": arch, "post_nms": 7}, sides=(96,))
    save_proposals(tmp_path, network, card)
    assert read_card(tmp_path) == card
    proposer = load_proposals(tmp_path, precision=torch.float32)
    picture = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    found = proposer.regions(picture)
    assert len(found.boxes) == 7 and found.words.shape == (7, 80)
    assert bool((found.objectness.diff() <= 0).all())
    own = PhotoProposer(model=network, sides=(96,), precision=torch.float32)
    small = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), (64, 96), mode="area")
    (direct,) = network.eval()([{"image": small[0].round().to(torch.uint8)}])
    assert torch.allclose(own.regions(picture).boxes[:5], 2 * direct.proposal_boxes.tensor[:5], atol=2.0)


def test_proposal_weights__others_are_refused(arch: Arch, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_weights(file, {"x": torch.zeros(1)}, {"format": "backbone/1"})
    from ovd.config_proposals import ProposalNetworkConfig

    with pytest.raises(UserError, match=f"convert_{arch}"):
        build_from_weights(file, ProposalNetworkConfig(arch=arch))


def test_proposal_training__trains_exports_and_the_export_proposes(
    arch: Arch, converted: NanoDet | PicoDet, tmp_path: Path
) -> None:
    import json

    import cv2

    from ovd.modeling.load import load_proposer
    from ovd.train import main

    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 64}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 50, 40], "score": 0.9}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(truth))
    save_weights(tmp_path / "converted.safetensors", converted.state_dict(), {"format": f"{arch}/1"})
    arguments = ["--config", "photos/lite_proposals.yaml", f"out={tmp_path / 'run'}", "optim.warmup_steps=1"]
    arguments += [f"weights={tmp_path / 'converted.safetensors'}", f"data.images={tmp_path}", "data.part=null"]
    arguments += [
        f"data.annotations=[{tmp_path / 'boxes.json'}]",
        "data.side=96",
        "loop.steps=2",
        "loop.batch_size=2",
        "sides=[96]",
        f"model.arch={arch}",
    ]
    assert main(arguments) == 0
    exported = tmp_path / "run/exported"
    assert main([*arguments, "loop.steps=2", f"weights={exported}", f"out={tmp_path / 'next'}"]) == 0
    picture = np.zeros((128, 192, 3), dtype=np.uint8)
    boxes, scores = load_proposer(exported).propose(picture, top=5)
    assert len(np.asarray(boxes)) == len(np.asarray(scores)) <= 5


def test_geometric_mean__is_exact_and_finite_at_the_ends() -> None:
    one, other = (x.flatten() for x in torch.meshgrid(*[torch.tensor([-90.0, -9, -1, 0, 2, 8])] * 2, indexing="ij"))
    expected = (one.double().sigmoid() * other.double().sigmoid()).sqrt()
    logit = geometric_mean(one, other)
    assert torch.allclose(logit.double().sigmoid(), expected, rtol=1e-5, atol=1e-30)
    for end in (-200.0, 200.0):
        assert bool(geometric_mean(torch.tensor(end), torch.tensor(end)).isfinite())


@pytest.mark.parametrize("size", [(32, 32), (32, 160), (96, 64), (160, 96)])
def test_cells__every_level_has_as_many_as_its_map(size: tuple[int, int]) -> None:
    """Also where the coarsest stride does not divide the picture."""
    for architecture in ARCHITECTURES.values():
        with torch.no_grad():
            maps = architecture.trunk().eval()(torch.zeros(1, 3, *size))
        counts = [x.shape[2] * x.shape[3] for x in maps]
        _, strides = cell_centres(*size, architecture.strides)
        assert counts == [int((strides == stride).sum()) for stride in architecture.strides]
        assert {x.shape[1] for x in maps} == {architecture.channels}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_depthwise__gradients_are_those_of_the_plain_convolution(stride: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 6, 5, stride=stride, padding=2, groups=6)
    x = torch.randn(2, 6, 12, 16, requires_grad=True)
    inputs = [x, *conv.parameters()]
    expected = torch.autograd.grad(conv(x).square().sum(), inputs)
    with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
        gradients = torch.autograd.grad(depthwise(x, conv).float().square().sum(), inputs)
    for gradient, right in zip(gradients, expected, strict=True):
        assert gradient.dtype == right.dtype
        error = (gradient - right).abs().max() / right.abs().max()
        assert error < (1e-5 if precision is torch.float32 else 0.02)
