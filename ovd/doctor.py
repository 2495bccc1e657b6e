# SPDX-License-Identifier: Apache-2.0
"""What is installed here, what is wrong with it, and what to do about each thing.

    python -m ovd.doctor            a line per finding; exit status 0 when nothing is wrong, 1 otherwise
    python -m ovd.doctor --json     the same for a bug report

A finding is ``ok``, ``note`` (something optional is absent or different) or ``WRONG`` (a command will fail).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ovd.weights import DEFAULT, problems, read_manifest, weights_root
from pretrain.engine.errors import UserError, run_cli

Level = Literal["ok", "note", "WRONG"]
ROOT = Path(__file__).resolve().parent.parent
SETUP = "run `make setup` (or `make demo`) in the repository"

# Distribution names of what the code imports directly.
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "scipy",
    "pydantic",
    "pyyaml",
    "safetensors",
    "open_clip_torch",
    "pycocotools",
    "gradio",
    "fvcore",
)
OPTIONAL = {
    "tensorboard": "curves of a training run beside metrics.jsonl",
    "supervision": "Detections.to_supervision()",
    "ray": "embedding and predicting on several machines (`ray[data]`)",
}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Below the first a checkpoint or an export may not fit; below the second a store of region embeddings may not.
DISK_NEEDED, DISK_COMFORTABLE = 1 << 30, 10 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do and is empty when nothing is to be done."""

    level: Level
    subject: str
    detail: str
    remedy: str = ""


def check_python(version: tuple[int, int] | None = None) -> Finding:
    """The interpreter: 3.10 is the oldest that the code and the lock files are written for."""
    version = sys.version_info[:2] if version is None else version
    detail = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    if version < (3, 10):
        return Finding(
            "WRONG", "Python", detail, "install Python 3.10 or newer, then run `make PYTHON=/path/to/python3`"
        )
    return Finding("ok", "Python", detail)


def locked_versions(lock: Path) -> dict[str, set[str]]:
    """The versions a lock file pins, by normalised name (several when markers distinguish Pythons)."""
    pinned: dict[str, set[str]] = {}
    if lock.is_file():
        for line in lock.read_text(encoding="utf-8").splitlines():
            name, equals, rest = line.partition("==")
            if equals and not line.startswith("#"):
                pinned.setdefault(normalised(name), set()).add(rest.partition(";")[0].strip())
    return pinned


def normalised(name: str) -> str:
    """A distribution's name as the lock file spells it."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


def check_packages(lock: Path = ROOT / "requirements.lock") -> list[Finding]:
    """Installed versions of what is imported directly, beside those that were tested."""
    pinned = locked_versions(lock)
    findings = []
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("WRONG", name, "not installed", SETUP))
            continue
        tested = pinned.get(normalised(name), set())
        if tested and version.partition("+")[0] not in tested:
            detail = f"{version}, tested with {' or '.join(sorted(tested))}"
            findings.append(Finding("note", name, detail, f"if something fails, {SETUP} for the tested version"))
        else:
            findings.append(Finding("ok", name, version))
    for name, use in OPTIONAL.items():
        try:
            findings.append(Finding("ok", name, f"{importlib.metadata.version(name)} (optional)"))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("note", name, "not installed (optional)", f"`pip install {name}` for {use}"))
    return findings


def check_device() -> list[Finding]:
    """Where models run, and whether torchvision's operators load (they are missing when its torch is another)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("WRONG", "device", f"torch or torchvision does not import: {first_line(error)}", SETUP)]
    findings = []
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        findings.append(
            Finding(
                "WRONG",
                "torchvision operators",
                first_line(error),
                f"torch {torch.__version__} and torchvision {torchvision.__version__} do not belong together; {SETUP}",
            )
        )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            findings.append(
                Finding("ok", f"device cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB")
            )
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{cores} core{'s' * (cores > 1)} for this process, {torch.get_num_threads()} threads, {capability}"
    findings.append(
        Finding("ok", "device cpu", detail + ("" if torch.cuda.is_available() else "; no CUDA device seen"))
    )
    return findings


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_detectron2(
    probe: str = "import detectron2.modeling, detectron2.data; print(detectron2.__version__)",
) -> Finding:
    """Where Detectron2 came from, and whether it imports.

    Args:
        probe: Code that prints the version; it runs in another process, so a crash in it ends up in the report.
    """
    build = f"`{Path(sys.executable)} scripts/build_detectron2.py`"
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return Finding(
            "WRONG", "Detectron2", "not installed: training and the shipped detector need it", f"run {build}"
        )
    folder = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=elsewhere, check=False)
    info = folder / "BUILD_INFO.json"
    if info.is_file():
        facts = json.loads(info.read_text(encoding="utf-8"))
        origin = (
            f"built here from the source archive {facts.get('archive')} (Python only), revision {facts.get('revision')}"
        )
        repair = f"run {build} --force"
    else:
        compiled = any(folder.glob("_C*.so")) or any(folder.glob("_C*.pyd"))
        origin = f"official build {'with' if compiled else 'without'} compiled operators"
        repair = f"repair that build, or `pip uninstall detectron2` and run {build}"
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding("WRONG", "Detectron2", f"{origin}, does not import: {reason}", repair)
    return Finding("ok", "Detectron2", f"{done.stdout.strip()}, {origin}")


