# SPDX-License-Identifier: Apache-2.0
"""Files for running the page elsewhere name what is there, and start it with flags that it has."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

import app

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def test_docker__copied_paths_exist_and_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [words[:-1] for line in instructions("COPY") if (words := line.split())[0][:6] != "--from"]
    names = [name for words in copied for name in words]
    assert {"ovd", "pretrain", "weights", "requirements-light.lock"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists() or name.split("/")[0] in ignored] == []
    scripts = re.findall(r"python (scripts/\S+)", DOCKERFILE)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_light_lock__is_a_part_of_the_full_one_without_torch() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return {line.split()[0].partition(";")[0].lower() for line in lines if line and line[0] not in "#-"}

    light, whole = pins("requirements-light.lock"), pins("requirements.lock")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.+?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed is not None and light <= whole
    needed = set(re.findall(r'^    "([a-z-]+)', listed[1], re.MULTILINE))
    names = {pin.partition("==")[0] for pin in light}
    assert needed <= names and not names & {"torch", "torchvision", "open-clip-torch", "triton"}


def test_deploy__container_and_service_start_the_page_with_existing_flags() -> None:
    entry = [*json.loads(instructions("ENTRYPOINT")[0]), *json.loads(instructions("CMD")[-1])]
    service = (ROOT / "deploy/wordbox.service").read_text(encoding="utf-8")
    started = re.search(r"^ExecStart=(.+)$", service, re.MULTILINE)
    assert started is not None
    for words, host in ((entry, "0.0.0.0"), (shlex.split(started[1]), "127.0.0.1")):
        assert words[0].endswith("wordbox") and words[1] == "demo"
        options = app.parser().parse_args(words[2:])
        assert (options.host, options.port) == (host, 7860)
        assert host == "0.0.0.0" or options.allow_host == ["wordbox.example.org"]
    for proxy in ("Caddyfile", "nginx.conf"):
        assert re.search(
            r"^(    server_name )?wordbox\.example\.org\b", (ROOT / "deploy" / proxy).read_text(), re.MULTILINE
        )
    assert instructions("USER") == ["wordbox"] and instructions("EXPOSE") == ["7860"]


def test_nginx__limits_uploads_and_queries_but_not_the_page() -> None:
    text = (ROOT / "deploy/nginx.conf").read_text(encoding="utf-8")
    mapped = re.search(r"^map \$request_method (\$\w+) {([^}]+)}", text, re.MULTILINE)
    limited = re.search(r"^limit_req_zone (\$\w+) ", text, re.MULTILINE)
    assert mapped is not None and limited is not None and mapped[1] == limited[1]
    assert dict(re.findall(r"(\S+)\s+(\S+);", mapped[2])) == {"default": '""', "POST": "$binary_remote_addr"}


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (500, False), (None, False)])
def test_deploy__the_health_check_recognises_a_page_that_answers(status: int | None, healthy: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 200)
            self.end_headers()
            self.wfile.write(b"page")

        def log_message(self, *_: object) -> None: ...

    command = re.search(r"HEALTHCHECK .*CMD (\[.+\])", DOCKERFILE)
    assert command is not None
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = server.server_port
    if status is None:
        server.shutdown()
        server.server_close()
    _, flag, code = json.loads(command[1])
    done = subprocess.run([sys.executable, flag, code.replace("7860", str(port))], capture_output=True, check=False)
    assert (done.returncode == 0) is healthy
    if status is not None:
        server.shutdown()
        server.server_close()


def test_space__runs_the_container() -> None:
    _, head, _ = (ROOT / "deploy/space/README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(head)
    assert (settings["sdk"], settings["app_port"]) == ("docker", 7860)
    assert len(settings["short_description"]) <= 60


def test_space__every_binary_file_goes_through_lfs() -> None:
    """The hub refuses a push with others."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout")
    (tracked,) = re.findall(r"git lfs track (.*)", (ROOT / "docs/guide/deploy.md").read_text(encoding="utf-8"))
    suffixes = {pattern.removeprefix("*") for pattern in shlex.split(tracked)}
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    assert {
        path.suffix for path in paths if path.suffix not in suffixes and b"\0" in (ROOT / path).read_bytes()
    } == set()


@pytest.mark.parametrize("name", ["bug", "idea", "accuracy"])
def test_issue_forms__are_valid(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["body"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
    assert any(part.get("validations", {}).get("required") for part in asked)
