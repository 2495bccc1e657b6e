# SPDX-License-Identifier: Apache-2.0
"""The pictures of Label Studio's tasks: in the task itself, in a folder of this machine, or fetched from Label Studio.

Tasks are untrusted, so nothing else is read: no file outside the folder, no other host. The address of Label Studio and
the token come from the command line, never from a request.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import threading
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pretrain.engine.errors import UserError, shorten

MAX_BYTES = 100_000_000
SECONDS = 20.0  # without a byte
CLOUD = ("s3:", "gs:", "azure-blob:")
LOCAL = "/data/local-files"


class PictureSource:
    """Reads what tasks name.

    Args:
        url: of Label Studio, with a path where it has one; None: nothing is fetched.
        token: of a user of it: a personal access token (a JWT) or a legacy token.
        root: folder for ``/data/local-files/?d=…``, Label Studio's ``LOCAL_FILES_DOCUMENT_ROOT``; None: those are
            fetched too.
        most: bytes of a picture.

    Raises:
        UserError: an address that is none, or no such folder.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        token: str | None = None,
        root: Path | None = None,
        most: int = MAX_BYTES,
    ) -> None:
        self._base = None if url is None else url.rstrip("/")
        if self._base is not None and not (_origin(self._base) and not urlsplit(self._base).query):
            raise UserError(f"--label-studio-url {url}: give the full URL, such as http://localhost:8080")
        if root is not None and not root.is_dir():
            raise UserError(f"--root {root}: no such folder")
        self._root = None if root is None else root.resolve()
        self._token = token
        self._refreshed: str | None = None  # what a personal access token was exchanged for
        self._lock = threading.Lock()
        self._most = most

    def read(self, value: str, *, task: int | None = None) -> bytes | Path:
        """The picture that a task names.

        Args:
            value: of the task's field.
            task: its number, for pictures in cloud storage, which Label Studio hands on by task.

        Raises:
            UserError: it is none of ours to read, not there, or too large.
        """
        value = value.strip()
        display_name = shorten(value, 100)
        try:
            urlsplit(value)
            value.encode()
        except ValueError as problem:
            raise UserError(f"{display_name!r}: is no address ({problem})") from problem
        if value[:5].lower() == "data:":
            return self._inline(value)
        if value.startswith(("upload/", "/upload/")):
            value = "/data/" + value.lstrip("/")
        if value.startswith(CLOUD):
            if task is None:
                raise UserError(f"{display_name}: is in cloud storage, and its task has no number")
            key = base64.urlsafe_b64encode(value.encode()).decode()
            return self._fetch(f"/tasks/{task}/presign/?fileuri={key}", display_name)
        if urlsplit(value).path.rstrip("/") == LOCAL and not urlsplit(value).netloc and self._root is not None:
            return self._local(value)
        if value.startswith("/") and not value.startswith("//"):
            return self._fetch(value, display_name)
        if _origin(value):
            if self._base is None or _origin(value) != _origin(self._base):
                raise UserError(
                    f"{display_name}: is on another host than Label Studio, and only that is fetched from; upload "
                    "the pictures to Label Studio, or serve them from its local storage"
                )
            return self._fetch(value, display_name)
        raise UserError(f"{display_name}: not a readable picture; expected a URL of Label Studio")

    def _inline(self, value: str) -> bytes:
        head, comma, body = value.partition(",")
        if not comma:
            raise UserError("a data: address without its data")
        if len(body) > self._most * 3:
            raise UserError(f"a data: address of {len(body) / 1e6:.0f} MB; at most {self._most / 1e6:.0f} are read")
        try:
            data = unquote(body)
            return base64.b64decode(data, validate=True) if head.lower().endswith(";base64") else data.encode("latin-1")
        except (binascii.Error, ValueError) as problem:
            raise UserError(f"a data: address that is not base64 ({problem})") from problem

    def _local(self, value: str) -> Path:
        """A file below the root: also what a link leads to must lie there."""
        assert self._root is not None
        named = (parse_qs(urlsplit(value).query).get("d") or [""])[-1].lstrip("/")
        try:
            path = (self._root / named).resolve()
            inside = path.is_relative_to(self._root) and path.is_file()
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise UserError(f"{shorten(named, 100)!r}: no such file below --root {self._root}")
        return path

    def _fetch(self, where: str, display_name: str) -> bytes:
        if self._base is None:
            raise UserError(
                f"{display_name}: is stored by Label Studio; start wordbox serve with --label-studio-url and a token"
            )
        url = where if _origin(where) else self._base + where
        for renew in (False, True):
            try:
                return self._download(url, display_name, self._authorization(renew=renew))
            except urllib.error.HTTPError as problem:
                problem.close()
                if problem.code in (401, 403):
                    if self._token is not None and _is_jwt(self._token) and not renew:
                        continue  # personal access tokens are exchanged for some that last minutes
                    what = "refuses the --access-token" if self._token else "wants an --access-token"
                    raise UserError(f"{display_name}: Label Studio {what} ({problem.code})") from problem
                if problem.code in (301, 302, 303, 307, 308):
                    raise UserError(
                        f"{display_name}: Label Studio sends on to {shorten(problem.headers.get('Location', ''), 60)}, "
                        "another host, from which nothing is fetched; switch pre-signed URLs off in its storage"
                    ) from problem
                raise UserError(f"{display_name}: Label Studio answers {problem.code} {problem.reason}") from problem
        raise AssertionError  # pragma: no cover

    def _download(self, url: str, display_name: str, headers: dict[str, str]) -> bytes:
        request = urllib.request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
        try:
            with _opener(_origin(url)).open(request, timeout=SECONDS) as answer:
                data: bytes = answer.read(self._most + 1)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as problem:
            reason = problem.reason if isinstance(problem, urllib.error.URLError) else problem
            raise UserError(f"{display_name}: Label Studio at {self._base} cannot be reached ({reason})") from problem
        if len(data) > self._most:
            raise UserError(f"{display_name}: more than {self._most / 1e6:.0f} MB")
        return data

    def _authorization(self, *, renew: bool) -> dict[str, str]:
        if self._token is None:
            return {}
        if not _is_jwt(self._token):
            return {"Authorization": f"Token {self._token}"}
        with self._lock:
            if self._refreshed is None or renew:
                self._refreshed = self._exchange(self._token)
            return {"Authorization": f"Bearer {self._refreshed}"}

    def _exchange(self, token: str) -> str:
        """A short-lived token for a personal access token.

        Raises:
            UserError: Label Studio refuses it.
        """
        assert self._base is not None
        request = urllib.request.Request(
            f"{self._base}/api/token/refresh/",
            data=json.dumps({"refresh": token}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _opener(_origin(self._base)).open(request, timeout=SECONDS) as answer:
                access = json.loads(answer.read(100_000))["access"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{self._base}: --access-token cannot be exchanged ({problem})") from problem
        return str(access)


def _is_jwt(token: str) -> bool:
    return token.count(".") == 2


def _origin(url: str) -> str:
    """Scheme, host and port of an address; empty where it is none of the web's."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            return ""
        return f"{parts.scheme}://{parts.hostname}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    except ValueError:  # a port that is none
        return ""


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """Follows redirects on one host only: the token goes with the request."""

    def __init__(self, origin: str) -> None:
        self._allowed = origin

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Any:
        """None, which urllib reports as the redirect's own status, for another host."""
        if _origin(newurl) != self._allowed:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _opener(origin: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_SameOrigin(origin))
