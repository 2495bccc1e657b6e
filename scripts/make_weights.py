# SPDX-License-Identifier: Apache-2.0
"""``make weights``: rebuild the shipped weights from nothing, stage by stage.

A stage whose result exists is skipped; a training that was stopped goes on with ``--resume``. The CPU time of every
stage, over all of its attempts, stands in ``runs/weights.json``. ``--help`` names the stages. Only
the first needs the ``rebuild`` extra and Debian's ``wordnet-base``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs")
WORDNET = Path("/usr/share/wordnet")
# Regions: about 110 ms a picture on two cores; 150 gain .004 average precision more (docs/reports/results.md).
CROP_REFINEMENT = 40


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step towards the weights.

    Attributes:
        name: for the log and ``--only``.
        result: exists when the stage is done.
        commands: run in order; each a list of arguments after ``python``.
        run: run folder of a training; when it holds a checkpoint, ``--resume`` is added to the last command.
    """

    name: str
    result: Path
    commands: Sequence[Sequence[str]] = field(default_factory=list)
    run: Path | None = None


def training(name: str, module: str, config: str, folder: str) -> Stage:
    """A stage that is one training."""
    run = RUNS / folder
    result = run / "exported" / ("config.json" if module.startswith("pretrain") else "model.json")
    return Stage(name=name, result=result, commands=[["-m", module, "--config", config, f"out={run}"]], run=run)


def stages() -> list[Stage]:
    """All stages in order."""
    phrases, targets = RUNS / "teacher/phrases.txt", RUNS / "teacher/targets.safetensors"
    calibrated, metrics = RUNS / "vild/calibration.json", RUNS / "vild/evaluation/metrics.json"
    return [
        Stage(
            name="teacher",
            result=RUNS / "teacher/done",
            commands=[
                [
                    "-m",
                    "pretrain.data.phrases",
                    "--wordnet",
                    str(WORDNET),
                    "--definitions",
                    "16384",
                    "--out",
                    str(phrases),
                ],
                ["scripts/teacher_embeddings.py", "--phrases", str(phrases), "--out", str(targets)],
            ],
        ),
        training("text", "pretrain.train", "pretrain/text.yaml", "text"),
        training("clip-start", "pretrain.train", "pretrain/clip_start.yaml", "clip_start"),
        training("clip-names", "pretrain.train", "pretrain/clip_names.yaml", "clip_names"),
        training("clip-hues", "pretrain.train", "pretrain/clip_hues.yaml", "clip_hues"),
        training("clip", "pretrain.train", "pretrain/clip.yaml", "clip"),
        Stage(
            name="ship-clip",
            result=RUNS / "clip/shipped",
            commands=[["scripts/ship_weights.py", "clip", str(RUNS / "clip/exported"), "clip-sticker"]],
        ),
        training("proposals", "ovd.train", "mask_rcnn.yaml", "mask_rcnn"),
        Stage(
            name="regions",
            result=RUNS / "regions/done",
            commands=[["-m", "ovd.embed", "--config", "embed.yaml", f"out={RUNS / 'regions'}"]],
        ),
        training("vild", "ovd.train", "vild.yaml", "vild"),
        Stage(
            name="calibrate",
            result=calibrated,
            commands=[
                [
                    "-m",
                    "ovd.calibrate",
                    "--weights",
                    str(RUNS / "vild/exported"),
                    "--crop-refinement",
                    str(CROP_REFINEMENT),
                    "--report",
                    str(calibrated),
                ]
            ],
        ),
        Stage(
            name="measure",
            result=metrics,
            commands=[
                [
                    "-m",
                    "ovd.evaluate",
                    "--weights",
                    str(RUNS / "vild/exported"),
                    "--data",
                    "stickers-val:200",
                    "--out",
                    str(metrics.parent),
                ]
            ],
        ),
        Stage(
            name="ship-vild",
            result=RUNS / "vild/shipped",
            commands=[
                [
                    "scripts/ship_weights.py",
                    "detector",
                    str(RUNS / "vild/exported"),
                    "vild-sticker",
                    str(metrics),
                    str(calibrated),
                ]
            ],
        ),
    ]


def has_checkpoint(run: Path) -> bool:
    """Whether a training was begun there."""
    return (run / "last").exists()


def run_stage(stage: Stage, ledger: dict[str, dict[str, float]]) -> int:
    """Run one stage; CPU and wall seconds are added to the ledger even when it fails. Returns the exit status."""
    entry = ledger.setdefault(stage.name, {"cpu_seconds": 0.0, "wall_seconds": 0.0, "attempts": 0.0})
    entry["attempts"] += 1
    status = 0
    for number, arguments in enumerate(stage.commands):
        command = [sys.executable, *arguments]
        if stage.run is not None and number == len(stage.commands) - 1 and has_checkpoint(stage.run):
            command.append("--resume")
        print(f"== {stage.name}: python {' '.join(command[1:])}", flush=True)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        entry["cpu_seconds"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        entry["wall_seconds"] += time.monotonic() - started
        if status != 0:
            return status
    if not stage.result.exists():
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        stage.result.write_text("done\n", encoding="utf-8")
    return 0


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    known = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=known, metavar="STAGE", help=f"of {', '.join(known)}")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    return run_stages([stage for stage in stages() if not args.only or stage.name in args.only], RUNS / "weights.json")


def run_stages(chosen: Sequence[Stage], book: Path) -> int:
    """Run stages that are not done, in order; their times go to the book. Returns the exit status."""
    book.parent.mkdir(parents=True, exist_ok=True)
    ledger: dict[str, dict[str, float]] = json.loads(book.read_text(encoding="utf-8")) if book.exists() else {}
    for stage in chosen:
        if stage.result.exists():
            print(f"== {stage.name}: done ({stage.result})", flush=True)
            continue
        status = run_stage(stage, ledger)
        book.write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
        if status != 0:
            print(f"error: stage {stage.name} ended with status {status}; run the same command again", file=sys.stderr)
            return status
    total = sum(entry["cpu_seconds"] for entry in ledger.values())
    print(f"all stages done; {total / 3600:.2f} CPU hours in total ({book})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
