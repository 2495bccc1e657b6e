# SPDX-License-Identifier: Apache-2.0
"""open_clip's names, files and the hub: what is read from where, what is said before, the one line without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from pretrain.engine.errors import UserError
from pretrain.nets import clip_fetch
from pretrain.nets.clip_fetch import fetch_file
from pretrain.nets.clip_files import find_open_clip
from pretrain.nets.encoders import load_encoder
from pretrain.nets.open_clip_texts import padding_is_idle
from tests.encoders.small import MODEL, PREPROCESS, save_clip, spec_of

REPOSITORY = Path(__file__).resolve().parents[2]
TAG = "open_clip:ViT-B-32:laion2b_s34b_b79k"
REFUSED = """
import socket, sys
def refuse(*given, **more):
    raise OSError(101, "Network is unreachable")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from pretrain.engine.errors import run_cli
from ovd.predict import main
run_cli(main, sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "could not be fetched from huggingface.co ("),
        ({"HF_ENDPOINT": "https://mirror.example"}, "could not be fetched from mirror.example ("),
        ({"HF_HUB_OFFLINE": "1"}, "is not in the hub's cache, and the hub is set offline (HF_HUB_OFFLINE)."),
    ],
)
def test_fetch__no_network_is_one_line(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    words = ["-c", REFUSED, "x.png", "--classes", "dog", "--encoder", TAG, "--out", str(tmp_path / "out")]
    open(tmp_path / "x.png", "wb").close()
    run = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "hub")} | environment,
    )  # fmt: skip
    assert run.returncode == 2 and not (tmp_path / "out").exists()
    lines = [line for line in run.stderr.splitlines() if not line.startswith(("  warnings.warn", "/"))]
    assert len(lines) == 1 and lines[0].startswith(f"error: {TAG} {said}")
    assert lines[0].endswith("give its path: open_clip:ViT-B-32:FILE")


def test_page__fetches_before_it_starts() -> None:
    run = subprocess.run(
        [sys.executable, "app.py", "--port", "0", "--encoder", "open_clip:ViT-B32:openai"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith("error: open_clip has no model 'ViT-B32'; did you mean ViT-B-32")


class Hub:
    """Stands for the hub: some files of one repository, and the requests to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
        self.files, self.requested = files, list[str]()
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.describe)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file: str(self.files[file]))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def describe(self, url: str, timeout: float) -> Any:
        self.requested.append(url)
        if (name := url.rsplit("/", 1)[-1]) not in self.files:
            raise huggingface_hub.errors.RemoteEntryNotFoundError("404", response=SimpleNamespace(  # type: ignore[arg-type]
                headers={}, request=None, status_code=404))  # fmt: skip
        return SimpleNamespace(size=self.files[name].stat().st_size)


def test_fetch__host_and_size_are_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "open_clip_pytorch_model.bin"
    file.write_bytes(b"x" * 12_345_678)
    hub = Hub(monkeypatch, {file.name: file})
    assert fetch_file("laion/x", clip_fetch.WEIGHTS, name="NAME", instead="open_clip:M:FILE") == file
    assert len(hub.requested) == 2  # tensors were requested for first
    assert capsys.readouterr().err == (
        "NAME: fetching open_clip_pytorch_model.bin of laion/x from huggingface.co, 12 MB, once\n"
    )
    hub.files.clear()
    with pytest.raises(UserError, match=r"laion/x at huggingface.co has none of open_clip_model.safetensors, "):
        fetch_file("laion/x", clip_fetch.WEIGHTS, name="NAME", instead="open_clip:M:FILE")


def test_fetch__unresponsive_hub_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, {})
    monkeypatch.setattr(hub, "describe", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub.describe)
    monkeypatch.setattr(clip_fetch, "PATIENCE", 0.05)
    with pytest.raises(UserError, match=r"could not be fetched from huggingface.co \(no answer in 0 s\)"):
        fetch_file("a/b", ("c",), name="NAME", instead="x")


def test_fetch__cached_file_is_used_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch, {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, file: str(tmp_path / file))
    settings, path = find_open_clip("ViT-B-16-SigLIP:webli")
    assert path == tmp_path / "open_clip_model.safetensors" and not hub.requested and capsys.readouterr().err == ""
    assert settings["mean"] == settings["std"] == [0.5, 0.5, 0.5]  # SigLIP's, not CLIP's


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("ViT-B32:openai", r"open_clip has no model 'ViT-B32'; did you mean ViT-B-32"),
        ("ViT-B-32:laion2b_s34b_b79", r"no weights 'laion2b_s34b_b79' for ViT-B-32 - did you mean 'laion2b_s34b_b79k'"),
        ("ViT-B-32", r"names no weights: add :TAG \(openai, "),
        ("ViT-B-32:gone.safetensors", "no weights file at gone.safetensors"),
    ],
)
def test_open_clip__misspelt_name_gets_the_nearest(rest: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_open_clip(rest)


@pytest.mark.parametrize(("model", "mean"), [("ViT-B-16-SigLIP", 0.5), ("ViT-B-32", 0.48145466)])
def test_open_clip__file_has_its_models_pixel_statistics(tmp_path: Path, model: str, mean: float) -> None:
    (tmp_path / "x.safetensors").touch()
    assert find_open_clip(f"{model}:{tmp_path / 'x.safetensors'}")[0]["mean"][0] == pytest.approx(mean)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_open_clip__file_equals_its_own_model(tmp_path: Path, suffix: str) -> None:
    path = save_clip(tmp_path / "clip", suffix=suffix)
    encoder = load_encoder(spec_of(path))
    assert list(encoder.image_mean) == PREPROCESS["mean"] and encoder.image_size == 32
    theirs = open_clip.CLIP(**MODEL)
    theirs.load_state_dict(torch.load(path, weights_only=True) if suffix != "safetensors" else load_file(path))
    theirs.eval()
    words = ["a dog", "a much longer text about a dog, a cat and a lamp", "!"]
    tokens = encoder.tokenize(words)
    assert encoder.text is not None and padding_is_idle(encoder.text)
    with torch.inference_mode():
        for texts in (tokens, tokens[:1], tokens[2:]):  # the padding that is left out differs
            torch.testing.assert_close(encoder.encode_text(texts), theirs.encode_text(texts), rtol=1e-4, atol=1e-5)
        assert encoder.encode_text(tokens[:0]).shape == (0, 16)


def test_short_texts__towers_that_read_padding_are_unchanged() -> None:
    causal = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "output_dim": 8}
    tower = open_clip.transformer.TextTransformer
    assert padding_is_idle(tower(**causal))
    assert not padding_is_idle(tower(**causal, no_causal_mask=True, pool_type="last"))  # SigLIP's
    assert not padding_is_idle(tower(**causal, pool_type="last"))


def test_hub_tokenizer__missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    monkeypatch.setattr(clip_fetch.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="open_clip:SigLIP has a tokenizer of Hugging Face's: pip install transformers"):
        clip_fetch.hub_tokenizer(text, name="SigLIP", folder=None, context_length=64)
    read: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(clip_fetch.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", lambda name, **more: read.append((name, more)))
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    clip_fetch.hub_tokenizer(text, name="SigLIP", folder=tmp_path, context_length=64)
    assert read == [(str(tmp_path), {"context_length": 64, "tokenizer_mode": None, "clean": "canonicalize"})]
