# SPDX-License-Identifier: Apache-2.0
"""Questions as they come over HTTP, checked before Gradio sees them: it answers what it cannot use with status 500."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovd.demo.uploads import Uploads

if TYPE_CHECKING:
    import gradio as gr
    from gradio.block_function import BlockFunction
    from gradio.components import Component

GONE = "The picture is not there any more; upload it again"
NOT_UPLOADED = 'image must be a picture that was uploaded, like {"path": "…"} with what /gradio_api/upload gave'


class BadQuestion(Exception):
    """What is wrong, in words, and the HTTP status that says it."""

    def __init__(self, problem: str, *, status: int = 422) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True)
class Parameter:
    """One input of a function of the page."""

    name: str
    kind: str  # Gradio's name of the component
    needed: bool
    samples: int = 0  # of a table of examples


class Questions:
    """What the functions of a page take.

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
            BadQuestion: with status 404.
        """
        if name not in self._named:
            known = ", ".join(f"/{n}" for n in self.names)
            raise BadQuestion(f"no endpoint /{name[:60]}; there is {known}", status=404)

    def check(self, body: bytes, *, name: str | None = None, keywords: bool = False, quick: bool = False) -> bytes:
        """Check the body of ``call/NAME``, or of ``queue/join`` where the body names the function.

        Args:
            body: JSON.
            name: a known endpoint; None: ``fn_index`` in the body tells.
            quick: only functions that Gradio runs at once, which never reach the model.
            keywords: the values come by name (``call/v2/NAME``), not as a list ``data``.

        Returns:
            The body, with a null for each value at the end of ``data`` that was left out and need not be there.

        Raises:
            BadQuestion: no JSON, no such function, or a value of a wrong type.
        """
        import orjson

        try:
            record = orjson.loads(body)
        except ValueError as problem:
            raise BadQuestion("the body is not JSON", status=400) from problem
        if not isinstance(record, dict):
            raise BadQuestion('the body must be an object like {"data": […]}')
        if name is None:
            number = record.get("fn_index")
            if not isinstance(number, int) or isinstance(number, bool) or number not in self._inputs:
                raise BadQuestion("fn_index names no function of this page; load the page again", status=404)
            if quick and number not in self._quick:
                raise BadQuestion("this function is asked through the line: POST /gradio_api/queue/join", status=404)
            session = record.get("session_hash")
            if not isinstance(session, str) or not 1 <= len(session) <= 100:
                raise BadQuestion("session_hash must be a text of 1 to 100 letters")
        else:
            number = self._named[name]
        parameters = self._inputs[number]
        if keywords:
            self._check_values(_by_position(record, parameters), parameters)
            return body
        data = record.get("data")
        if isinstance(data, list) and len(data) < len(parameters):
            left_out = parameters[len(data) :]
            if not any(p.needed for p in left_out):
                record["data"] = data = [*data, *(None for _ in left_out)]
                body = orjson.dumps(record)
        self._check_values(data, parameters)
        return body

    def _check_values(self, data: object, parameters: list[Parameter]) -> None:
        if not isinstance(data, list) or len(data) != len(parameters):
            wanted = ", ".join(p.name for p in parameters)
            raise BadQuestion(f"data must be a list of {len(parameters)} values: {wanted}")
        for value, parameter in zip(data, parameters, strict=True):
            if value is None:
                continue
            if parameter.kind == "image":
                self._check_picture(value)
            elif parameter.kind == "textbox" and not isinstance(value, str):
                raise BadQuestion(f"{parameter.name} must be a text, not {_type(value)}")
            elif parameter.kind == "dataset" and not (type(value) is int and 0 <= value < parameter.samples):
                raise BadQuestion("there is no such example")
            elif parameter.kind == "number":
                _check_number(value, parameter.name)

    def _check_picture(self, value: object) -> None:
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or "://" in path:
            raise BadQuestion(NOT_UPLOADED)
        if self._uploads.holds(path) is None:
            raise BadQuestion(GONE)


def _parameters(function: BlockFunction) -> list[Parameter]:
    signature = list(inspect.signature(function.fn).parameters.values()) if function.fn else []
    if len(signature) < len(function.inputs):  # Gradio's own, with *args
        return [_parameter(f"value {i}", block, needed=True) for i, block in enumerate(function.inputs, 1)]
    return [
        _parameter(parameter.name, block, needed=parameter.default is parameter.empty)
        for parameter, block in zip(signature, function.inputs, strict=False)
    ]


def _parameter(name: str, block: Component, *, needed: bool) -> Parameter:
    kind = block.get_block_name()
    return Parameter(name, kind, needed, len(block.samples) if kind == "dataset" else 0)


def _by_position(record: dict[str, object], parameters: list[Parameter]) -> list[object]:
    known = {p.name for p in parameters}
    if unknown := [name for name in record if name not in known]:
        raise BadQuestion(f"unknown parameter {unknown[0][:60]!r}; known are {', '.join(p.name for p in parameters)}")
    if missing := [p.name for p in parameters if p.needed and p.name not in record]:
        raise BadQuestion(f"{missing[0]} is missing")
    return [record.get(p.name) for p in parameters]


def _check_number(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadQuestion(f"{name} must be a number from 0 to 1, not {_type(value)} {str(value)[:20]}")


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "the number"}
    return names.get(type(value), "the number")
