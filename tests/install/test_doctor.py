# SPDX-License-Identifier: Apache-2.0
"""The doctor names what is wrong and says what to do about it."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ovd import doctor
from ovd.doctor import Finding
from ovd.weights import add_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    source = tmp_path / "made"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"tensors")
    add_weights(source, "vild-photo", tmp_path / "weights")
    return tmp_path / "weights"


def test_doctor__every_problem_has_a_remedy(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (weights / "vild-photo" / "model.safetensors").unlink()
    monkeypatch.setattr(doctor, "PACKAGES", ("a-package-that-is-not-there",))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    findings = [
        doctor.check_python((3, 9)),
        *doctor.check_packages()[:1],
        doctor.check_detectron2(),
        *doctor.check_weights(weights),
        *doctor.check_weights(tmp_path / "no weights"),
        doctor.check_data(tmp_path),
        doctor.check_disk(tmp_path, free=1000),
    ]
    assert {finding.level for finding in findings} == {"WRONG"}
    assert all(finding.remedy for finding in findings)


def test_doctor__verified_weights_are_ok_and_a_changed_byte_is_wrong(weights: Path) -> None:
    (good,) = doctor.check_weights(weights)
    assert good.level == "ok" and "verified" in good.detail
    (weights / "vild-photo" / "model.safetensors").write_bytes(b"tensorz")
    (bad,) = doctor.check_weights(weights)
    assert bad.level == "WRONG" and "SHA-256" in bad.detail and "git checkout" in bad.remedy


def test_doctor__missing_default_weights_are_wrong(tmp_path: Path) -> None:
    source = tmp_path / "made"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"tensors")
    add_weights(source, "another", tmp_path / "weights")
    levels = {finding.subject: finding.level for finding in doctor.check_weights(tmp_path / "weights")}
    assert levels == {"weights vild-photo": "WRONG", "weights another": "ok"}


def test_doctor__another_version_than_the_tested_one_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "numpy"))
    monkeypatch.setattr(doctor.importlib.metadata, "version", {"torch": "2.0.1+cpu", "numpy": "1.26.4"}.__getitem__)
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# comment==1\ntorch==2.0.1 --hash=sha256:00\nnumpy==2.2.6 ; python_full_version < '3.11' --hash=sha256:00\n"
        "numpy==2.4.6 ; python_full_version >= '3.11'\n"
    )
    torch, numpy = doctor.check_packages(lock)
    assert torch == Finding("ok", "torch", "2.0.1+cpu")
    assert numpy.level == "note" and "tested with 2.2.6 or 2.4.6" in numpy.detail


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "BUILD_INFO.json",
            '{"archive": "pb1-detectron2==0.6", "revision": 1}',
            "built here from the source archive pb1",
        ),
        ("_C.cpython-311-x86_64-linux-gnu.so", "", "official build with compiled operators"),
        ("readme.txt", "", "official build without compiled operators"),
    ],
)
@pytest.mark.parametrize("works", [True, False], ids=["imports", "broken"])
def test_doctor__detectron2_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, expected: str, works: bool
) -> None:
    (tmp_path / file).write_text(content)
    spec = importlib.machinery.ModuleSpec("detectron2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    finding = doctor.check_detectron2("print('0.6')" if works else "raise ImportError('no operator nms')")
    assert expected in finding.detail
    assert finding.level == ("ok" if works else "WRONG")
    assert ("no operator nms" in finding.detail) is not works
    assert bool(finding.remedy) is not works


def test_doctor__the_device_report_names_the_processor() -> None:
    findings = doctor.check_device()
    assert [finding.level for finding in findings if finding.subject == "device cpu"] == ["ok"]
    assert all(finding.level == "ok" for finding in findings)


def test_doctor__a_missing_browser_is_only_a_note() -> None:
    assert doctor.check_chromium(lambda name: None).level == "note"
    found = doctor.check_chromium(lambda name: "/usr/bin/google-chrome" if name == "google-chrome" else None)
    assert found.level == "ok" and "/usr/bin/google-chrome" in found.detail


@pytest.mark.parametrize(("free", "level"), [(1 << 29, "WRONG"), (2 << 30, "note"), (50 << 30, "ok")])
def test_doctor__free_disk(tmp_path: Path, free: int, level: str) -> None:
    assert doctor.check_disk(tmp_path, free).level == level


@pytest.mark.parametrize(
    ("findings", "status", "last"),
    [
        ([Finding("ok", "a", "1"), Finding("note", "b", "2", "do c")], 0, "everything needed is here"),
        ([Finding("ok", "a", "1"), Finding("WRONG", "b", "2", "do c")], 1, "1 thing wrong, see WRONG"),
    ],
)
def test_doctor__exit_status_follows_the_report(
    findings: list[Finding],
    status: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main([]) == status
    text = capsys.readouterr().out
    assert "-> do c" in text and text.strip().splitlines()[-1] == last
    assert doctor.main(["--json"]) == status
    assert [item["level"] for item in json.loads(capsys.readouterr().out)] == [finding.level for finding in findings]


def test_doctor__the_command_runs_here_and_its_status_fits_its_report() -> None:
    done = subprocess.run([sys.executable, "-m", "ovd.doctor"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert ("WRONG" in done.stdout) is (done.returncode == 1)
    for subject in ("Python", "torch", "Detectron2", "device cpu", "weights", "Sticker Scenes", "disk", "Chromium"):
        assert subject in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("checkout", [False, True])
def test_doctor__works_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkout: bool) -> None:
    if checkout:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    findings = doctor.examine()
    assert [finding.subject for finding in findings if finding.level == "WRONG"] == []
    (torch,) = [finding for finding in findings if finding.subject == "torch"]
    assert torch.level == "note" and ("make setup" if checkout else 'pip install "wordbox[train]"') in torch.remedy
