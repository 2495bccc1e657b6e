# SPDX-License-Identifier: Apache-2.0
"""The published recipes load, fit together, and train a step on COCO- and LVIS-shaped folders with an open_clip model.

Only sizes are reduced for the step: a ResNet-50 on 256 pictures of 1024 pixels is no test for two cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ovd import embed, train
from ovd.config import TrainConfig
from ovd.data.lvis import split_of
from ovd.data.splits import COCO_NAMES
from ovd.embed import EmbedConfig
from ovd.training import inputs
from ovd.vocabulary import TEMPLATE_SETS, TEMPLATES_63, fill_template
from pretrain.engine.config import load_config

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SMALLER = [
    "model.backbone.depth=18", "model.backbone.fpn_channels=16", "model.head.conv_dims=[16]", "model.head.fc_dims=[16]",
    "model.head.mask_dims=[16, 16]", "model.head.batch_per_image=16", "model.proposals.post_nms=[50, 50]",
    "data.short_side=96", "data.long_side=96", "data.crop=96", "data.scale=[0.8, 1.5]", "loop.batch_size=2",
    "loop.workers=0", "loop.device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("name", ["lvis", "coco"])
def test_paper_configs__are_the_published_recipes_and_their_stages_fit_together(name: str) -> None:
    proposer = load_config(TrainConfig, PAPER / f"mask_rcnn_{name}.yaml")
    store = load_config(EmbedConfig, PAPER / f"embed_{name}.yaml")
    vild = load_config(TrainConfig, PAPER / f"vild_{name}.yaml")
    assert store.proposer == f"{proposer.out}/exported" and vild.regions == store.out
    assert proposer.encoder == store.encoder == vild.encoder
    assert (store.pictures.images, store.pictures.annotations) == (vild.data.images, vild.data.annotations)
    assert vild.regions_per_image == store.proposals_per_image == 300
    assert proposer.model.variant == "agnostic" and vild.model.variant == "vild"
    assert vild.data == proposer.data and vild.data.labels == "base"
    assert (vild.loop.batch_size, vild.optim.lr, vild.optim.weight_decay) == (256, 0.32, 4e-5)
    assert [m / vild.loop.steps for m in vild.optim.milestones] == [0.9, 0.95]


def test_prompts__of_vild_are_filled_as_in_its_code() -> None:
    for raw, prepared in zip(TEMPLATES_63, TEMPLATE_SETS["vild63"], strict=True):
        assert fill_template(prepared, "traffic_light") == fill_template(raw, "traffic_light", this_is=True)
    assert "This is a photo of an apple." in {fill_template(t, "apple") for t in TEMPLATE_SETS["vild63"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with COCO and LVIS annotations, and a small random open_clip model."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    (root / "tiny.json").write_text(json.dumps(TINY))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "tiny.safetensors")
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir()
    images = []
    for i in range(1, 7):
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(root / "train2017" / f"{i:012d}.jpg")
        images.append({"id": i, "height": 96, "width": 128})

    def objects(categories: tuple[int, int]) -> list[dict[str, object]]:
        corners = [[10, 10, 60, 10, 60, 70, 10, 70]]
        return [
            {"id": 2 * i + n, "image_id": i, "category_id": c, "bbox": [10, 10, 50, 60], "area": 3000, "iscrowd": 0,
             "segmentation": corners}
            for i in range(1, 7) for n, c in enumerate(categories)
        ]  # fmt: skip

    coco = {
        "images": [{**image, "file_name": f"{image['id']:012d}.jpg"} for image in images],
        "annotations": objects((1, 17)),  # person is base, cat is novel
        "categories": [{"id": i, "name": name} for i, name in COCO_NAMES.items()],
    }
    lvis = {
        "images": [
            {**image, "coco_url": f"http://host/train2017/{image['id']:012d}.jpg", "neg_category_ids": [],
             "not_exhaustive_category_ids": []}
            for image in images
        ],
        "annotations": objects((1, 3)),
        "categories": [
            {"id": 1, "name": "cup", "frequency": "f"},
            {"id": 2, "name": "crab_(animal)", "frequency": "c"},
            {"id": 3, "name": "unicycle", "frequency": "r"},
        ],
    }  # fmt: skip
    for name, content in (("coco", coco), ("lvis", lvis)):
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("name", ["lvis", "coco"])
def test_paper_configs__each_stage_takes_a_step_on_a_small_folder(
    world: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = world if name == "lvis" else world / "train2017"
    encoder = f"encoder=open_clip:{world / 'tiny.json'}:{world / 'tiny.safetensors'}"
    data = [f"images={images}", f"annotations={world / name}.json"]
    common = [encoder, f"out={tmp_path / 'run'}", *(f"data.{part}" for part in data), *SMALLER]
    assert train.main(["--config", str(PAPER / f"mask_rcnn_{name}.yaml"), "--check", *common]) == 0
    embedded = ["proposer=ground-truth", "device=cpu", f"out={tmp_path / 'regions'}", encoder]
    config = ["--config", str(PAPER / f"embed_{name}.yaml"), *embedded, *(f"pictures.{part}" for part in data)]
    assert embed.main(config) == 0
    vild = ["--config", str(PAPER / f"vild_{name}.yaml"), *common, f"regions={tmp_path / 'regions'}"]
    assert train.main([*vild, "--check"]) == 0
    assert capsys.readouterr().out.count("check: two batches and one step, loss ") == 2
    assert not (tmp_path / "run").exists()


def test_own_photo_configs__fit_together_and_take_a_step_with_every_category(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = PAPER.parent / "photos"
    proposer = load_config(TrainConfig, configs / "mask_rcnn.yaml")
    store = load_config(EmbedConfig, configs / "embed.yaml")
    vild = load_config(TrainConfig, configs / "vild.yaml")
    assert vild.weights == store.proposer == f"{proposer.out}/exported" and vild.regions == store.out
    assert proposer.encoder == store.encoder == vild.encoder and vild.data == proposer.data
    assert (store.pictures.images, store.pictures.annotations) == (vild.data.images, vild.data.annotations)

    encoder = f"encoder=open_clip:{world / 'tiny.json'}:{world / 'tiny.safetensors'}"
    data = [f"images={world / 'train2017'}", f"annotations={world / 'coco.json'}"]
    common = [encoder, f"out={tmp_path / 'run'}", *(f"data.{part}" for part in data), *SMALLER]
    common += ["backbone_weights=null", "backbone_start=scratch", "model.head.norm=''", "model.head.mask_norm=''"]
    assert train.main(["--config", str(configs / "mask_rcnn.yaml"), "--check", *common]) == 0
    embedded = ["proposer=ground-truth", "device=cpu", f"out={tmp_path / 'regions'}", encoder]
    config = ["--config", str(configs / "embed.yaml"), *embedded, *(f"pictures.{part}" for part in data)]
    assert embed.main(config) == 0
    more = [f"regions={tmp_path / 'regions'}", "weights=null"]
    assert train.main(["--config", str(configs / "vild.yaml"), *common, *more, "--check"]) == 0
    assert capsys.readouterr().out.count("check: two batches and one step, loss ") == 2
    labelled = inputs.labelled_images(
        vild.data.model_copy(update={"images": str(world / "train2017"), "annotations": str(world / "coco.json")})
    )
    assert not labelled.novel and {"person", "cat"} <= set(labelled.names)


@pytest.mark.parametrize("name", ["lvis", "coco"])
def test_novel_categories__are_never_labelled(world: Path, name: str) -> None:
    content = json.loads((world / f"{name}.json").read_text())
    config = load_config(TrainConfig, PAPER / f"vild_{name}.yaml")
    images = world if name == "lvis" else world / "train2017"
    data = config.data.model_copy(update={"images": str(images), "annotations": str(world / f"{name}.json")})
    labelled = inputs.labelled_images(data)
    split = split_of(config.data.split, content, where=name)
    assert {labelled.names[i] for i in labelled.novel} == {split.names[i] for i in split.novel}
    classes = {int(c) for n in range(len(labelled)) for c in labelled.load(n).classes}
    assert classes and not classes & labelled.novel
