# SPDX-License-Identifier: Apache-2.0
"""Classes that were added by fine-tuning are exported too, and found by both runtimes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from ovd.detector import Detector
from ovd.export import export
from ovd.inference.fvlm_regions import FvlmRegionModel
from ovd.inference.fvlm_torch import TorchNetwork
from ovd.modeling.export import read_card, write_card
from ovd.modeling.fvlm.finetuned import load_finetuned, save_branch
from ovd.modeling.proposals.architecture import ARCHITECTURES, Head
from ovd.modeling.proposals.build import load_proposals
from ovd.modeling.proposals.classes import ClassBranch
from ovd.runtime.choice import Runtime, export_for
from ovd.runtime.files import EXPORT_FOLDER, INT8_FOLDER, branch_graph
from ovd.weights import detector_folder
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError
from tests.runtime.conftest import PHOTOS
from tests.runtime.test_int8 import overlap
from tests.runtime.test_runtimes import partners, without_torch

RUNTIMES: tuple[Runtime, Runtime] = ("onnx", "onnx-int8")
BRANCHES = (("comb", "zorp", "beak"), ("Comb", "perch"))  # the second takes the comb over


def branch(classes: int, seed: int) -> ClassBranch:
    """A copy of the proposal network with random classes, each of which is somewhere."""
    torch.manual_seed(seed)
    network = ClassBranch(ARCHITECTURES["picodet"], classes=classes)
    network.init_from(load_proposals(detector_folder("default") / "proposals", precision=torch.float32).model)
    for head in network.heads:
        weight, bias = cast(Head, head).word_rows()
        nn.init.normal_(weight, std=0.02)
        nn.init.constant_(bias, -1.0)
    return network


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped default with two branches of untrained classes, and its export beside them."""
    folder = tmp_path_factory.mktemp("tuned") / "mine"
    shutil.copytree(detector_folder("default"), folder, ignore=shutil.ignore_patterns(EXPORT_FOLDER))
    own = tuple(
        replace(
            save_branch(folder, branch(len(names), n), number=n, names=names, side=256 + 64 * n, nms=0.6, top=100),
            slope=0.9,
            offset=0.2 * n,
        )
        for n, names in enumerate(BRANCHES, start=1)
    )
    write_card(folder, replace(read_card(folder), finetuned=own))
    export(folder)
    return folder


def test_finetuned_classes__equal_in_both_runtimes(tuned: Path, by_torch: Detector) -> None:
    model = by_torch.model
    assert isinstance(model, FvlmRegionModel) and isinstance(model.network, TorchNetwork)
    finetuned = load_finetuned(tuned, read_card(tuned).finetuned, lexicon=read_lexicon(), precision=torch.float32)
    assert finetuned is not None
    with_finetuned = FvlmRegionModel(
        network=TorchNetwork(model.network.model, finetuned=finetuned),
        card=model.card,
        background_words=model.background_words,
        proposal_words=model.proposal_words,
        training_words=model.training_words,
        finetuned=finetuned.names,
    )
    one, other = by_torch.with_model(with_finetuned), Detector.load(tuned, runtime="onnx")
    found, seen = [], set()
    for photo in PHOTOS[:3]:
        a, b = (detector.find(photo, "comb, zorp, beak, perch, bird, dog", threshold=0.1) for detector in (one, other))
        assert a.notices == b.notices
        np.testing.assert_allclose(b.best, a.best, atol=0.005)
        found += [*partners(a, b), *partners(b, a)]
        seen |= {*a.class_name}
    assert len(found) > 40 and np.mean(found) >= 0.99
    assert {"comb", "zorp", "perch"} <= seen


def test_finetuned_classes__int8_equals_float32(tuned: Path, tmp_path: Path) -> None:
    """Ranges of other photos than are asked; a box moves and is scored by little."""
    for photo in PHOTOS[3:]:
        shutil.copy(photo, tmp_path)
    export(tuned, tuned / INT8_FOLDER, int8=True, photos=tmp_path)
    for own in read_card(tuned).finetuned:
        exact, small = (tuned / folder / branch_graph(own) for folder in (EXPORT_FOLDER, INT8_FOLDER))
        assert small.read_bytes() == exact.read_bytes()  # they have hard-swish
    one, other = (Detector.load(tuned, runtime=runtime) for runtime in RUNTIMES)
    found, seen = [], set()
    for photo in PHOTOS[:3]:
        sure, all_of = (detector.find(photo, "comb, zorp, beak, perch", threshold=level)
                        for detector, level in ((one, 0.4), (other, 0.2)))  # fmt: skip
        for box, score, name in zip(sure.xyxy, sure.confidence, sure.class_name, strict=True):
            same = np.array([x == name for x in all_of.class_name], dtype=bool)
            near = np.abs(all_of.confidence - score) < 0.2
            found.append(bool((same & near & (overlap(box, all_of.xyxy) > 0.5)).any()))
        seen |= {*sure.class_name}
    assert len(found) > 20 and np.mean(found) >= 0.75
    assert {"comb", "zorp", "perch"} <= seen


def test_other_words__unchanged_by_finetuned_classes(tuned: Path, by_onnx: Detector) -> None:
    words = "chicken, dog, mug: cup, wheel"
    plain, beside = (detector.find(PHOTOS[0], words) for detector in (by_onnx, Detector.load(tuned, runtime="onnx")))
    np.testing.assert_array_equal(beside.xyxy, plain.xyxy)
    np.testing.assert_allclose(beside.confidence, plain.confidence, atol=1e-6)


def test_finetuned_classes__without_torch(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = without_torch(
        "predict", str(PHOTOS[0]), "--classes", "zorp", "--weights", str(tuned / EXPORT_FOLDER), "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "results.json").read_text())) > 0


def test_finetuned_export__of_other_branches_is_not_run(tuned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tuned, tmp_path / "mine")
    card = read_card(folder)
    assert export_for(folder, card, runtime="onnx", device="cpu") == folder / EXPORT_FOLDER
    write_card(folder, replace(card, finetuned=card.finetuned[:1]))
    with pytest.raises(UserError, match="exported from other weights than those beside it"):
        Detector.load(folder, runtime="onnx")
    write_card(folder, card)
    (folder / card.finetuned[0].file).write_bytes((folder / card.finetuned[1].file).read_bytes())
    with pytest.raises(UserError, match="exported from other weights than those beside it"):
        Detector.load(folder, runtime="onnx")
