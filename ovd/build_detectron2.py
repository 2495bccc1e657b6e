# SPDX-License-Identifier: Apache-2.0
"""Install Detectron2 without a compiler.

Detectron2 is not in the package index under its own name. The source archive ``pb1-detectron2==0.6`` is there: its
Python files are byte for byte those of Detectron2's tag v0.6, without the C++ sources. RoIAlign and NMS come from
torchvision, so a wheel of the Python files alone trains and runs a Mask R-CNN. This script fetches that archive by name
through pip, checks its SHA-256, patches what newer numpy, Pillow and setuptools removed, and installs a wheel named
``detectron2``.

A working ``detectron2`` that is already importable (an official build with its compiled operators) is used untouched.

    python -m ovd.build_detectron2                     # download, check, patch, install
    python -m ovd.build_detectron2 --archive FILE      # a machine without network: bring the .tar.gz yourself
    python -m ovd.build_detectron2 --wheel-dir DIR     # only write the wheel

Standard library only. Exit status: 0 done or nothing to do, 2 refused (the message says why and what to do).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ARCHIVE_NAME = "pb1-detectron2"
ARCHIVE_VERSION = "0.6"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# Raise REVISION whenever a patch below changes: an installed wheel of another revision is then rebuilt.
REVISION = 1
WHEEL_VERSION = f"0.6+purepython.{REVISION}"
BUILD_INFO = "BUILD_INFO.json"

# What is imported by `import detectron2.*`; the archive's own list adds tools (black, tensorboard, pydot, future) that
# nothing here calls, and pins iopath and black to releases that no longer install.
REQUIRES = (
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1",
    "packaging",
    "pillow",
    "pycocotools>=2.0.2",
    "pyyaml",
    "tabulate",
    "termcolor>=1.1",
    "torch>=2.0",
    "torchvision",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

# The folders that the archive's own setup.py installs under detectron2.projects.
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}

STUB = '''"""Stands in place of Detectron2's compiled operators, which this build does not have."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name} is a compiled operator and this Detectron2 was built without a compiler. Rotated boxes, "
        "deformable convolution and COCOEvaluator(use_fast_impl=True) need an official Detectron2 build; everything "
        "else works."
    )
