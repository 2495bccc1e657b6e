# SPDX-License-Identifier: Apache-2.0
"""Checks of request bodies before Gradio sees them, which answers invalid ones with status 500."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovd.demo.uploads import Uploads

if TYPE_CHECKING:
    import gradio as gr
    from gradio.block_function import BlockFunction
    from gradio.components import Component

PICTURE_MISSING = "The picture is no longer on the server; upload it again"
NOT_UPLOADED = 'image must be an uploaded picture: {"path": "…"}, with the path that /gradio_api/upload returned'

FILE_DATA: dict[str, tuple[type, ...]] = {
    "url": (str,), "orig_name": (str,), "mime_type": (str,), "size": (int,), "is_stream": (bool,), "meta": (dict,)
}  # fmt: skip
"""What else Gradio's FileData may hold, and its types."""


class BadRequest(Exception):
    """What is wrong with a body, in words, and the HTTP status."""

    def __init__(self, problem: str, *, status: int = 422) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True)
class Parameter:
    """One input of a function of the page."""

    name: str
    kind: str  # Gradio's name of the component
    required: bool
    samples: int = 0  # of a table of examples


class Endpoints:
    """The functions of a page, and their parameters.

    Args:
        page: from `ovd.demo.page.build_page`.
        uploads: where pictures must lie.
    """

    def __init__(self, page: gr.Blocks, uploads: Uploads) -> None:
        self._uploads = uploads
        self._inputs: dict[int, list[Parameter]] = {}
        self._named: dict[str, int] = {}
        self._quick = {number for number, function in page.fns.items() if not function.queue}
        for number, function in page.fns.items():
            self._inputs[number] = _parameters(function)
            if function.api_name and function.api_visibility == "public":
                self._named[str(function.api_name)] = number

    @property
    def names(self) -> list[str]:
        """Endpoints for programs."""
        return sorted(self._named)

    def check_name(self, name: str) -> None:
        """Refuse endpoints that do not exist.

        Raises:
            BadRequest: with status 404.
        """
        if name not in self._named:
            endpoints = ", ".join(f"/{n}" for n in self.names)
            raise BadRequest(f"no endpoint /{name[:60]}; known: {endpoints}", status=404)

    def check(self, body: bytes, *, name: str | None = None, keywords: bool = False, quick: bool = False) -> bytes:
        """Check the body of ``call/NAME``, or of ``queue/join`` where the body names the function.

        Args:
            body: JSON.
            name: a known endpoint; None: ``fn_index`` in the body names it.
            quick: only functions that Gradio runs at once, which never reach the model.
            keywords: the values come by name (``call/v2/NAME``), not as a list ``data``.

        Returns:
            the body, with a null for each value at the end of ``data`` that was left out and need not be there.

        Raises:
            BadRequest: no JSON, no such function, or a value of a wrong type.
        """
        import orjson

        try:
            record = orjson.loads(body)
        except ValueError as problem:
            raise BadRequest("the body is not JSON", status=400) from problem
        if not isinstance(record, dict):
            raise BadRequest('the body must be an object like {"data": […]}')
        if name is None:
            number = record.get("fn_index")
            if not isinstance(number, int) or isinstance(number, bool) or number not in self._inputs:
                raise BadRequest("fn_index is not a function of this page; reload the page", status=404)
            if quick and number not in self._quick:
                raise BadRequest("this function runs from the queue: POST /gradio_api/queue/join", status=404)
            session = record.get("session_hash")
            if not isinstance(session, str) or not 1 <= len(session) <= 100:
                raise BadRequest("session_hash must be a string of 1 to 100 characters")
        else:
            number = self._named[name]
        parameters = self._inputs[number]
        if keywords:
            self._check_values(_by_position(record, parameters), parameters)
            return body
        data = record.get("data")
        if isinstance(data, list) and len(data) < len(parameters):
            omitted = parameters[len(data) :]
            if not any(p.required for p in omitted):
                record["data"] = data = [*data, *(None for _ in omitted)]
                body = orjson.dumps(record)
        self._check_values(data, parameters)
        return body

    def _check_values(self, data: object, parameters: list[Parameter]) -> None:
        if not isinstance(data, list) or len(data) != len(parameters):
            expected = ", ".join(p.name for p in parameters)
            raise BadRequest(f"data must be a list of {len(parameters)} values: {expected}")
        for value, parameter in zip(data, parameters, strict=True):
            if value is None:
                continue
            if parameter.kind == "image":
                self._check_picture(value)
            elif parameter.kind == "textbox" and not isinstance(value, str):
                raise BadRequest(f"{parameter.name} must be a string, not {_type(value)}")
            elif parameter.kind == "dataset" and not (type(value) is int and 0 <= value < parameter.samples):
                raise BadRequest("no such example")
            elif parameter.kind == "number":
                _check_number(value, parameter.name)

    def _check_picture(self, value: object) -> None:
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(path, str) or "://" in path:
            raise BadRequest(NOT_UPLOADED)
        for key, kinds in FILE_DATA.items():  # Gradio fails on these, in the middle of its own work
            if not isinstance(value.get(key), (*kinds, type(None))) or (key == "meta" and value.get(key, {}) is None):
                raise BadRequest(f"image: {key} must be as /gradio_api/upload's answer has it, not {_type(value[key])}")
        if self._uploads.find(path) is None:
            raise BadRequest(PICTURE_MISSING)


def _parameters(function: BlockFunction) -> list[Parameter]:
    signature = list(inspect.signature(function.fn).parameters.values()) if function.fn else []
    if len(signature) < len(function.inputs):  # Gradio's own, with *args
        return [_parameter(f"value {i}", block, required=True) for i, block in enumerate(function.inputs, 1)]
    return [
        _parameter(parameter.name, block, required=parameter.default is parameter.empty)
        for parameter, block in zip(signature, function.inputs, strict=False)
    ]


def _parameter(name: str, block: Component, *, required: bool) -> Parameter:
    kind = block.get_block_name()
    return Parameter(name, kind, required, len(block.samples) if kind == "dataset" else 0)


def _by_position(record: dict[str, object], parameters: list[Parameter]) -> list[object]:
    names = {p.name for p in parameters}
    if unknown := [name for name in record if name not in names]:
        raise BadRequest(f"unknown parameter {unknown[0][:60]!r}; known: {', '.join(p.name for p in parameters)}")
    if missing := [p.name for p in parameters if p.required and p.name not in record]:
        raise BadRequest(f"{missing[0]} is missing")
    return [record.get(p.name) for p in parameters]


def _check_number(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadRequest(f"{name} must be a number from 0 to 1, not {_type(value)} {str(value)[:20]}")


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "the number"}
    return names.get(type(value), "the number")
