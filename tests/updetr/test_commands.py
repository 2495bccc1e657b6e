# SPDX-License-Identifier: Apache-2.0
"""The commands end to end on shipped weights: patches, then labels, then evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovd import evaluate, train

SMALL = ["loop.batch_size=4", "optim.warmup_steps=0", "loop.log_every=1", "loop.threads=1", "loop.workers=0"]


@pytest.mark.slow
def test_commands__pretrain_fine_tune_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = f"cache={tmp_path / 'features'}"
    patches = [
        "pretext.images.length=8", "pretext.held_out_count=4", "pretext.patches.variants=2", "pretext.patches.count=5",
        "pretext.evaluate_every=1",
    ]  # fmt: skip
    up = tmp_path / "up"
    assert train.main(["--config", "updetr.yaml", f"out={up}", cache, "loop.steps=3", *SMALL, *patches]) == 0
    lines = [json.loads(line) for line in (up / "metrics.jsonl").read_text().splitlines()]
    assert {"patch_miou", "patch_recall50", "loss_reconstruction"} <= set(lines[-1])
    assert "patch2query as the same map, centred on the patches" in capsys.readouterr().out

    fine = tmp_path / "fine"
    labels = [
        "data.length=8",
        f"weights={up / 'exported'}",
        "model.queries=20",
        "model.conditioned=5",
    ]
    assert train.main(["--config", "detr.yaml", f"out={fine}", cache, "loop.steps=2", *SMALL, *labels]) == 0
    log = capsys.readouterr().out
    assert "the first 20 of 25 are kept" in log and "tensors loaded" in log
    lines = [json.loads(line) for line in (fine / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_text", "loss_l1_dn", "loss_object_words"} <= set(lines[-1])

    for queries in ("free", "words"):
        out = tmp_path / queries
        command = ["--weights", str(fine), "--data", "stickers-val:2", "--queries", queries, "--out", str(out)]
        assert evaluate.main(command) == 0
        assert json.loads((out / "results.json").read_text())
    assert evaluate.main(["--weights", str(up), "--data", "stickers-val:2"]) == 0
    shown = ["--examples", "1", "--present", "--out", str(tmp_path / "shown")]
    assert evaluate.main(["--weights", str(up), "--data", "stickers-val:2", *shown]) == 0
    results = json.loads((tmp_path / "shown" / "results.json").read_text())
    truth = json.loads((tmp_path / "shown" / "annotations.json").read_text())["annotations"]
    found, there = ({(one["image_id"], one["category_id"]) for one in rows} for rows in (results, truth))
    assert found and found <= there, "asked of each scene only for what is in it"
