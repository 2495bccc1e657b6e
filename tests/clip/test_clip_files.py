# SPDX-License-Identifier: Apache-2.0
"""CLIP checkpoints of the authors, recognised by their keys: sizes from shapes, all of it or nothing, no code run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain import export
from pretrain.engine.errors import UserError
from pretrain.nets.clip_files import clip_architecture
from pretrain.nets.encoders import load_encoder, read_encoder

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
VIT = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
WORDS = ["a dog", "a drawing of a red mug"]


def published(image: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A random model, and its tensors as the authors publish theirs: half precision, and three numbers beside them."""
    torch.manual_seed(0)
    if isinstance(image["layers"], list):  # attention pooling needs a head per 64 channels of 32 x width
        image = {**image, "head_width": 64}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=image, text_cfg=TEXT, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items() if k != "attn_mask"}
    numbers = {"input_resolution": image["image_size"], "context_length": 12, "vocab_size": 49408}
    return model, {**state, **{name: torch.tensor(value) for name, value in numbers.items()}}


@pytest.mark.parametrize("image", [VIT, RESNET], ids=["vit", "resnet"])
def test_openai_checkpoint__sizes_are_read_from_shapes(image: dict[str, Any]) -> None:
    _, state = published(image)
    assert clip_architecture(state, source="x.pt") == {"embed_dim": 16, "vision_cfg": image, "text_cfg": TEXT}


@torch.no_grad()
@pytest.mark.parametrize("image", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_openai_checkpoint__embeddings_equal_open_clip(tmp_path: Path, image: dict[str, Any], kind: str) -> None:
    model, state = published(image)
    path = tmp_path / f"ViT-tiny.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    encoder, report = read_encoder(path)
    assert f"{len(state) - 3} tensors matched, 0 missing, 3 left out (" in report
    assert all(name in report for name in ("input_resolution", "context_length", "vocab_size"))
    pixels = encoder.prepare(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    for ours, theirs in (
        (encoder.encode_image(pixels), model.encode_image(pixels)),
        (encoder.encode_text(encoder.tokenize(WORDS)), model.encode_text(encoder.tokenize(WORDS))),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    saved = encoder.save(tmp_path / "saved")
    assert load_encoder(saved).fingerprint() == encoder.fingerprint()


def test_export__openai_checkpoint_to_open_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, state = published(VIT)
    torch.save(state, tmp_path / "clip.pt")
    assert export.main([str(tmp_path / "clip.pt"), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 0
    assert "tensors matched, 0 missing, 3 left out" in capsys.readouterr().out
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert torch.equal(again.state_dict()["visual.proj"], state["visual.proj"].float())
    assert isinstance(again.visual.transformer.resblocks[0].mlp[1], open_clip.transformer.QuickGELU)
    with pytest.raises(UserError, match="CLIP with a vision transformer, not a ResNet. Use --to open_clip"):
        export.main([str(tmp_path / "clip.pt"), "--to", "detectron2", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("drop", ["ln_final.bias", "visual.transformer.resblocks.0.attn.out_proj.weight"])
def test_openai_checkpoint__missing_tensor_is_named(tmp_path: Path, drop: str) -> None:
    _, state = published(VIT)
    del state[drop]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=f"1 missing, such as (text.)?{drop}"):
        load_encoder(tmp_path / "clip.pt")


def test_clip_files__other_files_are_recognised(tmp_path: Path) -> None:
    _, state = published(VIT)
    torch.save({k: v for k, v in state.items() if k != "input_resolution"}, tmp_path / "trained.pt")
    with pytest.raises(UserError, match=r"which activation .* open_clip:ViT-B-32-quickgelu:.*trained\.pt"):
        load_encoder(tmp_path / "trained.pt")
    for name, value, said in (
        ("visual.conv1.weight", torch.zeros(96, 3, 8, 8), r"widths \[64, 96\] are not multiples of 64"),
        ("text_projection", torch.zeros(64), "text_projection has 1 axes"),
    ):
        torch.save({**state, name: value}, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=said):
            load_encoder(tmp_path / "odd.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(
        UserError, match=r"no CLIP model with the names of the original release \(no text_projection\); its keys begin"
    ):
        load_encoder(tmp_path / "linear.pt")
    with pytest.raises(UserError, match="no encoder at"):
        load_encoder(tmp_path / "none.pt")


class Scripted(nn.Module):
    """Holds the tensors under their names, as the authors' archive does."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            place: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_buffer(last, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_torchscript__is_not_run_and_the_advice_works(tmp_path: Path) -> None:
    """What OpenAI published: the message has the one command that makes a file of tensors of it."""
    _, state = published(VIT)
    path = tmp_path / "ViT-tiny.pt"
    torch.jit.save(torch.jit.script(Scripted(state)), str(path))  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="a TorchScript archive") as caught:
        load_encoder(path)
    assert "weights_only" not in str(caught.value)
    python, *rest = shlex.split(str(caught.value).splitlines()[1])
    assert python == "python"
    subprocess.run([sys.executable, *rest], check=True, cwd=tmp_path)
    assert load_encoder(tmp_path / "ViT-tiny.tensors.pt").embed_dim == 16
