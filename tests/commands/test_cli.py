# SPDX-License-Identifier: Apache-2.0
"""The console command: what it runs, what its help says and does not import, what it says to mistakes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovd import cli, predict
from ovd.commands import COMMANDS, ELSEWHERE
from pretrain.engine.errors import UserError
from pretrain.engine.flags import CommandParser, integer, share

ROOT = Path(__file__).resolve().parents[2]
SCREEN = 42  # lines
PRODUCT = sorted(COMMANDS)


def wordbox(*argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, 100 columns wide."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "COLUMNS": "100"} | more
    command = [sys.executable, "-m", "ovd.cli", *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        cli.main(argv)
    except SystemExit as end:
        assert end.code in (0, None)
    return capsys.readouterr().out


def test_help__lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    assert re.findall(r"^  ([a-z]+) ", text, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", PRODUCT)
def test_help__fits_a_screen_and_help_all_has_the_rest(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    short, whole = printed([name, "--help"], capsys), printed([name, "--help-all"], capsys)
    assert short.startswith(f"usage: wordbox {name}") and len(short.splitlines()) <= SCREEN
    flags = re.compile(r"^  (?:-h, )?(--[a-z-]+)", re.MULTILINE)
    assert set(flags.findall(short)) <= {*flags.findall(whole), "--help-all", "--help"}
    assert ("--help-all" in short) == (len(whole) > len(short) + 80)


def test_help__imports_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from ovd import cli\n"
        f"for name in {PRODUCT}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        cli.main([name, '--help'])\n"
        "heavy = ('torch', 'cv2', 'detectron2', 'gradio', 'supervision')\n"
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["predct"], "unknown command 'predct' - did you mean 'predict'?; wordbox --help lists the commands"),
        (["--verson"], "unknown flag '--verson'; wordbox --help lists the commands"),
        (["detect"], "unknown command 'detect' - here it is 'predict'; wordbox --help lists the commands"),
        (["xyzzy"], "unknown command 'xyzzy'; wordbox --help lists the commands"),
    ],
)
def test_cli__unknown_command_suggests_the_nearest(argv: list[str], said: str) -> None:
    done = wordbox(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


def test_cli__no_command_prints_help_and_exits_2() -> None:
    done = wordbox()
    assert done.returncode == 2 and done.stdout.startswith("usage: wordbox COMMAND")


def test_aliases__words_of_other_tools_are_understood() -> None:
    assert set(ELSEWHERE.values()) <= set(COMMANDS) and not set(ELSEWHERE) & set(COMMANDS)
    flags = set(predict.parser().flags())
    assert not set(predict.ELSEWHERE) & flags
    assert {here.split()[0] for here in predict.ELSEWHERE.values() if here.startswith("--")} <= flags


@pytest.mark.parametrize("name", COMMANDS)
def test_cli__command_is_the_main_of_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(COMMANDS[name].module), "main", given.append)
    assert cli.main([name, "--flag", "x"]) == 0 and given == [["--flag", "x"]]


def test_cli__installed_command_is_this_one() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("no tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["wordbox"].partition(":")
    assert vars(importlib.import_module(module))[name] is cli.run


# --- flags -----------------------------------------------------------------------------------------------------------


def flags() -> CommandParser:
    parser = CommandParser("wordbox thing", "Does a thing.", details="Does a thing, at length.")
    parser.add_argument("--out")
    parser.add_argument("--threads", type=integer(1, 8), help="CPU threads")
    parser.add_argument("--threshold", type=share)
    parser.hide("threads")
    return parser


def test_flags__hidden_one_works_and_is_in_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert flags().parse_args(["--threads", "2"]).threads == 2
    assert vars(flags().parse_args([])) == {"out": None, "threads": None, "threshold": None}
    assert "--threads" not in flags().format_help() and "1 more options" in flags().format_help()
    with pytest.raises(SystemExit):
        flags().parse_args(["--help-all"])
    assert {"CPU threads", "at length."} <= set(re.findall(r"CPU threads|at length\.", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--treads", "2"],
            r"unrecognized arguments: --treads 2 - did you mean '--threads'\?; see wordbox thing --help",
        ),
        (["--threads", "9"], "9 must be from 1 to 8"),
        (["--threads", "two"], "invalid integer value: 'two'"),
        (["--threshold", "1.5"], "1.5 must be between 0 and 1"),
        (["--threshold", "nan"], "nan must be between 0 and 1"),
        (["--threshold", "-x"], "written --threshold=-VALUE; see wordbox thing --help"),
        (["--thresh", "1"], "unrecognized arguments: --thresh"),
        (["dog", "cat"], r"unrecognized arguments: .*cat\. Values with spaces or commas go in quotes; see"),
    ],
)
def test_flags__mistakes_are_user_errors(argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        flags().parse_args(argv)


# --- completion ------------------------------------------------------------------------------------------------------


def completions(line: str, tmp_path: Path) -> list[str]:
    """What the shell is answered, as argcomplete's shell code asks."""
    answer = tmp_path / "answer"
    environment = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    environment |= {
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }
    done = wordbox(**environment)
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in re.split(r"[\v\x0b\013]", answer.read_text()) if word.strip()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("wordbox pre", {"predict", "pretrain"}),
        ("wordbox predict --thr", {"--threads", "--threshold"}),
        ("wordbox train loop.st", {"loop.steps="}),
        ("wordbox train --res", {"--resume"}),
        ("wordbox weights ver", {"verify"}),
        ("wordbox completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_completion__knows_commands_flags_and_keys(line: str, expected: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    assert expected <= set(completions(line, tmp_path))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion__prints_code_for_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("argcomplete")
    assert "wordbox" in printed(["completion", shell], capsys)


def test_completion__missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete.shell_integration", None)
    with pytest.raises(UserError, match="pip install argcomplete"):
        cli.main(["completion", "bash"])
