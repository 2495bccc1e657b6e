# SPDX-License-Identifier: Apache-2.0
"""Where tasks' pictures may come from, against a stand-in for Label Studio on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ovd.label_studio.pictures import PictureSource
from pretrain.engine.errors import UserError

LEGACY = "0123456789abcdef0123456789abcdef01234567"
PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.c2lnbmF0dXJl"


class Studio(ThreadingHTTPServer):
    """Keeps its requests; a personal token is good for one exchange at a time."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.exchanges = 0
        super().__init__(("127.0.0.1", 0), Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Studio

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization", "")
        self.server.requests.append((self.path, authorization))
        if authorization not in (f"Token {LEGACY}", f"Bearer access-{self.server.exchanges}"):
            self.say(401)
        elif self.path == "/data/upload/1/moved.jpg":
            self.say(302, location="/data/upload/1/cat.jpg")
        elif self.path.startswith("/tasks/7/presign/"):
            self.say(302, location="http://elsewhere.test/cat.jpg")
        elif self.path == "/data/upload/1/gone.jpg":
            self.say(404)
        else:
            self.say(200, b"picture")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, body) == ("/api/token/refresh/", {"refresh": PERSONAL})
        self.server.exchanges += 1
        self.say(200, json.dumps({"access": f"access-{self.server.exchanges}"}).encode())

    def say(self, status: int, body: bytes = b"", location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def studio() -> Iterator[Studio]:
    server = Studio()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("/data/upload/1/cat.jpg", "/data/upload/1/cat.jpg"),
        ("upload/1/a cat.jpg", "/data/upload/1/a%20cat.jpg"),
        ("/data/local-files/?d=cats%2Fcat.jpg", "/data/local-files/?d=cats%2Fcat.jpg"),
        ("{url}/data/upload/1/cat.jpg", "/data/upload/1/cat.jpg"),
    ],
)
def test_pictures__are_fetched_from_label_studio_with_the_token(value: str, path: str, studio: Studio) -> None:
    source = PictureSource(url=studio.url + "/", token=LEGACY)
    assert source.read(value.format(url=studio.url)) == b"picture"
    assert studio.requests == [(path, f"Token {LEGACY}")]


def test_pictures__a_redirect_on_the_same_host_is_followed(studio: Studio) -> None:
    assert PictureSource(url=studio.url, token=LEGACY).read("/data/upload/1/moved.jpg") == b"picture"


def test_token__a_personal_one_is_exchanged_again_when_expired(studio: Studio) -> None:
    source = PictureSource(url=studio.url, token=PERSONAL)
    assert source.read("/data/upload/1/a.jpg") == source.read("/data/upload/1/b.jpg") == b"picture"
    assert studio.exchanges == 1
    studio.exchanges += 1  # the token that was given is no longer the good one
    assert source.read("/data/upload/1/c.jpg") == b"picture" and studio.exchanges == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("http://elsewhere.test/cat.jpg", "is on another host than Label Studio,"),
        ("//elsewhere.test/cat.jpg", "not a readable picture"),
        ("http://user@127.0.0.1/cat.jpg", "not a readable picture"),
        ("file:///etc/passwd", "not a readable picture"),
        ("../cat.jpg", "not a readable picture"),
        ("s3://bucket/cat.jpg", "sends on to http://elsewhere.test/cat.jpg, another host"),
        ("/data/upload/1/gone.jpg", "answers 404"),
        ("data:image/png;base64,@@", "not base64"),
        ("data:image/png", "without its data"),
    ],
)
def test_pictures__other_hosts_are_refused(value: str, message: str, studio: Studio) -> None:
    with pytest.raises(UserError, match=message):
        PictureSource(url=studio.url, token=LEGACY).read(value, task=7)
    assert all(authorization == f"Token {LEGACY}" for _, authorization in studio.requests)


def test_pictures__server_errors_are_explained(studio: Studio, tmp_path: Path) -> None:
    upload = "/data/upload/1/cat.jpg"
    with pytest.raises(UserError, match="start wordbox serve with --label-studio-url"):
        PictureSource().read(upload)
    with pytest.raises(UserError, match=r"wants an --access-token \(401\)"):
        PictureSource(url=studio.url).read(upload)
    with pytest.raises(UserError, match=r"refuses the --access-token \(401\)"):
        PictureSource(url=studio.url, token="old").read(upload)
    with pytest.raises(UserError, match="more than 0 MB"):
        PictureSource(url=studio.url, token=LEGACY, most=3).read(upload)
    with pytest.raises(UserError, match="cannot be reached"):
        PictureSource(url="http://127.0.0.1:1").read(upload)
    with pytest.raises(UserError, match="give the full URL"):
        PictureSource(url="localhost:8080")
    with pytest.raises(UserError, match="no such folder"):
        PictureSource(root=tmp_path / "none")


def test_pictures__may_be_in_the_task_itself() -> None:
    data = base64.b64encode(b"picture").decode()
    assert PictureSource().read(f"data:image/png;base64,{data}") == b"picture"


def test_local_files__are_read_below_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "cats").mkdir(parents=True)
    (root / "cats/a cat.jpg").write_bytes(b"cat")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    source = PictureSource(root=root)
    for value in ("/data/local-files/?d=cats/a%20cat.jpg", "/data/local-files?d=%2Fcats/a cat.jpg"):
        assert source.read(value) == root / "cats/a cat.jpg"
    for outside in (
        "../secret.jpg",
        "cats/../../secret.jpg",
        "link.jpg",
        "cats",
        "",
        "%00",
        str(tmp_path / "secret.jpg"),
    ):
        with pytest.raises(UserError, match="no such file below --root"):
            source.read(f"/data/local-files/?d={outside}")
