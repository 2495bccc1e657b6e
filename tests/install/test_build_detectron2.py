# SPDX-License-Identifier: Apache-2.0
"""The Detectron2 build script on small made-up archives: no network, and this environment stays untouched."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ovd" / "build_detectron2.py"

# Every construct that a patch is there for, plus look-alikes that must stay as they are.
FILES = {
    "setup.py": "raise SystemExit('setup.py must never run')\n",
    "LICENSE": "licence text\n",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/structures.py": "import numpy as np\nkinds = [np.bool, np.int, np.float, np.str, np.object]\n"
    "kept = 'np.bool_ np.int64 np.floating np.strings'\n",
    "detectron2/transform.py": "from PIL import Image\n\ndef warp(interp=Image.LINEAR):\n    return interp\n",
    "detectron2/model_zoo/__init__.py": "",
    "detectron2/model_zoo/model_zoo.py": "import os\nimport pkg_resources\nimport sys\n\ndef where(name):\n"
    "    return pkg_resources.resource_filename(\n"
    '        "detectron2.model_zoo", os.path.join("configs", name)\n    )\n',
    "detectron2/model_zoo/configs/base.yaml": "NAME: np.bool\n",
    "projects/PointRend/point_rend/__init__.py": "x = 1\n",
    "tools/__init__.py": "",
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_detectron2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_detectron2"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_script()


def make_archive(folder: Path, files: dict[str, str] | None = None) -> tuple[Path, str]:
    """Write a source archive; returns its path and SHA-256."""
    path = folder / "pb1-detectron2-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (FILES if files is None else files).items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            content = text.encode()
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def run_script(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script as a person does, with one folder in front of the module search path."""
    environment = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False, env=environment
    )


