# SPDX-License-Identifier: Apache-2.0
"""Starting the page: flags, ports, environment, shipped examples."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app import parser
from ovd.demo import gradio_environment
from ovd.demo.address import listen, url_of
from ovd.demo.gradio_environment import prepare_environment, remove_leftovers
from ovd.demo.page import EXAMPLES, _card_text, shipped_examples
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--port", "-1"], ["--port", "http"], ["--prot", "1"], ["--threads", "0"]]
)
def test_flags__bad_ones_are_named_in_one_line(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=arguments[0]) as caught:
        parser().parse_args(arguments)
    assert "\n" not in str(caught.value)


def test_flags__defaults_are_local_and_private() -> None:
    options = parser().parse_args([])
    assert (options.host, options.port, options.share, options.browser) == ("127.0.0.1", 7860, False, False)


def test_port__taken_one_exits_with_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
        command = [sys.executable, "app.py", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and str(port) in done.stderr and done.stderr.count("\n") == 1


def test_port__is_taken_before_loading() -> None:
    with listen("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            listen("127.0.0.1", port)


SLOW = ("torch", "gradio", "numpy", "uvicorn")
FLAG_ERRORS = (["--help"], ["--port", "x"], ["--host", "no.such.name.invalid"], ["--host", "192.0.2.1"])


@pytest.mark.parametrize("arguments", FLAG_ERRORS, ids=" ".join)
def test_flags__are_checked_before_slow_imports(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\nfrom app import main\nfrom pretrain.engine.errors import run_cli\n"
        f"atexit.register(lambda: print('IMPORTED', [m for m in {SLOW} if m in sys.modules]))\nrun_cli(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert "IMPORTED []" in done.stdout and "Traceback" not in done.stderr


def test_weights__unknown_ones_exit_with_2() -> None:
    command = [sys.executable, "app.py", "--port", "0", "--weights", "no/such/weights"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no/such/weights" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.name.invalid", "", "[", "a" * 300])
def test_host__foreign_one_is_a_user_error(host: str) -> None:
    with pytest.raises(UserError, match="not an address of this machine"):
        listen(host, 0)


def test_port__is_held_from_the_check_on() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        listener.listen()
        with pytest.raises(UserError, match="is taken"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("localhost", "http://localhost:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("[::1]", "http://[::1]:80"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:80"),
    ],
)
def test_url_of__can_be_typed_into_a_browser(host: str, url: str) -> None:
    assert url_of(host, 80) == url


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whatever a test does to the environment is undone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


def test_environment__telemetry_is_off(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    folder = prepare_environment(tmp_path / "uploads")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["HF_HUB_OFFLINE"] == "1"


def test_environment__gradio_launch_variables_are_ignored(
    tmp_path: Path, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("GRADIO_SHARE", "true")
    environment.setenv("GRADIO_NUM_WORKERS", "many")
    environment.setenv("GRADIO_ROOT_PATH", "/wordbox")
    prepare_environment(tmp_path / "uploads")
    assert "GRADIO_SHARE" not in os.environ and os.environ["GRADIO_ROOT_PATH"] == "/wordbox"
    assert "GRADIO_NUM_WORKERS, GRADIO_SHARE: ignored" in caplog.text
    environment.setenv("GRADIO_ROOT_PATH", "wordbox")
    with pytest.raises(UserError, match="GRADIO_ROOT_PATH"):
        prepare_environment(tmp_path / "uploads")


def test_uploads__unwritable_folder_is_a_user_error(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="TMPDIR"):
        prepare_environment(tmp_path / "file" / "uploads")


HOLDER = (
    "import sys, time; from ovd.demo.gradio_environment import prepare_environment as prepare\n"
    "print(prepare(), flush=True); time.sleep(60)"
)


def test_uploads__of_a_killed_page_are_removed(tmp_path: Path) -> None:
    start = {"cwd": ROOT, "env": os.environ | {"TMPDIR": str(tmp_path)}, "stdout": subprocess.PIPE, "text": True}
    folders, pages = [], [subprocess.Popen([sys.executable, "-c", HOLDER], **start) for _ in range(2)]
    for page in pages:
        assert page.stdout is not None
        folders.append(Path(page.stdout.readline().strip()))
    (folders[0] / "secret.png").write_bytes(b"x")
    (tmp_path / "ovd-page-link").symlink_to(tmp_path)
    pages[0].kill()
    pages[0].wait()
    assert remove_leftovers(tmp_path) == [folders[0]]
    assert not folders[0].exists() and folders[1].is_dir() and (tmp_path / "ovd-page-link").is_symlink()
    pages[1].kill()
    pages[1].wait()


def test_folder_of_a_starting_page__is_not_removed_by_another_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other page starts at the worst moment: between the making of the folder and its lock."""
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gradio_environment, "_locks", [])
    lock = gradio_environment._lock

    def lock_late(folder: Path) -> None:
        remove_leftovers(tmp_path)
        lock(folder)

    monkeypatch.setattr(gradio_environment, "_lock", lock_late)
    folder = prepare_environment()
    assert folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert remove_leftovers(tmp_path) == [] and list(tmp_path.iterdir()) == [folder]
    os.close(gradio_environment._locks[0])
    assert remove_leftovers(tmp_path) == [folder]


PROXIES = ("socks5://127.0.0.1:1", "socks://127.0.0.1:1", "http://127.0.0.1:1", "no proxy at all")


@pytest.mark.parametrize("proxy", PROXIES)
def test_proxy_variables__do_not_break_gradios_import(proxy: str) -> None:
    code = (
        "import os; from ovd.demo.gradio_environment import load_gradio; load_gradio(); import gradio\n"
        "assert os.environ['ALL_PROXY'] == os.environ['http_proxy']"
    )
    outside = os.environ | {"ALL_PROXY": proxy, "http_proxy": proxy}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=outside, check=True)


def test_page_module__does_not_import_gradio() -> None:
    code = "import sys, ovd.demo.page; sys.exit('gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["photos", "stickers"])
def test_shipped_examples__are_readable_and_parse(kind: str) -> None:
    from pretrain.data.folder import read_image

    examples = shipped_examples(EXAMPLES / kind)
    assert len(examples) >= 4
    notice = (EXAMPLES / kind / "NOTICE.md").read_text(encoding="utf-8")
    for example in examples:
        assert min(read_image(example.picture).shape[:2]) >= 280
        assert example.picture.name in notice or kind == "stickers"
        assert len(Vocabulary.parse(example.classes).names) >= 3
        assert example.picture.stat().st_size < 300_000


def test_shipped_examples__missing_ones_are_skipped(tmp_path: Path) -> None:
    assert shipped_examples(tmp_path) == []
    (tmp_path / "examples.json").write_text('[{"picture": "gone.jpg", "classes": "dog"}]')
    assert shipped_examples(tmp_path) == []


def test_markup__in_a_card_is_escaped() -> None:
    text = _card_text({"name": "<script>x</script>|", "metrics": {"AP50_novel": 0.31}, "purpose": "Demo"})
    assert "<script>" not in text and "&lt;script&gt;" in text and "AP50_novel 0.31" in text
    assert _card_text({}).startswith("These weights have no model card")
