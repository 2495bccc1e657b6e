# SPDX-License-Identifier: Apache-2.0
"""Build ``wordbox-*.whl`` with the exported default detector in it.

    python scripts/build_wheel.py               # dist/wordbox-VERSION-py3-none-any.whl
    python scripts/build_wheel.py --out FOLDER

The wheel needs no torch: ``pip install dist/wordbox-*.whl``, then ``wordbox demo`` or ``wordbox predict``. The export
lies in ``ovd/shipped`` while the wheel is built, the configurations in ``pretrain/configs``; git ignores both folders,
and they are removed afterwards.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ovd.export import export
from ovd.runtime.files import INT8_FOLDER
from ovd.weights import DEFAULT, SHIPPED, add_weights
from pretrain.engine.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 95_000_000  # bytes: package indexes refuse files of 100 MB


def build(out: Path) -> Path:
    """Export, build, and return the wheel.

    Raises:
        UserError: the wheel is not built, or too large.
    """
    shipped, configs = ROOT / "ovd" / SHIPPED, ROOT / "pretrain/configs"
    for folder_made in (shipped, configs):
        shutil.rmtree(folder_made, ignore_errors=True)
    try:
        shutil.copytree(ROOT / "configs", configs)
        with tempfile.TemporaryDirectory() as folder:
            exported = export(DEFAULT, Path(folder, DEFAULT))
            add_int8(exported, export(DEFAULT, Path(folder, "int8"), int8=True))
            add_weights(exported, DEFAULT, shipped)
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
            command += ["--no-build-isolation", "--wheel-dir", folder, str(ROOT)]
            if subprocess.run(command, check=False).returncode:
                raise UserError("pip cannot build the wheel; its message is above")
            (made,) = Path(folder).glob("wordbox-*.whl")
            out.mkdir(parents=True, exist_ok=True)
            wheel = Path(shutil.copy(made, out / made.name))
    finally:
        for folder_made in (shipped, configs):
            shutil.rmtree(folder_made, ignore_errors=True)
    if wheel.stat().st_size > LARGEST:
        raise UserError(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}")
    return wheel


def add_int8(exported: Path, small: Path) -> None:
    """Add to an export the files that differ in 8 bits; `ovd.runtime.files.export_file` reads the others above it."""
    (exported / INT8_FOLDER).mkdir()
    for file in small.iterdir():
        if not filecmp.cmp(file, exported / file.name, shallow=False):
            shutil.copy(file, exported / INT8_FOLDER)


def main(argv: list[str]) -> int:
    """Build the wheel; returns the exit status."""
    flags = argparse.ArgumentParser(description="Build the wheel with the exported default detector.")
    flags.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default dist)")
    wheel = build(flags.parse_args(argv).out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_cli(main)
