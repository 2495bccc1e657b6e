# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files as people have them: figures of numpy beside the weights, wrappers, other suffixes, pointers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.engine.state import load_tensors
from pretrain.nets.checkpoints import find_resnet, read_tensors
from pretrain.nets.resnet import ResNet

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3)}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46830571\n"


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.float16(2)])
def test_checkpoint_file__numpy_scalars_beside_the_weights_are_read(tmp_path: Path, number: object) -> None:
    torch.save({"state_dict": TENSORS, "best": number}, tmp_path / "c.pth")
    assert torch.equal(read_tensors(tmp_path / "c.pth")["a.weight"], TENSORS["a.weight"])


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize("held", [Runs(), np.array([Runs()], dtype=object), {"deep": [Runs()]}])
def test_checkpoint__code_is_refused(tmp_path: Path, held: object, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": TENSORS, "best": held}, tmp_path / "c.pth")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"c\.pth: cannot be read as weights only"):
        read_tensors(tmp_path / "c.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoint__wrapper_prefixes_are_removed(tmp_path: Path, wrapper: str) -> None:
    state = nn.Sequential(nn.Conv2d(1, 1, 1)).state_dict()
    torch.save({f"{wrapper}{name}": value for name, value in state.items()}, tmp_path / "c.pth")
    assert read_tensors(tmp_path / "c.pth").keys() == state.keys()
    network = {f"{wrapper}{name}": value for name, value in ResNet(depth=18, stem="imagenet").state_dict().items()}
    assert find_resnet(network, source="x").missing == ()


@pytest.mark.parametrize("name", ["w.SAFETENSORS", "w.bin", "w.pth", "w"])
def test_checkpoint_file__safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / "w.tmp")
    (tmp_path / "w.tmp").rename(tmp_path / name)
    assert torch.equal(read_tensors(tmp_path / name)["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize("read", [read_tensors, load_weights])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_checkpoint_file__a_git_lfs_pointer_is_distinguished_from_damage(tmp_path: Path, name: str, read: Any) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=r"a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"):
        read(tmp_path / name)


def test_checkpoint_file__a_name_that_is_no_utf_8_is_not_called_damaged(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save_file(TENSORS, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(folder / "w.safetensors")
    with pytest.raises(UserError, match="safetensors opens names in UTF-8 alone; rename the file, or the folder"):
        load_weights(folder / "w.safetensors")


def test_checkpoint_file__a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(b"\x80\x04}\x94\x8c\x01a\x94K\x01s.")  # {"a": 1}
    with pytest.raises(UserError, match=r"c\.pth: "):
        read_tensors(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (torch.ones(2, 3).to_sparse(), "torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "quantised"),
        (torch.ones(2, 3, device="meta"), r"without data \(meta\)"),
        (torch.full((2, 3), torch.nan), r"values that are no numbers \(NaN\)"),
    ],
)
def test_checkpoint_file__special_tensors_and_nan_are_refused_by_name(
    tmp_path: Path, odd: torch.Tensor, kind: str
) -> None:
    torch.save({**TENSORS, "b.weight": odd}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"c\.pth: b\.weight (is|holds) {kind}"):
        read_tensors(tmp_path / "c.pth")


def resnet() -> dict[str, torch.Tensor]:
    return ResNet(depth=18, stem="imagenet").state_dict()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_checkpoint_file__integers_and_complex_numbers_are_refused(dtype: torch.dtype) -> None:
    """They were converted to floats: a quantised network became noise."""
    name = "layer1.0.conv1.weight"
    odd = {**resnet(), name: resnet()[name].to(dtype)}
    message = rf"x: {name} holds numbers of type {str(dtype).removeprefix('torch.')} where weights belong"
    with pytest.raises(UserError, match=message):
        find_resnet(odd, source="x")
    with pytest.raises(UserError, match=message):
        load_tensors(ResNet(depth=18, stem="imagenet"), odd, source="x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoint_file__other_floats_are_weights(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in resnet().items()}
    assert {value.dtype for value in find_resnet(state, source="x").state.values()} == {torch.float32}


@pytest.mark.parametrize(
    "more", ["layer3.2.conv1.weight", "layer1.0.se.fc1.weight", "layer2.0.conv1.bias", "conv1.bias"]
)
def test_checkpoint_file__a_deeper_network_is_refused(more: str) -> None:
    """A ResNet-152 was taken for a ResNet-101, and a network with attention for one without."""
    with pytest.raises(UserError, match=rf"x: no ResNet-18, .* 1 tensors of its stages have no place, such as {more}"):
        find_resnet({**resnet(), more: torch.zeros(64)}, source="x")


def test_checkpoint_file__values_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"x: bn1\.running_var holds values that are not finite"):
        find_resnet({**resnet(), "bn1.running_var": torch.full((64,), torch.inf)}, source="x")
