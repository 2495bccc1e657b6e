# SPDX-License-Identifier: Apache-2.0
"""Whatever a file or an override holds, loading gives a configuration or a ConfigError; what is dumped is read back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from pretrain.engine.config import LoopConfig, OptimConfig, Section, dump_config, load_config
from pretrain.engine.errors import ConfigError
from tests.fuzz.damage import FUZZ


class One(Section):
    """First variant."""

    kind: Literal["one"] = Field(description="variant")
    text: str = Field(default="", description="text")


class Two(Section):
    """Second variant."""

    kind: Literal["two"] = Field(description="variant")
    numbers: tuple[float, ...] = Field(default=(), description="numbers")


class Config(Section):
    """Every kind of field."""

    out: Path = Field(default=Path("out"), description="folder")
    choice: One | Two = Field(default=One(kind="one"), discriminator="kind", description="variants")
    either: int | str | None = Field(default=None, description="a union")
    maybe: Two | str = Field(default="", description="a section or a text")
    many: list[One] = Field(default=[], description="sections")
    table: dict[str, int | float | str | bool | None] = Field(default={}, description="values by name")
    loop: LoopConfig = Field(default=LoopConfig(steps=1, batch_size=1), description="loop")
    optim: OptimConfig = Field(default=OptimConfig(), description="optimiser")


FAST = settings(FUZZ, max_examples=60)

keys = st.sampled_from(
    [
        "out",
        "choice",
        "either",
        "maybe",
        "many",
        "table",
        "loop",
        "optim",
        "kind",
        "text",
        "numbers",
        "lr",
        "x",
        "base",
        "<<",
        "",
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["one", "two", "on", "1e-4"]),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)
syntax = st.text(
    alphabet=st.one_of(st.sampled_from(list("[]{}:,-?!&*#|>'\"%@`\\ \t\n\r~<0123456789eE.xotrue")), st.characters()),
    max_size=60,
)


def outcome(data: bytes, overrides: tuple[str, ...] = ()) -> Config | ConfigError:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(data)
        try:
            return load_config(Config, path, overrides)
        except ConfigError as error:
            assert error.problems
            assert all(problem and problem in str(error) for problem in error.problems)
            return error


@FAST
@given(st.binary(max_size=200))
def test_fuzz__bytes(data: bytes) -> None:
    outcome(data)


@FAST
@given(syntax)
def test_fuzz__yaml_like_text(text: str) -> None:
    outcome(text.encode("utf-8", "surrogatepass"))


@FAST
@given(st.dictionaries(keys, trees, max_size=5))
def test_fuzz__right_keys_wrong_values(tree: dict[str, object]) -> None:
    outcome(dump_config(tree).encode("utf-8", "surrogatepass"))


@FAST
@given(
    st.lists(
        st.one_of(syntax, st.builds(lambda k, v: f"{k}={v}", st.from_regex(r"[a-z.]{0,12}", fullmatch=True), syntax)),
        max_size=4,
    )
)
def test_fuzz__overrides(overrides: list[str]) -> None:
    outcome(b"", tuple(overrides))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@FAST
@given(
    title=TEXT,
    table=st.dictionaries(
        TEXT.filter(lambda key: key not in ("", "<<")),
        st.one_of(TEXT, st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        max_size=4,
    ),
    lr=st.floats(min_value=1e-300, max_value=1000),
)
def test_fuzz__dump_round_trip(title: str, table: dict[str, int | float | str | bool | None], lr: float) -> None:
    cfg = Config(choice=One(kind="one", text=title), either=title, table=table, optim=OptimConfig(lr=lr))
    assert outcome(dump_config(cfg).encode()) == cfg
