# SPDX-License-Identifier: Apache-2.0
"""Write the lock files from pyproject.toml: one resolution for every Python from 3.10 on and every platform.

    python scripts/lock.py            # keep the versions that still fit, add what is missing
    python scripts/lock.py --upgrade  # take the newest versions; then run `make test-all`

Each line is one package with the SHA-256 of every file that the index has of that version, so that pip takes no other
file, on any platform. Builds from another index (torch's `+cpu`) have other hashes: docs/guide/install.md.

Needs `uv` (a package of that name), which is used for nothing else. The files name no package index and no host.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# Exact versions that were tested together: Python 3.10 or newer, Linux, macOS and Windows by the markers.\n"
    "# Hashes of all files of the package index. Written by `make lock` from pyproject.toml; do not edit.\n"
)
# The pair this repository is tested with; raise both together.
PINNED = "torch==2.14.1\ntorchvision==0.29.1\n"


def locked(file: Path) -> dict[str, str]:
    """Requirement (`name==version ; marker`) to its hashes, as pip reads them, of a lock file in pip's format."""
    text = file.read_text(encoding="utf-8").replace("\\\n", "") if file.is_file() else ""
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r"))]
    parts = [line.partition(" --hash=") for line in lines]
    return {pin.strip(): " ".join(f"{equals}{hashes}".split()) for pin, equals, hashes in parts}


def resolve(extras: list[str], old: list[str], fixed: list[str], upgrade: bool) -> dict[str, str]:
    """Resolve pyproject.toml with these extras: `fixed` must hold, `old` is preferred. Returns what `locked` does."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "constraints.txt"), Path(folder, "out.lock")
        constraints.write_text(PINNED + "\n".join(fixed) + "\n", encoding="utf-8")
        output.write_text("\n".join(old) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--no-header"]
        command += [
            "--no-annotate",
            "--generate-hashes",
            "--constraint",
            str(constraints),
            "--output-file",
            str(output),
        ]
        command += [part for extra in extras for part in ("--extra", extra)]
        command += ["--upgrade"] if upgrade else []
        subprocess.run([*command, str(ROOT / "pyproject.toml")], check=True)
        return locked(output)


def write(file: Path, packages: dict[str, str], before: str = "") -> None:
    """One line a package, so that grep can leave one out, and a changed version is one changed line."""
    lines = [f"{pin} {hashes}\n" for pin, hashes in packages.items()]
    file.write_text(HEADER + before + "".join(lines), encoding="utf-8")


def main() -> int:
    """Write the four files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the lock files from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    if shutil.which("uv") is None:
        print("error: uv is not installed; `pip install uv` in any environment on the path", file=sys.stderr)
        return 2
    runtime_file = ROOT / "requirements.lock"
    runtime = resolve(["build", "train"], list(locked(runtime_file)), [], upgrade)
    write(runtime_file, runtime)
    light_file = ROOT / "requirements-light.lock"  # a part of the former: the page, predict, label and serve
    write(light_file, resolve(["build"], list(runtime), list(runtime), upgrade))
    for extra in ("dev", "rebuild"):
        file = ROOT / f"requirements-{extra}.lock"
        more = resolve([extra, "build", "train"], [*runtime, *locked(file)], list(runtime), upgrade)
        own = {pin: hashes for pin, hashes in more.items() if pin not in runtime}
        write(file, own, before="-r requirements.lock\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
