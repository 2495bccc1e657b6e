# SPDX-License-Identifier: Apache-2.0
"""The lock files: every package with a version and hashes, a line each, from no particular host."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("requirements.lock", "requirements-dev.lock", "requirements-rebuild.lock")
PIN = re.compile(r"[a-z0-9-]+==[\w.]+( ; [^#]+)?( --hash=sha256:[0-9a-f]{64})+")


def packages(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("#", "-r "))]


@pytest.mark.parametrize("name", FILES)
def test_lock_file__every_line_is_a_package_with_its_version_and_hashes(name: str) -> None:
    assert packages(name) and [line for line in packages(name) if not PIN.fullmatch(line)] == []


def test_lock_file__holds_what_builds_packages_without_a_wheel() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    built = re.findall(r"grep '\^(\w+)==' requirements\.lock", makefile)
    assert built == ["setuptools"] and any(line.startswith("setuptools==") for line in packages(FILES[0]))
    installs = [line for line in makefile.splitlines() if re.search(r"-r \S+\.lock", line)]
    assert installs and all(line.startswith("\t$(LOCKED)") or " --require-hashes " in line for line in installs)
    assert "LOCKED := PIP_USE_PEP517=1 $(PIP) install --require-hashes --no-build-isolation\n" in makefile


def test_lock_file__is_read_however_pip_writes_it(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts/lock.py"))
    file = tmp_path / "some.lock"
    file.write_text(
        "# head\n-r other.lock\na==1 ; python_version < '3.11' \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\nb==2\n"
    )
    found = script["locked"](file)
    assert found == {"a==1 ; python_version < '3.11'": "--hash=sha256:0 --hash=sha256:1", "b==2": ""}
    script["write"](file, {"a==1": "--hash=sha256:0"}, before="-r other.lock\n")
    assert file.read_text().splitlines()[-2:] == ["-r other.lock", "a==1 --hash=sha256:0"]
    assert script["locked"](file) == {"a==1": "--hash=sha256:0"}
