# SPDX-License-Identifier: Apache-2.0
"""The command line every command shares, its help, and how errors become exit statuses."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import Field

from pretrain.engine import errors
from pretrain.engine.cli import Options, command_line
from pretrain.engine.config import LoopConfig, OptimConfig, Section, config_hash, load_config
from pretrain.engine.config_schema import describe, walk
from pretrain.engine.errors import (
    BadImageError,
    ConfigError,
    UserError,
    did_you_mean,
    ignore_old_torch_calls,
    run_cli,
    shorten,
)

REPOSITORY = Path(__file__).resolve().parents[2]


class Small(Section):
    """A small network."""

    kind: Literal["small"] = Field(description="which network")
    width: int = Field(default=8, ge=1, description="channels")


class Large(Section):
    """A large network."""

    kind: Literal["large"] = Field(description="which network")
    depth: int = Field(default=50, ge=18, le=152, description="layers")


class Folder(Section):
    """A folder of pictures."""

    path: Path = Field(description="where it is")


class Config(Section):
    """A command."""

    out: Path = Field(description="run folder")
    eval_only: bool = Field(default=False, description="do not train")
    net: Small | Large = Field(default=Small(kind="small", width=4), discriminator="kind", description="the network")
    folders: list[Folder] = Field(default=[], description="pictures")
    loop: LoopConfig = Field(default=LoopConfig(steps=77, batch_size=8), description="the loop")
    optim: OptimConfig = Field(default=OptimConfig(), description="the optimiser")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("out: runs/x\n")


def parse(*argv: str, flags: tuple[str, ...] = ("check", "resume", "overwrite")) -> tuple[Config, Options]:
    return command_line(Config, list(argv), prog="python -m thing", doc="Does a thing.", flags=flags)


def problems(*argv: str, flags: tuple[str, ...] = ("check", "resume", "overwrite")) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(*argv, flags=flags)
    return caught.value.problems


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [["--config", "c.yaml"], ["--config=c.yaml"], ["--config", "c"]])
def test_arguments__config_overrides_and_flags_in_any_order(config: list[str]) -> None:
    cfg, options = parse("--resume", "loop.steps=5", *config, "--check", "loop.steps=6")
    assert (cfg.out, cfg.loop.steps) == (Path("runs/x"), 6)
    assert options == Options(check=True, resume=True, config=options.config)


def test_arguments__keys_can_be_flags() -> None:
    cfg, _ = parse(
        "--out", "a b", "--optim.lr=1e-4", "--loop.batch-size", "4", "--eval-only", "--optim.weight_decay", "0.5"
    )
    assert (cfg.out, cfg.optim.lr, cfg.loop.batch_size, cfg.eval_only) == (Path("a b"), 1e-4, 4, True)
    assert cfg.optim.weight_decay == 0.5
    assert parse("--config", "c.yaml", "--eval-only=false")[0].eval_only is False


def test_warn__is_one_line_whatever_a_file_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    errors.warn(Path("photos/a\nerror: b\x1b.jpg"))
    assert capsys.readouterr().err == "warning: photos/a\\nerror: b\\x1b.jpg\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--resum"], ["unknown flag '--resum' - did you mean '--resume'?"]),
        (["--optim.wieght_decay", "1"], ["unknown flag '--optim.wieght_decay' - did you mean '--optim.weight_decay'?"]),
        (["--zzz"], ["unknown flag '--zzz'; see --help"]),
        (["-x"], ["unknown flag '-x'; see --help"]),
        (["--resume=yes"], ["unknown flag '--resume=yes' - did you mean '--resume'?"]),
        (["c.yaml"], ["'c.yaml': name the file with --config c.yaml"]),
        (["resume"], ["'resume': expected key=value or a flag; see --help"]),
        (["--config"], ["--config needs a value: a YAML file"]),
        (["--config", "--check"], ["--config needs a value: a YAML file"]),
        (["--out"], ["--out needs a value"]),
        (
            ["--config", "a", "--config", "b"],
            ["--config is given twice; let one file inherit from the other with 'base:'"],
        ),
        (["--resume", "--overwrite"], ["--resume and --overwrite exclude each other"]),
        (
            ["--zzz", "c.yaml=", "x"],
            ["unknown flag '--zzz'; see --help", "'x': expected key=value or a flag; see --help"],
        ),
    ],
)
def test_arguments__all_wrong_ones_are_named(argv: list[str], said: list[str]) -> None:
    assert problems(*argv) == said


def test_arguments__a_flag_of_another_command_is_unknown() -> None:
    assert problems("--resume", flags=()) == ["unknown flag '--resume'; see --help"]
    assert parse("--config", "c.yaml", "--check", flags=("check",))[1].check


def test_cli__configuration_errors_are_one_message() -> None:
    assert problems("--config", "c.yaml", "loop.stepz=3")[0].startswith(
        "override 'loop.stepz=3': loop.stepz: unknown key"
    )


# --- print-config and help -------------------------------------------------------------------------------------------


def test_print_config__prints_yaml_that_loads_again_and_the_hash(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--config", "c.yaml", "optim.lr=1e-5", "net={kind: large}", "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    again = load_config(Config, "printed.yaml")
    assert again == parse("--config", "c.yaml", "optim.lr=1e-5", "net={kind: large}")[0]
    assert printed.splitlines()[-1] == f"# hash of the training keys: {config_hash(again)}"


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help__shows_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--help-all")
    for line in (
        "usage: python -m thing [--config FILE] [key=value ...] [flags]",
        "Does a thing.",
        "  --resume           resume exactly from the newest good checkpoint",
        "  out                   path; required\n                        run folder",
        "net: the network\n  kind chooses which of these keys there are: small, large",
        "net with kind: large - A large network.",
        "  depth                 integer from 18 to 152; default 50\n                        layers",
        "folders[]: pictures\n  path                  path; required",
        "  seed                  integer from 0 to 2147483647; default 0",
        "  workers               integer from 0 to 256; default 1; may change on resume",
        "  clip_norm             number > 0 or null; default null",
        "  betas                 list of 2, each number >= 0 and < 1; default [0.9, 0.999]",
        "  precision             one of fp32, bf16, fp16; default fp32",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 120


def test_help__shows_the_defaults_of_this_command_not_those_of_the_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--help-all")
    assert "  steps                 integer from 1 to 1000000000; default 77" in text
    assert "  width                 integer >= 1; default 4" in text


def test_help__names_the_top_keys_and_how_to_see_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--help")
    assert "  out                   required: run folder\n  eval_only             do not train\n" in text
    assert "  loop.…                the loop\n" in text and "batch_size" not in text
    assert "  --help-all " in text and "  --help SECTION " in text


def test_help__of_one_section_and_of_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    section = help_text(capsys, "--config", "nowhere.yaml", "--help", "optim")
    assert section.startswith("optim: the optimiser\n  name")
    assert "batch_size" not in section
    assert help_text(capsys, "--help", "optim.lr").startswith(
        "  optim.lr              number > 0 and <= 1000; default 0.001"
    )
    with pytest.raises(
        ConfigError, match=r"--help optm: no such section or key - did you mean 'optim'\? \(sections: net"
    ):
        parse("--help", "optm")


def test_help__is_printed_whatever_else_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage:" in help_text(capsys, "--config", "nowhere.yaml", "a=b", "-h")


def sections_of_the_source_tree() -> list[type[Section]]:
    """Every section defined in the packages."""
    for package in ("ovd", "pretrain"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if "(Section)" in path.read_text(encoding="utf-8"):
                importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    found: list[type[Section]] = []
    todo = list(Section.__subclasses__())
    while todo:
        section = todo.pop()
        todo += section.__subclasses__()
        if section.__module__.split(".")[0] in ("ovd", "pretrain"):
            found.append(section)
    return found


def undocumented(section: type[Section]) -> list[str]:
    return [key for key, info in walk(section) if not (info.description or "").strip()]


def test_descriptions__every_key_of_every_command_has_one() -> None:
    sections = sections_of_the_source_tree()
    assert {LoopConfig, OptimConfig} <= set(sections)
    assert {s.__name__: undocumented(s) for s in sections if undocumented(s)} == {}


def test_help__every_command_describes_and_dumps_its_defaults() -> None:
    for section in sections_of_the_source_tree():
        assert describe(section).strip(), section.__name__


def test_docs__show_the_real_error_message() -> None:
    text = (REPOSITORY / "docs" / "guide" / "cli.md").read_text(encoding="utf-8")
    block = next(block for block in text.split("```")[1::2] if "error: 3 problems" in block)
    _, command, *message = block.strip().splitlines()
    argv = command.removeprefix("$ python -m ovd.train --config vild.yaml ").split()
    with pytest.raises(ConfigError) as caught:
        command_line(Config, ["out=x", *argv], prog="p", doc="d")
    real = f"error: {caught.value}".splitlines()
    assert len(real) == len(message)
    for line, shown in zip(real, message, strict=True):
        begin, _, end = shown.partition("…")  # a long line is cut on the page
        assert line == shown or (line.startswith(begin) and line.endswith(end) and "…" in shown)


def test_descriptions__a_key_without_one_is_found() -> None:
    class Bare(Section):
        """Forgetful."""

        good: int = Field(default=0, description="said")
        bad: int = Field(default=0)
        worse: Small = Field(default=Small(kind="small"), description=" ")

    assert undocumented(Bare) == ["bad", "worse"]


def test_help__needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from pretrain.engine import cli, config, config_schema, errors;"
        "print(config_schema.describe(config.LoopConfig));"
        "sys.exit(' '.join(m for m in ('torch', 'numpy', 'detectron2', 'cv2') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- exit statuses ---------------------------------------------------------------------------------------------------


def status(main: object, argv: list[str] | None = None) -> object:
    with pytest.raises(SystemExit) as ended:
        run_cli(main, argv)  # type: ignore[arg-type]
    return ended.value.code


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_run_cli__exits_with_what_main_returns(returned: int | None, code: int) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int | None:
        seen.append(argv)
        return returned

    assert status(main, ["a", "b"]) == code
    assert seen == [["a", "b"]]


def test_run_cli__takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "x"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the process of the tests goes on
    assert status(lambda argv: len(argv)) == 1


@pytest.mark.parametrize(
    ("missing", "has_torch", "remedy"),
    [
        ("torch", False, 'pip install "wordbox[train]"'),
        ("detectron2.config", False, 'pip install "wordbox[train]"'),
        ("detectron2.config", True, "python -m ovd.build_detectron2"),
    ],
)
def test_run_cli__a_missing_package_names_the_line_that_installs_it(
    missing: str, has_torch: bool, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(errors, "find_spec", lambda name: object() if has_torch else None)
    with pytest.raises(SystemExit) as ended:
        errors.run_cli(main, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: this needs {missing}, which is not installed: {remedy}\n"


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (UserError("weights/x: not found"), "error: weights/x: not found\n"),
        (UserError("a\nb\x1b[2J\u202eg.jpg: gone"), "error: a\\nb\\x1b[2J\\u202eg.jpg: gone\n"),
        (UserError("2 mistakes:\n  one\n  two"), "error: 2 mistakes:\n  one\n  two\n"),
        (ConfigError(["a.yaml:1: b"]), "error: a.yaml:1: b\n"),
        (ConfigError(["a.yaml:1: b", "c"]), "error: 2 problems in the configuration:\n  a.yaml:1: b\n  c\n"),
        (BadImageError("a.png"), "error: a.png: cannot be read as an image\n"),
    ],
)
def test_run_cli__a_user_error_is_one_message_and_status_2(
    error: UserError, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        raise error

    assert status(main, []) == 2
    assert capsys.readouterr() == ("", printed)


def test_run_cli__one_of_many_processes_reports_a_wrong_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")

    def configuration(argv: list[str]) -> None:
        raise ConfigError(["wrong everywhere"])

    def data(argv: list[str]) -> None:
        raise UserError("wrong here")

    assert (status(configuration, []), capsys.readouterr().err) == (2, "")
    assert (status(data, []), capsys.readouterr().err) == (2, "error: wrong here\n")


def test_run_cli__other_errors_and_exits_pass_through() -> None:
    def fails(argv: list[str]) -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        run_cli(fails, [])
    assert status(lambda argv: sys.exit(143), []) == 143


def test_run_cli__an_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert status(main, []) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def python(code: str, *, stdout: int = subprocess.PIPE, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONIOENCODING": encoding, "PATH": ""}
    command = [sys.executable, "-c", f"from pretrain.engine.errors import run_cli, UserError\n{code}"]
    return subprocess.run(
        command, cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )


def test_run_cli__broken_pipe_is_silent() -> None:
    code = (
        "import os\nread, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "run_cli(lambda argv: print('x' * 100000), [])"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (141, "")


def test_run_cli__a_terminal_without_unicode_gets_escapes_not_a_traceback() -> None:
    done = python("def main(argv):\n    print('größe'); raise UserError('größe')\nrun_cli(main, [])", encoding="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (2, "gr\\xf6\\xdfe\n", "error: gr\\xf6\\xdfe\n")


def test_bad_image_error__can_be_copied() -> None:
    import copy

    again = copy.copy(BadImageError("a/b.png", "is truncated"))
    assert (again.path, str(again)) == (Path("a/b.png"), "a/b.png: is truncated")


def test_did_you_mean__suggests_close_names() -> None:
    assert did_you_mean("Stpes", ["steps", "seed"]) == " - did you mean 'steps'?"
    assert did_you_mean("zzz", ["steps"]) == ""
    assert shorten("x" * 100, 10) == "xxxxxxx..."


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EMFILE])
def test_run_cli__disk_and_permission_errors_are_one_line(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: list[str]) -> None:
        raise OSError(code, os.strerror(code), "runs/model.json")

    with pytest.raises(SystemExit) as ended:
        run_cli(fails, [])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: runs/model.json: {os.strerror(code)}; ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("asks", "size"),
    [
        (lambda: torch.empty(10**14), "400000.0 GB"),
        (lambda: np.empty(10**14), "728. TiB"),
        (lambda: [0] * 10**15, ""),
    ],
)
def test_run_cli__out_of_memory_is_one_line(
    asks: Callable[[], object], size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(lambda argv: asks() and None) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and "loop.batch_size" in said and said.count("\n") == 1
    assert f"({size} more were requested)" in said if size else "(" not in said


def test_run_cli__other_runtime_errors_are_raised() -> None:
    def fails(argv: list[str]) -> None:
        raise RuntimeError("cannot allocate a turn")

    with pytest.raises(RuntimeError, match="a turn"):
        run_cli(fails, [])


def test_errors__a_folder_that_cannot_be_copied_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda argv: shutil.copytree(tmp_path / "from", tmp_path / "to") and None, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/from/link cannot be copied to {tmp_path}/to/link: ")


@pytest.mark.parametrize(
    "error", [OSError("of a library"), FileNotFoundError(2, "No such file", "x"), OSError(9999, "?")]
)
def test_run_cli__other_os_errors_are_raised(error: OSError) -> None:
    def fails(argv: list[str]) -> None:
        raise error

    with pytest.raises(OSError, match=re.escape(str(error))) as raised:
        run_cli(fails, [])
    assert raised.value is error


def test_warnings__only_deprecated_calls_inside_libraries_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignore_old_torch_calls()
        warnings.warn("`torch.jit.script` is deprecated. Please switch to", FutureWarning, stacklevel=1)
        warnings.warn("torch.meshgrid: in an upcoming release, it will be required", UserWarning, stacklevel=1)
        warnings.warn("weights are half of what they were", UserWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == ["weights are half of what they were"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_cli__a_signal_after_the_work_ends_without_a_traceback(number: signal.Signals) -> None:
    """Threads and libraries take their time to end; Ctrl-C then printed `Exception ignored in …`."""
    code = (
        "import signal, sys, threading, time\n"
        "from pretrain.engine.errors import run_cli\n"
        "def main(argv):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "    def late():\n"
        "        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL: time.sleep(0.01)\n"
        "        print('done', flush=True)\n"
        "        time.sleep(60)\n"
        "    threading.Thread(target=late).start()\n"
        "run_cli(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -number