'''

RESOURCE_HELPER = """from importlib.resources import files as _resource_files


def _resource_filename(package, name):
    return str(_resource_files(package).joinpath(name))
"""


class Refused(Exception):
    """The archive or the environment is not what it must be; nothing was installed."""


@dataclass(frozen=True)
class SourcePatch:
    """One mechanical change: `pattern` becomes `replacement` in the files whose wheel path ends in `suffix`."""

    name: str
    pattern: str
    replacement: str
    suffix: str = ".py"

    def apply(self, path: str, text: str) -> tuple[str, int]:
        """Return the changed text and the number of replacements made in it."""
        if not path.endswith(self.suffix):
            return text, 0
        return re.subn(self.pattern, lambda match: match.expand(self.replacement), text, flags=re.MULTILINE)


# The extension module itself needs no patch: the wheel is written here, the archive's setup.py has no part in it, and
# detectron2/_C.py (STUB) takes the place of the compiled file.
PATCHES = (
    SourcePatch("numpy 1.24 removed np.bool, np.int, np.float ...", r"\bnp\.(bool|int|float|str|object)\b", r"\1"),
    SourcePatch("Pillow 10 removed Image.LINEAR", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    SourcePatch(
        "setuptools 82 removed pkg_resources (import)",
        r"^import pkg_resources\n",
        RESOURCE_HELPER.replace("\\", "\\\\"),
        "model_zoo/model_zoo.py",
    ),
    SourcePatch(
        "setuptools 82 removed pkg_resources (call)",
        r"\bpkg_resources\.resource_filename\(",
        "_resource_filename(",
        "model_zoo/model_zoo.py",
    ),
)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_archive(archive: Path, expected_sha256: str) -> None:
    """Raise `Refused` unless `archive` is the file with that hash."""
    if not archive.is_file():
        raise Refused(f"{archive}: no such file. Give the path of {ARCHIVE_NAME}-{ARCHIVE_VERSION}.tar.gz")
    actual = sha256_of(archive)
    if actual != expected_sha256:
        raise Refused(
            f"{archive}: SHA-256 is {actual}, expected {expected_sha256}. "
            "The archive was changed or is incomplete; nothing was installed. Delete it and fetch it again."
        )


def download(folder: Path) -> Path:
    """Fetch the source archive into `folder` through pip, from whatever index pip is configured with.

    The hash stands in the requirement, so pip refuses another file before it runs any code of it. pip asks every source
    archive for its metadata, which runs its setup.py, which imports torch: hence no build isolation.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{ARCHIVE_NAME}=={ARCHIVE_VERSION} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    run_pip(
        "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder),
        "--requirement", str(requirement), what=f"fetch {ARCHIVE_NAME}=={ARCHIVE_VERSION}",
        hint="\ntorch and setuptools must be installed first. Without network, copy the archive here and pass "
        "--archive FILE.",
    )  # fmt: skip
    found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise Refused(f"pip left {len(found)} archives in {folder}, expected one")
    return found[0]


def run_pip(command: str, *arguments: str, what: str, hint: str = "") -> None:
    """Run a command of pip; raise `Refused` with the end of what it says if it fails."""
    words = [sys.executable, "-m", "pip", command, "--quiet", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-12:])
        raise Refused(f"pip could not {what}:\n{tail}{hint}")


def read_sources(archive: Path) -> dict[str, bytes]:
    """Read the package's files from the archive: wheel path -> content. Nothing is unpacked to disk or executed."""
    sources: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not member.isfile() or len(parts) < 2 or ".." in parts:
                    continue
                stream = tar.extractfile(member)
                target = wheel_path("/".join(parts[1:]))
                if stream is not None and target is not None:
                    sources[target] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Refused(f"{archive}: not a readable .tar.gz ({error})") from error
    if "detectron2/__init__.py" not in sources:
        raise Refused(f"{archive}: holds no detectron2 package")
    return sources


def wheel_path(name: str) -> str | None:
    """Where a file of the archive goes in the wheel; None when it is not installed (tools, setup.py, egg-info)."""
    for source, target in PROJECTS.items():
        if name.startswith(source + "/"):
            return target + name[len(source) :]
    if name == "LICENSE" or name.startswith("detectron2/"):
        return name
    return None


def patch_sources(sources: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, int]]:
    """Apply every patch to every file.

    Returns:
        The changed files, and how often each patch was applied.

    Raises:
        Refused: a patch that matches nothing; then the archive is not the one the patches were written for.
    """
    changed = dict(sources)
    counts = {patch.name: 0 for patch in PATCHES}
    for path, content in sources.items():
        if not path.endswith(".py"):
            continue
        text = content.decode("utf-8")
        for patch in PATCHES:
            text, count = patch.apply(path, text)
            counts[patch.name] += count
        changed[path] = text.encode("utf-8")
    idle = [name for name, count in counts.items() if count == 0]
    if idle:
        raise Refused("these patches match nothing in the archive, nothing was installed: " + "; ".join(idle))
    return changed, counts


def write_wheel(sources: dict[str, bytes], counts: dict[str, int], folder: Path, archive_sha256: str) -> Path:
    """Write the wheel. The same sources give the same bytes (fixed order and time stamps)."""
    files = {path: content for path, content in sources.items() if path != "LICENSE"}
    files["detectron2/_C.py"] = STUB.encode()
    info = {
        "archive": f"{ARCHIVE_NAME}=={ARCHIVE_VERSION}",
        "sha256": archive_sha256,
        "revision": REVISION,
        "patches": counts,
    }
    files[f"detectron2/{BUILD_INFO}"] = (json.dumps(info, indent=2) + "\n").encode()
    dist = f"detectron2-{WHEEL_VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {WHEEL_VERSION}"]
    metadata += ["Summary: Detectron2 v0.6, Python files only (operators from torchvision)", "License: Apache-2.0"]
    metadata += ["Requires-Python: >=3.10", *(f"Requires-Dist: {requirement}" for requirement in REQUIRES)]
    files[f"{dist}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    wheel_lines = ["Wheel-Version: 1.0", "Generator: build_detectron2", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    files[f"{dist}/WHEEL"] = ("\n".join(wheel_lines) + "\n").encode()
    if "LICENSE" in sources:
        files[f"{dist}/licenses/LICENSE"] = sources["LICENSE"]
    record = []
    for path, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(content)}")
    files[f"{dist}/RECORD"] = ("\n".join([*record, f"{dist}/RECORD,,"]) + "\n").encode()

    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        for path in sorted(files, key=lambda name: (name.startswith(dist), name)):
            entry = zipfile.ZipInfo(path, date_time=(2021, 11, 15, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            out.writestr(entry, files[path])
    return wheel


def build_wheel(archive: Path, folder: Path, *, expected_sha256: str = ARCHIVE_SHA256) -> Path:
    """Check, patch and repack the source archive as a wheel in `folder`.

    Raises:
        Refused: wrong hash, unreadable archive, or a patch that matches nothing. No wheel is written then.
    """
    check_archive(archive, expected_sha256)
    sources, counts = patch_sources(read_sources(archive))
    return write_wheel(sources, counts, folder, expected_sha256)


@dataclass(frozen=True)
class Installed:
    """What `import detectron2` gives in this environment."""

    folder: Path
    version: str
    build_info: dict[str, object] | None
    error: str | None

    @property
    def ours(self) -> bool:
        return self.build_info is not None


def find_installed() -> Installed | None:
    """Look for a detectron2 in this environment; it is imported in another process, so a crash there stays there.

    Returns:
        None when there is none; otherwise `error` says why importing it failed, or is None when it works.
    """
    find = (
        "import importlib.util as u; s = u.find_spec('detectron2');"
        "print(list(s.submodule_search_locations)[0] if s and s.origin else '')"  # no origin: an empty left-over folder
    )
    probe = "import detectron2, detectron2.modeling, detectron2.data, detectron2.layers as l; l.batched_nms; l.ROIAlign"
    with tempfile.TemporaryDirectory() as elsewhere:  # not the current folder: it could hold a folder named detectron2
        found = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, cwd=elsewhere, check=False)
        place = found.stdout.strip()
        if found.returncode != 0 or not place:
            return None
        command = [sys.executable, "-c", f"{probe}; print(detectron2.__version__)"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, check=False)
    info_file = Path(place) / BUILD_INFO
    info = json.loads(info_file.read_text(encoding="utf-8")) if info_file.is_file() else None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Installed(Path(place), "", info, lines[-1])
    return Installed(Path(place), done.stdout.strip().splitlines()[-1], info, None)


def install(wheel: Path) -> None:
    """Install the wheel into the environment this script runs in, with what it needs."""
    for options in ((), ("--force-reinstall", "--no-deps")):
        run_pip("install", *options, str(wheel), what=f"install {wheel.name}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Install Detectron2 without a compiler.")
    parser.add_argument("--archive", type=Path, help="use this source archive instead of downloading it")
    parser.add_argument("--wheel-dir", type=Path, help="only write the wheel into this folder; install nothing")
    parser.add_argument("--force", action="store_true", help="rebuild, and replace a detectron2 that does not import")
    options = parser.parse_args(argv)
    try:
        return run(options.archive, options.wheel_dir, force=options.force)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(archive: Path | None, wheel_dir: Path | None, *, force: bool) -> int:
    """Do what the command line asks for."""
    if wheel_dir is None:
        present = find_installed()
        if present is not None and not present.ours:
            if present.error is None:
                print(f"detectron2 {present.version} in {present.folder} works: it is used as it is")
                return 0
            if not force:
                raise Refused(
                    f"there is a detectron2 in {present.folder} that does not import ({present.error}). It was not "
                    "made by this script, so it is left alone. Repair it, or `pip uninstall detectron2`, or run again "
                    "with --force."
                )
        elif present is not None and present.error is None and not force:
            if present.build_info is not None and present.build_info.get("revision") == REVISION:
                print(f"detectron2 {WHEEL_VERSION} is already installed in {present.folder}")
                return 0
    with tempfile.TemporaryDirectory() as scratch:
        source = archive if archive is not None else download(Path(scratch))
        wheel = build_wheel(source, wheel_dir if wheel_dir is not None else Path(scratch))
        if wheel_dir is not None:
            print(f"wrote {wheel}")
            return 0
        install(wheel)
    present = find_installed()
    if present is None or present.error is not None:
        raise Refused(f"detectron2 was installed but does not import: {present.error if present else 'not found'}")
    print(f"installed detectron2 {WHEEL_VERSION} into {present.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
