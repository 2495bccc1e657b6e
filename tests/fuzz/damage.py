# SPDX-License-Identifier: Apache-2.0
"""Damaged JSON: a valid document with a few values replaced, removed or doubled, and damaged files around it."""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pretrain.engine.errors import UserError

Path = tuple[str | int, ...]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "55"))  # of each of nine tests; `make fuzz` runs more
# Drawn alike in every run, and never refused for a machine that is busy.
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example,
        HealthCheck.function_scoped_fixture,
    ],
)  # fmt: skip

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.0, 0.5, 2.5, 1e300, -1e300, 10**30, float("nan"), float("inf"), float("-inf"),
    "", " ", "1", "１", "-1", "nan", "0x10", "a\u0000b", "\ud800", "é\u200b", "../../etc/passwd", "/", ".", "x" * 300,
    [], {}, [None], [[]], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6]],
    [[1e9, 2, 3, 4, 5, 6]], {"size": [80, 100], "counts": [0]}, {"size": [80, 100], "counts": "0"},
    {"size": [10**9, 10**9], "counts": "0" * 9}, {"counts": []}, {"a": {"b": {"c": []}}},
)  # fmt: skip


def paths(document: Any, at: Path = ()) -> Iterator[Path]:
    """Where every value of a JSON document stands, the document itself first."""
    yield at
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in entries:
        yield from paths(value, (*at, key))


def damaged(document: Any, at: Path, how: str, value: Any) -> Any:
    """A copy with the value at a place replaced, removed, or doubled beside itself."""
    if not at:
        return value if how == "replace" else document
    whole = copy.deepcopy(document)
    around = whole
    for key in at[:-1]:
        around = around[key]
    key: Any = at[-1]
    if how == "replace":
        around[key] = value
    elif how == "remove":
        del around[key]
    elif isinstance(around, list):
        around.insert(int(key), copy.deepcopy(around[key]))
    else:
        around[f"{key}2"] = copy.deepcopy(around[key])
    return whole


@st.composite
def documents(draw: st.DrawFn, document: Any) -> Any:
    """The document after one to three damages."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(paths(document))))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
        document = damaged(document, at, how, draw(st.sampled_from(ODD_VALUES)))
    return document


@st.composite
def files(draw: st.DrawFn, document: Any) -> tuple[str, bytes]:
    """(suffix, bytes) of a file that holds a damaged document, or a damaged file that holds the document."""
    if draw(st.integers(0, 4)):
        document = draw(documents(document))
        text = json.dumps(document, ensure_ascii=draw(st.booleans()))
        data = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig"])), errors="surrogatepass")
    else:
        data = json.dumps(document).encode()
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        data = data[:start] + draw(st.binary(max_size=8)) + data[start + length :]
    if draw(st.integers(0, 5)):
        return ".json", data
    packed = gzip.compress(data, mtime=0)
    return ".json.gz", packed[: draw(st.integers(0, len(packed)))] if draw(st.booleans()) else packed


@st.composite
def broken(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to three damages: bits flipped, a part cut out, put in, filled with zeros, or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["flip", "cut", "insert", "zero", "double", "end"]))
        # Headers are short and decide most: half of the damages are near the beginning.
        first = draw(st.integers(0, min(64, len(data)))) if draw(st.booleans()) else draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 64))
        if how == "flip" and first < len(data):
            data = data[:first] + bytes([data[first] ^ 1 << draw(st.integers(0, 7))]) + data[first + 1 :]
        elif how == "cut":
            data = data[:first] + data[first + length :]
        elif how == "insert":
            data = data[:first] + draw(st.binary(max_size=16)) + data[first:]
        elif how == "zero":
            data = data[:first] + bytes(min(length, len(data) - first)) + data[first + length :]
        elif how == "double":
            data = data[: first + length] + data[first:]
        elif how == "end":
            data = data[:first]
    return data


def assert_one_line(error: UserError, *names: str) -> None:
    """An error that a person can act on: one line, of a length that is read, that names the thing."""
    text = str(error)
    assert "\n" not in text, f"more than one line: {text}"
    assert any(name in text for name in names), f"names nothing: {text}"
    assert len(text) < 2_000, f"{len(text)} characters"
