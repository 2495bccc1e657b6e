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
from ovd.demo.page import _card_text, free_port, prepare_environment, shipped_examples
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--port", "-1"], ["--port", "http"], ["--prot", "1"], ["--threads", "0"]]
)
def test_bad_flags_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_defaults_are_local_and_private() -> None:
    options = parser().parse_args([])
    assert (options.host, options.port, options.share, options.browser) == ("127.0.0.1", 7860, False, False)


def test_a_taken_port_is_told_at_once_with_status_2_and_no_traceback() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            free_port("127.0.0.1", port)
        command = [sys.executable, "app.py", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and str(port) in done.stderr and "Traceback" not in done.stderr


def test_unknown_weights_end_with_status_2() -> None:
    command = [sys.executable, "app.py", "--port", "0", "--weights", "no/such/weights"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no/such/weights" in done.stderr and "Traceback" not in done.stderr


def test_a_foreign_host_is_a_user_error() -> None:
    with pytest.raises(UserError, match="192.0.2.1"):
        free_port("192.0.2.1", 0)


def test_port_0_gives_a_free_port() -> None:
    port = free_port("127.0.0.1", 0)
    assert free_port("127.0.0.1", port) == port > 0


def test_environment_switches_off_every_call_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "GRADIO_TEMP_DIR",
        "GRADIO_ANALYTICS_ENABLED",
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
    )
    for name in (*names, "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "True")  # so that the values of before come back
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org")
    folder = prepare_environment(tmp_path / "uploads")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["HF_HUB_OFFLINE"] == "1"


def test_page_module_does_not_import_gradio_by_itself() -> None:
    code = "import sys, ovd.demo.page; sys.exit('gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_shipped_examples_are_readable_and_their_words_parse() -> None:
    from pretrain.data.folder import read_image

    examples = shipped_examples()
    assert len(examples) >= 4
    for example in examples:
        assert read_image(example.picture).shape == (384, 512, 3)
        assert len(Vocabulary.parse(example.classes).names) >= 3
        assert example.picture.stat().st_size < 300_000


def test_examples_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    assert shipped_examples(tmp_path) == []
    (tmp_path / "examples.json").write_text('[{"picture": "gone.jpg", "classes": "dog"}]')
    assert shipped_examples(tmp_path) == []


def test_card_values_cannot_become_markup() -> None:
    text = _card_text({"name": "<script>x</script>|", "metrics": {"AP50_novel": 0.31}, "purpose": "Demo"})
    assert "<script>" not in text and "&lt;script&gt;" in text and "AP50_novel 0.31" in text
    assert _card_text({}).startswith("No card")