def test_download__a_wrong_hash_is_refused_and_nothing_written(tmp_path: Path) -> None:
    archive, _ = make_archive(tmp_path)
    wheels = tmp_path / "wheels"
    done = run_script("--archive", str(archive), "--wheel-dir", str(wheels))
    assert done.returncode == 2
    assert (
        "SHA-256 is" in done.stderr and build.ARCHIVE_SHA256 in done.stderr and "nothing was installed" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not wheels.exists()


def test_download__a_wrong_hash_is_refused_before_pip_installs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, _ = make_archive(tmp_path)
    installed: list[Path] = []
    monkeypatch.setattr(build, "install", installed.append)
    monkeypatch.setattr(build, "find_installed", lambda: None)
    assert build.main(["--archive", str(archive)]) == 2
    assert installed == []
    assert "SHA-256" in capsys.readouterr().err


def test_download__pip_gets_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip must refuse another file before it runs that file's setup.py, and no index may be named here."""
    seen: dict[str, str] = {}

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen["command"] = " ".join(command)
        seen["requirement"] = Path(command[command.index("--requirement") + 1]).read_text()
        return subprocess.CompletedProcess(command, 1, "", "THESE PACKAGES DO NOT MATCH THE HASHES")

    monkeypatch.setattr(build.subprocess, "run", pip)
    with pytest.raises(build.Refused, match="DO NOT MATCH THE HASHES"):
        build.download(tmp_path)
    assert seen["requirement"].strip() == f"pb1-detectron2==0.6 --hash=sha256:{build.ARCHIVE_SHA256}"
    assert "http" not in seen["command"] and "index" not in seen["command"]


def test_present_build__an_importable_detectron2_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "detectron2"
    for name in ("modeling", "data"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    (package / "__init__.py").write_text('__version__ = "0.7.official"\n')
    (package / "layers.py").write_text("batched_nms = ROIAlign = object()\n")
    before = sorted(path for path in package.rglob("*.py"))
    # The archive does not exist: it must not even be looked at.
    done = run_script("--archive", str(tmp_path / "none.tar.gz"), path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.7.official" in done.stdout and "used as it is" in done.stdout
    assert sorted(path for path in package.rglob("*.py")) == before


def test_present_build__a_broken_foreign_detectron2_is_left_alone_and_reported(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import a_module_that_is_missing\n")
    archive, _ = make_archive(tmp_path)
    done = run_script("--archive", str(archive), path=tmp_path)
    assert done.returncode == 2
    assert "does not import" in done.stderr and "a_module_that_is_missing" in done.stderr and "--force" in done.stderr


def test_present_build__an_empty_left_over_folder_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "detectron2" / "__pycache__").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # Without site-packages (-S) the only detectron2 on the path is the left-over folder.
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(build.sys, "executable", str(wrapper))
    assert build.find_installed() is None


def test_patches__change_what_was_removed_and_nothing_else(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path)
    wheel = build.build_wheel(archive, tmp_path, expected_sha256=digest)
    with zipfile.ZipFile(wheel) as files:
        structures = files.read("detectron2/structures.py").decode()
        assert "kinds = [bool, int, float, str, object]" in structures
        assert "kept = 'np.bool_ np.int64 np.floating np.strings'" in structures
        assert "Image.BILINEAR" in files.read("detectron2/transform.py").decode()
        assert "pkg_resources" not in files.read("detectron2/model_zoo/model_zoo.py").decode()
        assert files.read("detectron2/model_zoo/configs/base.yaml") == b"NAME: np.bool\n"
        info = json.loads(files.read("detectron2/BUILD_INFO.json"))
    assert info["sha256"] == digest
    assert sorted(info["patches"].values()) == [1, 1, 1, 5]


@pytest.mark.parametrize(
    ("file", "text", "patch"),
    [
        ("detectron2/structures.py", "import numpy as np\n", "numpy 1.24"),
        ("detectron2/transform.py", "from PIL import Image\n", "Pillow 10"),
        ("detectron2/model_zoo/model_zoo.py", "import os\n", "pkg_resources"),
    ],
)
def test_patches__one_that_matches_nothing_is_an_error(tmp_path: Path, file: str, text: str, patch: str) -> None:
    archive, digest = make_archive(tmp_path, {**FILES, file: text})
    with pytest.raises(build.Refused, match=f"match nothing.*{patch}"):
        build.build_wheel(archive, tmp_path / "wheels", expected_sha256=digest)
    assert not (tmp_path / "wheels").exists()


def test_archive__without_the_package_or_damaged_is_refused(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path, {"setup.py": ""})
    with pytest.raises(build.Refused, match="holds no detectron2 package"):
        build.build_wheel(archive, tmp_path, expected_sha256=digest)
    archive.write_bytes(b"not an archive")
    digest = hashlib.sha256(b"not an archive").hexdigest()
    with pytest.raises(build.Refused, match=r"not a readable \.tar\.gz"):
        build.build_wheel(archive, tmp_path, expected_sha256=digest)
    with pytest.raises(build.Refused, match="no such file"):
        build.build_wheel(tmp_path / "none", tmp_path)


def test_wheel__is_named_detectron2_and_its_record_is_right(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path)
    wheel = build.build_wheel(archive, tmp_path / "wheels", expected_sha256=digest)
    assert wheel.name == f"detectron2-{build.WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        dist = f"detectron2-{build.WHEEL_VERSION}.dist-info"
        metadata = files.read(f"{dist}/METADATA").decode()
        for path, digest_text, size in csv.reader(files.read(f"{dist}/RECORD").decode().splitlines()):
            names.remove(path)
            if size:
                content = files.read(path)
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest_text, int(size)) == (f"sha256={expected}", len(content))
        assert names == set()
        everything = set(files.namelist())
    assert "Name: detectron2\n" in metadata and "Requires-Dist: black" not in metadata
    assert "detectron2/projects/point_rend/__init__.py" in everything
    assert f"{dist}/licenses/LICENSE" in everything
    assert not any(name.startswith(("tools/", "setup", "projects/")) for name in everything)


def test_wheel__the_same_archive_gives_the_same_bytes(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path)
    first = build.build_wheel(archive, tmp_path / "a", expected_sha256=digest).read_bytes()
    assert build.build_wheel(archive, tmp_path / "b", expected_sha256=digest).read_bytes() == first


def test_archive__members_that_leave_it_are_ignored(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path, {**FILES, "detectron2/../../evil.py": "x = 1\n"})
    wheel = build.build_wheel(archive, tmp_path, expected_sha256=digest)
    assert not any("evil" in name for name in zipfile.ZipFile(wheel).namelist())


def test_wheel__works_and_its_missing_operators_raise(tmp_path: Path) -> None:
    archive, digest = make_archive(tmp_path)
    wheel = build.build_wheel(archive, tmp_path, expected_sha256=digest)
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = (
        "from detectron2.model_zoo.model_zoo import where\n"
        "import importlib.metadata as m; print(m.version('detectron2'), open(where('base.yaml')).read().strip())\n"
        "from detectron2 import _C\n"
        "try:\n    _C.box_iou_rotated\nexcept RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(target)}
    )
    assert done.returncode == 0, done.stderr
    assert f"{build.WHEEL_VERSION} NAME: np.bool" in done.stdout
    assert "detectron2._C.box_iou_rotated is a compiled operator" in done.stdout


def test_present_build__one_of_this_script_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = build.Installed(tmp_path, "0.6", {"revision": build.REVISION}, None)
    monkeypatch.setattr(build, "find_installed", lambda: present)
    assert build.main(["--archive", str(tmp_path / "none")]) == 0
    assert "already installed" in capsys.readouterr().out
    # Older patches, or a damaged install of ours: built again (and here refused, since the archive is missing).
    for stale in (
        build.Installed(tmp_path, "0.6", {"revision": build.REVISION - 1}, None),
        build.Installed(tmp_path, "", {"revision": build.REVISION}, "ImportError: x"),
    ):
        monkeypatch.setattr(build, "find_installed", lambda stale=stale: stale)
        assert build.main(["--archive", str(tmp_path / "none")]) == 2
        assert "no such file" in capsys.readouterr().err