def check_weights(root: Path | None = None) -> list[Finding]:
    """Every entry of the weights manifest, verified byte for byte."""
    root = weights_root() if root is None else root
    try:
        entries = read_manifest(root)
    except UserError as error:
        return [
            Finding("WRONG", "weights", str(error), "restore them with `git checkout -- weights`, or `make weights`")
        ]
    findings = []
    if DEFAULT not in entries:
        remedy = "restore it with `git checkout -- weights`, or `make weights`"
        findings.append(
            Finding("WRONG", f"weights {DEFAULT}", f"not in {root / 'manifest.json'}; the page needs it", remedy)
        )
    for name, entry in entries.items():
        wrong = problems(entry)
        if wrong:
            remedy = "`git checkout -- weights` brings the shipped files back, `make weights` makes new ones"
            findings.append(Finding("WRONG", f"weights {name}", "; ".join(wrong), remedy))
        else:
            detail = f"{entry.bytes / 1e6:.1f} MB in {len(entry.files)} files, verified, {entry.sha256[:12]}"
            findings.append(Finding("ok", f"weights {name}", detail))
    return findings


def check_data(root: Path | None = None) -> Finding:
    """The art of Sticker Scenes, which training, tests and the page's examples use."""
    if root is None:
        override = os.environ.get("OVD_DATA")
        root = Path(override) if override else ROOT / "datasets" / "stickers"
    missing = [
        name for name in ("concepts.json", "splits.json", "sprites", "backgrounds") if not (root / name).exists()
    ]
    if missing:
        remedy = "restore it with `git checkout -- datasets`; unset OVD_DATA if it points elsewhere"
        return Finding("WRONG", "Sticker Scenes", f"{root} lacks {', '.join(missing)}", remedy)
    return Finding("ok", "Sticker Scenes", str(root))


def check_disk(folder: Path | None = None, free: int | None = None) -> Finding:
    """Room for checkpoints and stores where commands write by default."""
    folder = Path.cwd() if folder is None else folder
    free = shutil.disk_usage(folder).free if free is None else free
    detail = f"{free / 2**30:.1f} GiB free in {folder}"
    if free < DISK_NEEDED:
        return Finding("WRONG", "disk", detail, "free some, or give commands an output folder elsewhere (`out=FOLDER`)")
    if free < DISK_COMFORTABLE:
        return Finding("note", "disk", detail, "enough for Sticker Scenes; region stores of COCO or LVIS need more")
    return Finding("ok", "disk", detail)


def find_chromium(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """The path of a Chromium on this machine."""
    return next(filter(None, map(which, CHROMIUM)), None)


def check_chromium(which: Callable[[str], str | None] = shutil.which) -> Finding:
    """A browser for the tests marked ``browser``; nothing else needs one."""
    path = find_chromium(which)
    if path:
        return Finding("ok", "Chromium", f"{path} (for the browser tests)")
    remedy = "only the browser tests need it; on Debian: apt-get install chromium"
    return Finding("note", "Chromium", "not found", remedy)


def examine() -> list[Finding]:
    """Every check, in the order in which they are reported."""
    return [
        check_python(),
        *check_packages(),
        check_detectron2(),
        *check_device(),
        *check_weights(),
        check_data(),
        check_disk(),
        check_chromium(),
    ]


def report(findings: Iterable[Finding]) -> str:
    """The findings as text: level, subject, detail, and the remedy on a line of its own."""
    findings = list(findings)
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:5}  {finding.subject:{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':5}  {'':{width}}  -> {finding.remedy}")
    wrong = sum(finding.level == "WRONG" for finding in findings)
    lines.append(
        "everything needed is here" if wrong == 0 else f"{wrong} thing{'s' if wrong > 1 else ''} wrong, see WRONG"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ovd.doctor", description="Say what is installed and what is wrong."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    options = parser.parse_args(argv)
    findings = examine()
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if options.json else report(findings))
    return 1 if any(finding.level == "WRONG" for finding in findings) else 0


if __name__ == "__main__":
    run_cli(main)
