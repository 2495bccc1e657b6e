# SPDX-License-Identifier: Apache-2.0
"""The joint encoder: its towers, its folder format, what it refuses, and open_clip models behind the same interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pretrain.config import CbowTower, EncoderConfig, ResNetTower, TransformerTower, ViTTower
from pretrain.engine.errors import UserError
from pretrain.nets.encoders import load_encoder
from pretrain.nets.resnet import ResNet
from pretrain.nets.towers import JointEncoder, build_encoder, copy_tower, export_backbone

SMALL_CBOW = CbowTower(width=8, hidden=8, context_length=12)
SMALL_TEXT = TransformerTower(kind="transformer", width=16, layers=1, heads=2, context_length=12)
SMALL_VIT = ViTTower(kind="vit", patch_size=8, width=32, layers=1, heads=2, image_size=32)
WORDS = ["a dog", "a photo of a cat", "automobile"]


def make(**changes: Any) -> JointEncoder:
    torch.manual_seed(0)
    settings = {"embed_dim": 6, "image": ResNetTower(image_size=32), "text": SMALL_CBOW, **changes}
    return build_encoder(EncoderConfig(**settings)).eval()


@pytest.fixture(scope="module")
def encoder() -> JointEncoder:
    return make()


@pytest.mark.parametrize("image", [ResNetTower(image_size=32), SMALL_VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("text", [SMALL_CBOW, SMALL_TEXT, SMALL_TEXT.model_copy(update={"causal": True})])
@torch.no_grad()
def test_towers__every_pair_embeds_into_the_joint_space(image: Any, text: Any) -> None:
    both = make(image=image, text=text)
    pixels = both.prepare(torch.zeros(2, 3, 40, 50, dtype=torch.uint8))
    assert pixels.shape == (2, 3, 32, 32)
    assert both.encode_image(pixels).shape == (2, 6)
    words = both.encode_text(both.tokenize(WORDS))
    assert words.shape == (3, 6)
    assert not torch.allclose(words[0], words[2])


@pytest.mark.parametrize("text", [SMALL_CBOW, SMALL_TEXT])
@torch.no_grad()
def test_text_tower__embedding_is_independent_of_the_batch(text: Any) -> None:
    both = make(text=text)
    together = both.encode_text(both.tokenize(WORDS))
    alone = torch.cat([both.encode_text(both.tokenize([word])) for word in WORDS])
    torch.testing.assert_close(together, alone)


@torch.no_grad()
def test_text_tower__only_bag_of_words_ignores_order() -> None:
    texts = ["dog next to a cat", "cat next to a dog"]
    cbow, transformer = make(), make(text=SMALL_TEXT)
    first, second = cbow.encode_text(cbow.tokenize(texts))
    torch.testing.assert_close(first, second)
    first, second = transformer.encode_text(transformer.tokenize(texts))
    assert (first - second).abs().max() > 1e-4


@torch.no_grad()
def test_text_tower__bag_of_words_is_a_mean(encoder: JointEncoder) -> None:
    tower: Any = encoder.text
    tokens = encoder.tokenize(["red car"])
    words = tokens[0, 1:3]
    assert int(tokens[0, 3]) == 49407  # end of text, not a word
    bag = tower.norm(tower.token_embedding(words).mean(0))
    expected = tower.proj(F.gelu(tower.hidden(bag))) + tower.skip(bag)
    torch.testing.assert_close(encoder.encode_text(tokens)[0], expected)


@torch.no_grad()
def test_text_tower__empty_text_and_no_text_are_embedded(encoder: JointEncoder) -> None:
    assert torch.isfinite(encoder.encode_text(encoder.tokenize([""]))).all()
    assert encoder.encode_text(encoder.tokenize([])).shape == (0, 6)


def test_tokenizer__equals_open_clip(encoder: JointEncoder) -> None:
    tokens = encoder.tokenize(["A  Photo of a DOG", "word " * 40])
    # CLIP's byte-pair ids of these very common words; 49406 and 49407 frame a text.
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0, 0, 0, 0, 0]
    assert tokens[1, -1] == 49407  # cut off, and still ended
    with pytest.raises(TypeError, match="list of texts"):
        encoder.tokenize("dog")


def test_resnet__has_torchvisions_names_and_strides() -> None:
    ours, theirs = ResNet(depth=18, stem="small"), torchvision.models.resnet18()
    expected = {k for k in theirs.state_dict() if not k.startswith("fc.")}
    assert set(ours.state_dict()) == expected
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert [k for k, v in ours.state_dict().items() if v.shape != shapes[k]] == ["conv1.weight"]
    maps = ours.stages(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@torch.no_grad()
def test_resnet__imagenet_stem_equals_torchvision() -> None:
    ours, theirs = ResNet(depth=18, stem="imagenet").eval(), torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(pixels), theirs(pixels))


def test_export_backbone__leaves_out_the_head(encoder: JointEncoder) -> None:
    tensors = export_backbone(encoder)
    assert "layer4.1.bn2.running_var" in tensors
    assert not [name for name in tensors if name.startswith(("fc", "proj", "backbone"))]
    ResNet(depth=18, stem="small").load_state_dict(tensors)
    with pytest.raises(UserError, match="only a ResNet"):
        export_backbone(make(image=SMALL_VIT))


@torch.no_grad()
def test_prepare__normalises_and_resizes_antialiased() -> None:
    both = make(image_mean=(0.2, 0.4, 0.6), image_std=(0.5, 0.25, 0.125))
    stripes = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    stripes[..., ::2] = 255  # every other column: a plain subsample would give only black or only white
    pixels = both.prepare(stripes)
    grey = pixels * torch.tensor(both.image_std).view(1, 3, 1, 1) + torch.tensor(both.image_mean).view(1, 3, 1, 1)
    assert (grey[..., 2:-2] - 0.5).abs().max() < 0.02
    with pytest.raises(ValueError, match="uint8"):
        both.prepare(torch.zeros(1, 3, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_encoder__round_trip(tmp_path: Path, half: bool) -> None:
    before = make(text_projection=True)
    before.logit_scale.fill_(3.0)
    before.save(tmp_path / "encoder", half=half)
    after = load_encoder(tmp_path / "encoder")
    assert not after.training
    assert after.logit_scale.item() == 3.0
    tokens = before.tokenize(WORDS)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if half else {}
    torch.testing.assert_close(after.encode_text(tokens), before.encode_text(tokens), **tolerance)
    assert after.encode_text(tokens).dtype == torch.float32
    pixels = before.prepare(torch.full((1, 3, 32, 32), 90, dtype=torch.uint8))
    torch.testing.assert_close(after.encode_image(pixels), before.encode_image(pixels), **tolerance)
    if not half:
        assert after.fingerprint() == before.fingerprint()
    assert load_encoder(tmp_path / "encoder" / "model.safetensors").fingerprint() == after.fingerprint()
    stored = load_file(tmp_path / "encoder" / "model.safetensors")
    assert stored["visual.proj.weight"].dtype == (torch.float16 if half else torch.float32)


@torch.no_grad()
def test_fingerprint__depends_on_weights_and_configuration() -> None:
    one = make()
    first = one.fingerprint()
    assert first == make().fingerprint()
    one.logit_scale.add_(0.5)
    assert one.fingerprint() != first
    assert make(image_mean=(0.4, 0.5, 0.5)).fingerprint() != first


@torch.no_grad()
@pytest.mark.parametrize(("value", "expected"), [(9.0, 4.60517), (-2.0, 0.0), (1.5, 1.5)])
def test_temperature__is_clamped_to_1_and_100(encoder: JointEncoder, value: float, expected: float) -> None:
    both = make()
    both.logit_scale.fill_(value)
    both.clamp_temperature()
    assert both.logit_scale.item() == pytest.approx(expected)


def test_encoder__missing_tower_is_named() -> None:
    text, image = make(image=None), make(text=None)
    with pytest.raises(UserError, match="text tower only"):
        text.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="image tower only"):
        image.tokenize(["dog"])
    with pytest.raises(UserError, match="image tower only"):
        image.encode_text(torch.zeros(1, 4, dtype=torch.long))


@torch.no_grad()
def test_copy_tower__text_projection_starts_as_identity() -> None:
    source = make(image=None)
    torch.manual_seed(9)
    target = build_encoder(EncoderConfig(embed_dim=6, image=SMALL_VIT, text=SMALL_CBOW, text_projection=True)).eval()
    copy_tower(target, source, which="text")
    tokens = source.tokenize(WORDS)
    torch.testing.assert_close(target.encode_text(tokens), F.normalize(source.encode_text(tokens), dim=-1))
    with pytest.raises(UserError, match="the source has none"):
        copy_tower(target, source, which="visual")


# --- what a folder may lack ------------------------------------------------------------------------------------------


def test_load_encoder__missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no encoder at .*nowhere"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json is missing"):
        load_encoder(tmp_path)
    make(image=None).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected format"),
        ('{"format": "joint-encoder/9"}', "expected format"),
        ('{"format": "joint-encoder/1", "encoder": {"embed_dim": 1}}', "embed_dim"),
        ('{"format": "joint-encoder/1", "encoder": {"text": {"kind": "lstm"}}}', "encoder.text"),
    ],
)
def test_load_encoder__damaged_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    make(image=None).save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path)


def test_load_encoder__misfitting_weights_are_counted(tmp_path: Path) -> None:
    make(image=None).save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    total = len(tensors)
    del tensors["text.norm.bias"]
    tensors["text.norm.weight"] = torch.zeros(3)
    tensors["text.stranger"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load_encoder(tmp_path)
    message = str(caught.value)
    assert f"{total - 2} of {total} tensors match" in message
    assert "1 missing, such as text.norm.bias" in message
    assert "1 unexpected, such as text.stranger" in message
    assert "text.norm.weight: (3,) instead of (8,)" in message


# --- open_clip -------------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random open_clip model with its configuration and weights in files."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(4)
    model = open_clip.CLIP(**TINY).eval()  # the plain class: its text tower's names carry no prefix
    (folder / "tiny.json").write_text(json.dumps(TINY))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "tiny.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "tiny.pt")
    return folder, model


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pt"])
def test_open_clip__loads_from_a_local_file(tiny: tuple[Path, Any], name: str) -> None:
    folder, model = tiny
    encoder = load_encoder(f"open_clip:{folder / 'tiny.json'}:{folder / name}")
    assert (encoder.embed_dim, encoder.image_size) == (8, 32)
    tokens = encoder.tokenize(WORDS)
    assert tokens.shape == (3, 16)
    torch.testing.assert_close(encoder.encode_text(tokens), model.encode_text(tokens))
    pixels = encoder.prepare(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    torch.testing.assert_close(encoder.encode_image(pixels), model.encode_image(pixels))
    torch.testing.assert_close(encoder.logit_scale, model.logit_scale)


def test_open_clip__can_be_saved_as_a_folder(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    encoder = load_encoder(f"open_clip:{tiny[0] / 'tiny.json'}:{tiny[0] / 'tiny.safetensors'}")
    encoder.save(tmp_path / "copy")
    assert load_encoder(tmp_path / "copy").fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-B-33:openai", "did you mean"),
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:ViT-B-32:laion99z", "no weights 'laion99z'.*openai"),
        ("open_clip:ViT-B-32:nowhere.safetensors", "no weights file"),
        ("open_clip:nowhere.json:x.pt", "nowhere.json: no such file; open_clip:MODEL.json:WEIGHTS needs"),
    ],
)
def test_open_clip__unknown_names_are_explained(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(spec)


def test_open_clip__weights_of_another_model_are_refused(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "wider.json").write_text(json.dumps({**TINY, "embed_dim": 12}))
    with pytest.raises(UserError, match="of another shape"):
        load_encoder(f"open_clip:{tmp_path / 'wider.json'}:{tiny[0] / 'tiny.safetensors'}")
    (tmp_path / "noise.pt").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be read as weights only: it is not a checkpoint"):
        load_encoder(f"open_clip:{tiny[0] / 'tiny.json'}:{tmp_path / 'noise.pt'}")
