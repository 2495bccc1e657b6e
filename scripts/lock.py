# SPDX-License-Identifier: Apache-2.0
"""Write the lock files from pyproject.toml: one resolution for every Python from 3.10 on and every platform.

    python scripts/lock.py            # keep the versions that still fit, add what is missing
    python scripts/lock.py --upgrade  # take the newest versions; then run `make test-all`

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
    "# Written by `make lock` from pyproject.toml; do not edit.\n"
)
# The pair this repository is tested with; raise both together.
PINNED = "torch==2.14.1\ntorchvision==0.29.1\n"


def pins(file: Path) -> list[str]:
    """The requirement lines of a lock file, without comments and references to other files."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def resolve(extras: list[str], old: list[str], fixed: list[str], upgrade: bool) -> list[str]:
    """Resolve pyproject.toml with these extras: `fixed` must hold, `old` is preferred."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "constraints.txt"), Path(folder, "out.lock")
        constraints.write_text(PINNED + "\n".join(fixed) + "\n", encoding="utf-8")
        output.write_text("\n".join(old) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--no-header"]
        command += ["--no-annotate", "--constraint", str(constraints), "--output-file", str(output)]
        command += [part for extra in extras for part in ("--extra", extra)]
        command += ["--upgrade"] if upgrade else []
        subprocess.run([*command, str(ROOT / "pyproject.toml")], check=True)
        return pins(output)


def main() -> int:
    """Write the four files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the lock files from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    if shutil.which("uv") is None:
        print("error: uv is not installed; `pip install uv` in any environment on the path", file=sys.stderr)
        return 2
    runtime_file = ROOT / "requirements.lock"
    runtime = resolve(["build", "train"], pins(runtime_file), [], upgrade)
    runtime_file.write_text(HEADER + "\n".join(runtime) + "\n", encoding="utf-8")
    light_file = ROOT / "requirements-light.lock"  # a part of the former: the page, predict, label and serve
    light_file.write_text(HEADER + "\n".join(resolve(["build"], runtime, runtime, upgrade)) + "\n", encoding="utf-8")
    for extra in ("dev", "rebuild"):
        file = ROOT / f"requirements-{extra}.lock"
        more = resolve([extra, "build", "train"], runtime + pins(file), runtime, upgrade)
        own = [line for line in more if line not in runtime]
        file.write_text(HEADER + "-r requirements.lock\n" + "\n".join(own) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
