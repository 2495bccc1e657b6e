# SPDX-License-Identifier: Apache-2.0
"""Checks of the installation, with a remedy for each problem.

    python -m ovd.doctor            a line per finding; exit status 0 when nothing is wrong, 1 otherwise
    python -m ovd.doctor --json     the same for a bug report

A finding is ``ok``, ``note`` (something optional is absent or different) or ``WRONG`` (a command will fail).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ovd.weights import DEFAULT, problems, read_manifest, weights_root
from pretrain.engine.errors import NEEDS_TORCH, UserError, first_line, run_cli
from pretrain.engine.flags import CommandParser

Level = Literal["ok", "note", "WRONG"]
ROOT = Path(__file__).resolve().parent.parent
SETUP = "run `make setup` in the repository"

# Distribution names of what the code imports directly.
LIGHT_PACKAGES = (
    "numpy",
    "onnxruntime",
    "pillow",
    "opencv-python-headless",
    "pycocotools",
    "pydantic",
    "pyyaml",
    "safetensors",
    "threadpoolctl",
    "gradio",
)
PACKAGES = ("torch", "torchvision", *LIGHT_PACKAGES, "scipy", "open_clip_torch", "fvcore")
OPTIONAL = {
    "tensorboard": "curves of a training run beside metrics.jsonl",
    "supervision": "Detections.to_supervision(), --tiles, videos",
    "av": "annotated videos",
    "pillow-heif": "HEIC pictures",
    "argcomplete": "completion in the shell",
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
    detail = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    if (version or sys.version_info[:2]) < (3, 10):
        remedy = "install Python 3.10 or newer, then run `make PYTHON=/path/to/python3`"
        return Finding("WRONG", "Python", detail, remedy)
    return Finding("ok", "Python", detail)


def is_light() -> bool:
    """Whether this is the light environment of `make demo` or of the wheel: ONNX Runtime, no torch, no training."""
    return importlib.util.find_spec("torch") is None and importlib.util.find_spec("onnxruntime") is not None


def is_checkout() -> bool:
    """Whether the code runs from the repository, not from an installed wheel."""
    return (ROOT / "pyproject.toml").is_file()


def check_packages(lock: Path = ROOT / "requirements.lock", *, names: Iterable[str] | None = None) -> list[Finding]:
    """Installed versions of what is imported directly, beside those that were tested."""
    return [_check_package(name, _locked_versions(lock)) for name in names or PACKAGES] + [
        _check_optional(name, use) for name, use in OPTIONAL.items()
    ]


def _check_package(name: str, locked: dict[str, set[str]]) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("WRONG", name, "not installed", SETUP)
    tested = locked.get(_normalised(name), set())
    if tested and version.partition("+")[0] not in tested:
        detail = f"{version}, tested with {' or '.join(sorted(tested))}"
        return Finding("note", name, detail, f"if something fails, {SETUP} for the tested version")
    return Finding("ok", name, version)


def _check_optional(name: str, use: str) -> Finding:
    try:
        return Finding("ok", name, f"{importlib.metadata.version(name)} (optional)")
    except importlib.metadata.PackageNotFoundError:
        return Finding("note", name, "not installed (optional)", f"`pip install {name}` for {use}")


def _locked_versions(lock: Path) -> dict[str, set[str]]:
    """The versions a lock file pins, by normalised name (several when markers distinguish Pythons)."""
    locked: dict[str, set[str]] = {}
    for line in lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else ():
        if pin := re.match(r"([\w.-]+)==([^\s;]+)", line):
            locked.setdefault(_normalised(pin[1]), set()).add(pin[2])
    return locked


def _normalised(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def check_device() -> list[Finding]:
    """Where models run, and whether torchvision's operators load (they are missing when its torch is another)."""
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("WRONG", "device", f"torch or torchvision does not import: {first_line(error)}", SETUP)]
    findings = []
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        versions = f"torch {torch.__version__} and torchvision {torchvision.__version__}"
        remedy = f"{versions} do not belong together; {SETUP}"
        findings.append(Finding("WRONG", "torchvision operators", first_line(error), remedy))
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        findings.append(Finding("ok", f"device cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{cores} core{'s' * (cores > 1)} for this process, {torch.get_num_threads()} threads, {capability}"
    detail += "" if torch.cuda.is_available() else "; no CUDA device seen"
    return [*findings, Finding("ok", "device cpu", detail)]


def check_detectron2(
    probe: str = "import detectron2.modeling, detectron2.data; print(detectron2.__version__)",
) -> Finding:
    """Where Detectron2 came from, and whether it imports.

    Args:
        probe: code that prints the version; it runs in another process, so a crash in it ends up in the report.
    """
    build = f"`{Path(sys.executable)} -m ovd.build_detectron2`"
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        detail = "not installed: training and detectors in torch need it"
        return Finding("WRONG", "Detectron2", detail, f"run {build}")
    folder = Path(spec.origin).parent
    info = folder / "BUILD_INFO.json"
    if info.is_file():
        facts = json.loads(info.read_text(encoding="utf-8"))
        source = f"source archive {facts.get('archive')} (Python only), revision {facts.get('revision')}"
        origin, repair = f"built here from the {source}", f"run {build} --force"
    else:
        compiled = any(folder.glob("_C*.so")) or any(folder.glob("_C*.pyd"))
        origin = f"official build {'with' if compiled else 'without'} compiled operators"
        repair = f"repair that build, or `pip uninstall detectron2` and run {build}"
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=elsewhere, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding("WRONG", "Detectron2", f"{origin}, does not import: {reason}", repair)
    return Finding("ok", "Detectron2", f"{done.stdout.strip()}, {origin}")


def check_weights(root: Path | None = None) -> list[Finding]:
    """Every entry of the weights manifest, verified byte for byte."""
    root = weights_root() if root is None else root
    restore = "restore them with `git checkout -- weights`; unset OVD_WEIGHTS if it points elsewhere"
    try:
        entries = read_manifest(root)
    except UserError as error:
        return [Finding("WRONG", "weights", str(error), restore)]
    findings = []
    if DEFAULT not in entries:
        detail = f"not in {root / 'manifest.json'}; the page needs it"
        findings.append(Finding("WRONG", f"weights {DEFAULT}", detail, restore))
    for name, entry in entries.items():
        detail = f"{entry.bytes / 1e6:.1f} MB in {len(entry.files)} files, verified, {entry.sha256[:12]}"
        finding = Finding("ok", f"weights {name}", detail)
        if wrong := problems(entry):
            finding = Finding("WRONG", f"weights {name}", "; ".join(wrong), restore)
        findings.append(finding)
    return findings


def check_data(root: Path | None = None) -> Finding:
    """The art of Sticker Scenes, which training, tests and the page's examples use."""
    root = root or Path(os.environ.get("OVD_DATA") or ROOT / "datasets" / "stickers")
    parts = ("concepts.json", "splits.json", "sprites", "backgrounds")
    if missing := [name for name in parts if not (root / name).exists()]:
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
    if is_light():
        detail = "not installed: the page, predict and label do without"
        remedy = SETUP if is_checkout() else f"`{NEEDS_TORCH}`"
        training = Finding("note", "torch", detail, f"{remedy} for training, evaluation and `vild-sticker`")
        packages = check_packages(names=LIGHT_PACKAGES)
        return [check_python(), *packages, training, *check_weights(), check_disk()]
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


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox doctor", "Check the installation: versions, weights, devices.")
    flags.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    return flags


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    findings = examine()
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if options.json else report(findings))
    return 1 if any(finding.level == "WRONG" for finding in findings) else 0


if __name__ == "__main__":
    run_cli(main)
