# SPDX-License-Identifier: Apache-2.0
"""A ViLD distilled from a CLIP of open_clip's on the shipped proposals: embed, train, export, and find it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ovd import Detector, embed, train
from ovd.embed import detector_fingerprint
from ovd.regions.store import RegionStore
from ovd.weights import detector_folder
from pretrain.engine.errors import UserError
from pretrain.nets.encoders import load_encoder
from tests.encoders.small import photo, save_clip, spec_of, write_photos


def test_photo_proposals__fingerprint_is_their_networks(tmp_path: Path) -> None:
    """Another head on the same boxes makes no other proposals; another input size does."""
    shipped = detector_folder("vild-photo")
    assert detector_fingerprint(shipped) == detector_fingerprint(shipped / "proposals")
    shutil.copytree(shipped / "proposals", tmp_path / "p")
    card = json.loads((tmp_path / "p/model.json").read_text())
    (tmp_path / "p/model.json").write_text(json.dumps(card | {"sides": [320]}))
    assert detector_fingerprint(tmp_path / "p") != detector_fingerprint(shipped)


def test_vild__trained_on_a_public_clip_records_its_encoder(tmp_path: Path) -> None:
    spec = spec_of(save_clip(tmp_path / "clip"))
    write_photos(tmp_path / "set", 4)
    pictures = ["kind=coco", f"images={tmp_path / 'set/images'}", f"annotations={tmp_path / 'set/boxes.json'}"]
    assert embed.main([f"out={tmp_path / 'regions'}", "proposer=vild-photo", "--encoder", spec,
                       *(f"pictures.{one}" for one in pictures), "proposals_per_image=6"]) == 0  # fmt: skip
    store = RegionStore.open(tmp_path / "regions", encoder_fingerprint=load_encoder(spec).fingerprint())
    assert store.dim == 16 and 0 < len(store[0][0]) <= 6
    assert store.manifest["notes"]["encoder"] == spec
    options = [
        f"out={tmp_path / 'run'}", "--encoder", spec, f"regions={tmp_path / 'regions'}", "regions_per_image=4",
        *(f"data.{one}" for one in pictures), "data.split=all", "data.short_side=64", "model.head.mask=false",
        "backbone_start=scratch", "model.encoder_start=false", "templates=clip",
        "loop={steps: 2, batch_size: 2, workers: 0, device: cpu}", "optim.lr=0.001",
    ]  # fmt: skip
    assert train.main(options) == 0
    exported = tmp_path / "run/exported"
    card = json.loads((exported / "model.json").read_text())
    assert (card["encoder"], card["templates"], card["embed_dim"]) == (spec, "clip", 16)
    detector = Detector.load(exported)
    assert detector.text.encoder.fingerprint() == card["encoder_fingerprint"]
    assert detector.find(photo(), ["dog", "saxophone"], threshold=0.0).names == ("dog", "saxophone")
    other = save_clip(tmp_path / "clip")
    tensors = {name: tensor + 1 for name, tensor in load_file(other).items()}
    from safetensors.torch import save_file

    save_file(tensors, other)
    with pytest.raises(UserError, match="trained against another text encoder than 'open_clip:"):
        Detector.load(exported)
