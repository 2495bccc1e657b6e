# SPDX-License-Identifier: Apache-2.0
"""Loading a configuration: inheritance, overrides, and that every problem is named where it stands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from pretrain.engine.config import (
    FREE,
    FREE_BY_DEFAULT,
    LATER,
    LoopConfig,
    OptimConfig,
    Section,
    changed_keys,
    config_hash,
    dump_config,
    free_keys,
    keys_at_default,
    load_config,
    plain,
    training_keys,
)
from pretrain.engine.config_schema import type_text
from pretrain.engine.errors import ConfigError


class Clip(Section):
    """Contrast images with captions."""

    name: Literal["clip"] = Field(description="method")
    temperature: float = Field(default=0.07, gt=0, description="softmax temperature")
    shared: int = Field(default=1, ge=1, description="a key both methods have")


class Byol(Section):
    """Predict one view from the other."""

    name: Literal["byol"] = Field(description="method")
    momentum: float = Field(default=0.99, ge=0, le=1, description="EMA momentum")
    shared: int = Field(default=2, ge=1, description="a key both methods have")


class Source(Section):
    """One folder of pictures."""

    path: Path = Field(description="folder")
    weight: float = Field(default=1.0, gt=0, description="share")


class Config(Section):
    """A command's configuration."""

    out: Path = Field(description="run folder", json_schema_extra=FREE)
    method: Annotated[Clip | Byol, Field(discriminator="name")] = Field(description="method")
    flag: bool = Field(default=False, description="a switch")
    size: int | tuple[int, int] = Field(default=64, description="side, or height and width")
    title: str | None = Field(default=None, description="a text")
    words: tuple[str, ...] = Field(default=(), description="texts")
    weights: dict[str, float] = Field(default={}, description="numbers by name")
    sources: tuple[Source, ...] = Field(default=(), description="where pictures are")
    teacher: Source | None = Field(default=None, description="another folder")
    loop: LoopConfig = Field(default=LoopConfig(steps=100, batch_size=8), description="loop")
    optim: OptimConfig = Field(description="optimiser")

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Config:
        if self.optim.warmup_steps >= self.loop.steps:
            raise ValueError("optim.warmup_steps must be less than loop.steps")
        return self


GOOD = "out: runs/x\nmethod: {name: clip}\n"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.engine.config_yaml.REPOSITORY", tmp_path)


def write(name: str, text: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def problems(text: str | bytes, *overrides: str, model: type[Section] = Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(model, write("c.yaml", text), overrides)
    return caught.value.problems


def load(text: str, *overrides: str) -> Config:
    return load_config(Config, write("c.yaml", text), overrides)


# --- values ----------------------------------------------------------------------------------------------------------


def test_config__missing_keys_have_defaults() -> None:
    cfg = load(GOOD)
    assert cfg.out == Path("runs/x")
    assert cfg.method == Clip(name="clip")
    assert cfg.optim == OptimConfig()
    assert cfg.loop == LoopConfig(steps=100, batch_size=8)


def test_section__other_keys_keep_the_fields_default() -> None:
    assert load(GOOD + "loop: {batch_size: 4}\n").loop == LoopConfig(steps=100, batch_size=4)


def test_section__empty_one_is_the_default() -> None:
    assert load(GOOD + "loop:\noptim:\n  # nothing here yet\n") == load(GOOD)


def test_config__is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(GOOD).flag = True  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "1e-04"])
def test_yaml__every_spelling_of_a_small_number_is_a_float(text: str) -> None:
    assert load(f"{GOOD}optim: {{lr: {text}}}\n").optim.lr == 1e-4
    assert load(GOOD, f"optim.lr={text}").optim.lr == 1e-4


@pytest.mark.parametrize("text", ["on", "off", "yes", "no", "12:30", "2026-01-02", "1_000", "=", "0b1"])
def test_yaml__follows_1_2_not_1_1(text: str) -> None:
    assert load(f"{GOOD}title: {text}\n").title == text
    assert load(GOOD, f"title={text}").title == text


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("0x1F", 31), ("0o17", 15), ("+7", 7), ("-3", -3)])
def test_yaml__integers_follow_the_core_schema(text: str, value: int) -> None:
    assert load(f"{GOOD}size: {text}\n").size == value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("flag=true", "flag", True),
        ("size=[3, 4]", "size", (3, 4)),
        ("words=[a, 'b c', \"1\"]", "words", ("a", "b c", "1")),
        ("words=[]", "words", ()),
        ("title=null", "title", None),
        ("title=~", "title", None),
        ("title=", "title", None),
        ("title=''", "title", ""),
        ("title='null'", "title", "null"),
        ("title=a = b", "title", "a = b"),
        ("title=#ff0000", "title", "#ff0000"),
        ("title=mug: cup", "title", "mug: cup"),
        ("title=*star & !bang", "title", "*star & !bang"),
        ("title=größe 🐶", "title", "größe 🐶"),
        ("weights={a: 1e-3, b: 2}", "weights", {"a": 1e-3, "b": 2.0}),
        ("weights.dog=3", "weights", {"dog": 3.0}),
        (" flag = true ", "flag", True),
        ("out=/tmp/a=b", "out", Path("/tmp/a=b")),
        ("teacher.path=photos", "teacher", Source(path=Path("photos"))),
        ("sources=[{path: a}, {path: b, weight: 2}]", "sources", (Source(path="a"), Source(path="b", weight=2))),
    ],
)
def test_override__literals(override: str, key: str, value: Any) -> None:
    assert getattr(load(GOOD, override), key) == value


def test_override__last_wins_and_mappings_merge() -> None:
    cfg = load(GOOD, "loop.steps=3", "loop={steps: 5, batch_size: 2}", "loop.batch_size=6")
    assert (cfg.loop.steps, cfg.loop.batch_size) == (5, 6)


def test_config__without_a_file_uses_defaults_and_overrides() -> None:
    cfg = load_config(Config, None, ["out=x", "method.name=byol"])
    assert cfg.method == Byol(name="byol")


# --- inheritance -----------------------------------------------------------------------------------------------------


def test_base__is_relative_to_its_file_and_nearest_wins() -> None:
    write("a/root.yaml", GOOD + "loop: {steps: 7, batch_size: 2}\nwords: [x, y]\nweights: {a: 1}\n")
    write("a/b/middle.yaml", "base: ../root.yaml\nloop: {steps: 8}\nwords: [z]\n")
    write("c.yaml", "base: a/b/middle\nweights: {b: 2}\n")
    cfg = load_config(Config, "c.yaml")
    assert (cfg.loop.steps, cfg.loop.batch_size) == (8, 2)
    assert cfg.words == ("z",), "lists are replaced, not joined"
    assert cfg.weights == {"a": 1.0, "b": 2.0}


def test_base__null_unsets_a_value() -> None:
    write("root.yaml", GOOD + "title: x\nteacher: {path: p}\n")
    cfg = load("base: root.yaml\ntitle: null\nteacher: null\n")
    assert cfg.title is None
    assert cfg.teacher is None


def test_base__other_variant_replaces_the_section() -> None:
    write("root.yaml", "out: x\nmethod: {name: clip, temperature: 0.5, shared: 9}\n")
    assert load("base: root.yaml\nmethod: {name: byol}\n").method == Byol(name="byol")
    assert load("base: root.yaml\nmethod: {shared: 3}\n").method == Clip(name="clip", temperature=0.5, shared=3)
    assert load("base: root.yaml\n", "method.momentum=0.5", "method.name=byol").method == Byol(
        name="byol", momentum=0.5
    )


def test_base__problem_names_its_own_file() -> None:
    write("sub/root.yaml", "out: x\nmethod: {name: clip}\noptim:\n  lr: fast\n  wieght_decay: 0\n")
    found = problems("base: sub/root.yaml\nloop:\n  steps: 0\n", "flag=maybe")
    assert [p.partition(": ")[0] for p in found] == [
        "c.yaml:3",
        "sub/root.yaml:4",
        "sub/root.yaml:5",
        "override 'flag=maybe'",
    ]


def test_base__replaced_value_is_not_checked() -> None:
    write("root.yaml", GOOD + "size: nonsense\n")
    assert load("base: root.yaml\nsize: 3\n").size == 3


@pytest.mark.parametrize("files", [{"c.yaml": "c.yaml"}, {"c.yaml": "d.yaml", "d.yaml": "e.yaml", "e.yaml": "c.yaml"}])
def test_base__cycle_is_named(files: dict[str, str]) -> None:
    for name, base in files.items():
        write(name, f"base: {base}\n")
    with pytest.raises(ConfigError, match="in a circle") as caught:
        load_config(Config, "c.yaml")
    (problem,) = caught.value.problems
    assert " -> ".join([*files, "c.yaml"]) in problem
    assert problem.startswith(f"{list(files)[-1]}:1: base: ")


def test_base__chain_has_a_limit() -> None:
    for index in range(40):
        write(f"f{index}.yaml", f"base: f{index + 1}.yaml\n")
    write("f40.yaml", GOOD)
    with pytest.raises(ConfigError, match="a chain of more than 32 files"):
        load_config(Config, "f0.yaml")


def test_base__missing_one_is_reported_with_other_problems() -> None:
    write("sub/rooot.yaml", GOOD)
    write("sub/c.yaml", "# c\nbase: root.yaml\noptim: {lr: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Config, "sub/c.yaml")
    first, second = caught.value.problems
    assert first.startswith("sub/c.yaml:2: base: sub/root.yaml: no such file - did you mean 'rooot.yaml'?")
    assert second.startswith("sub/c.yaml:3: optim.lr: expected number > 0 and <= 1000; got -1")


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "''", "{a: b}", "true"])
def test_base__must_be_one_path(base: str) -> None:
    (problem,) = problems(f"base: {base}\n")
    assert "c.yaml:1: base: expected the path of one YAML file" in problem


# --- finding files ---------------------------------------------------------------------------------------------------


def test_find_config__bare_name_with_or_without_suffix() -> None:
    write("configs/pre/train.yaml", GOOD)
    for name in ("pre/train.yaml", "pre/train", Path("configs/pre/train.yaml")):
        assert load_config(Config, name).out == Path("runs/x")


def test_find_config__current_directory_comes_first() -> None:
    write("configs/c.yaml", GOOD)
    write("c.yaml", "out: near\nmethod: {name: clip}\n")
    assert load_config(Config, "c.yaml").out == Path("near")


def test_find_config__works_from_any_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("repository/configs/far.yaml", GOOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("pretrain.engine.config_yaml.REPOSITORY", tmp_path / "repository")
    assert load_config(Config, "far").out == Path("runs/x")


def test_find_config__missing_file_suggests_the_nearest() -> None:
    write("configs/vild.yaml", GOOD)
    write("configs/pretrain/clip.yaml", GOOD)
    near = {"vidl.yaml": "vild.yaml", "clib": "pretrain/clip.yaml", "pretrain/clipp": "pretrain/clip.yaml"}
    for asked, meant in near.items():
        with pytest.raises(ConfigError, match=f"{asked}: no such file - did you mean '{meant}'"):
            load_config(Config, asked)
    with pytest.raises(ConfigError, match=r"no such file \(there are: pretrain/clip.yaml, vild.yaml\)"):
        load_config(Config, "zzz")


def test_config__not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, said in (("folder", "is a folder"), ("", "is not a file name"), ("a\0b", "is not a file name")):
        with pytest.raises(ConfigError, match=said):
            load_config(Config, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Config, "x" * 5000)


# --- messages --------------------------------------------------------------------------------------------------------


def test_errors__come_at_once_with_lines() -> None:
    text = """\
out: x
method:
  name: clipp
flag: on
loop:
  step: 3
  accumulate: 0
optim: {lr: 1e-4, betas: [.9, 2]}
lr: 3
sources:
  - path: a
  - paht: b
    weight: heavy
"""
    assert problems(text, "title=3", "optim.naem=sgd", "size") == [
        "c.yaml:3: method.name: expected one of clip, byol; got the text 'clipp' - did you mean 'clip'?",
        "c.yaml:4: flag: expected true or false; got the text 'on' (write true)",
        "c.yaml:6: loop.step: unknown key - did you mean 'steps'? (known: steps, batch_size, accumulate, seed,"
        " precision, clip_norm, device, log_every, save_every, keep, workers, threads)",
        "c.yaml:7: loop.accumulate: expected integer from 1 to 1000000; got 0",
        "c.yaml:8: optim.betas: expected list of 2, each number >= 0 and < 1; got [0.9, 2]",
        "c.yaml:9: lr: unknown key - did you mean 'optim.lr'? (known: out, method, flag, size, title, words, weights,"
        " sources, teacher, loop, optim)",
        "c.yaml:12: missing key 'sources.1.path' (path): folder",
        "c.yaml:12: sources.1.paht: unknown key - did you mean 'path'? (known: path, weight)",
        "c.yaml:13: sources.1.weight: expected number > 0; got the text 'heavy'",
        "override 'title=3': title: expected text or null; got 3",
        "override 'optim.naem=sgd': optim.naem: unknown key - did you mean 'name'? (known: name, lr, weight_decay,"
        " momentum, betas, eps, warmup_steps, schedule, milestones, gamma, final_lr_ratio)",
        "override 'size': expected key=value, for example optim.lr=1e-4",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flag: 1\n", "c.yaml:3: flag: expected true or false; got 1"),
        ("flag: 'true'\n", "c.yaml:3: flag: expected true or false; got the text 'true'"),
        ("flag: no\n", "got the text 'no' (write false)"),
        ("loop: {steps: 1e3}\n", "loop.steps: expected integer from 1 to 1000000000; got 1000.0 (write 1000)"),
        ("loop: {steps: 10_000}\n", "got the text '10_000' (write 10000, without quotes)"),
        ("loop: {steps: true}\n", "got true"),
        ("loop: {steps: null}\n", "got null"),
        ("loop: 7\n", "c.yaml:3: loop: expected a mapping with the keys steps, batch_size"),
        ("method: clip\n", "c.yaml:3: method: expected a mapping with the keys name, temperature"),
        ("optim: {lr: .inf}\n", "got .inf"),
        ("optim: {lr: .nan}\n", "got .nan"),
        ("optim: {lr: 1e999}\n", "got .inf"),
        (
            "optim: {name: adam}\n",
            "optim.name: expected one of adamw, sgd, lars; got the text 'adam' - did you mean 'adamw'?",
        ),
        ("optim: {schedule: step}\n", "c.yaml:3: optim: schedule step needs milestones"),
        ("optim: {milestones: [5]}\n", "milestones are used by schedule step only"),
        ("optim: {schedule: step, milestones: [5, 5]}\n", "milestones must increase"),
        ("loop: {batch_size: 10, accumulate: 4}\n", "batch_size 10 cannot be split into accumulate = 4 equal passes"),
        ("optim: {warmup_steps: 100}\n", "c.yaml: optim.warmup_steps must be less than loop.steps"),
        ("loop.steps: 3\n", "loop.steps: unknown key - in a file write 'steps' below 'loop:', indented"),
        ("weights: {a: b}\n", "weights: expected mapping of names to number; got {a: b}"),
        ("words: dog\n", "words: expected list of text; got the text 'dog'"),
        ("words: [dog, 3]\n", "words: expected list of text; got [dog, 3]"),
        ("size: [1, 2, 3]\n", "size: expected integer or list of 2, each integer; got [1, 2, 3]"),
        ("sources: {path: a}\n", "c.yaml:3: sources: "),
        ("sources: [a]\n", "c.yaml:3: sources.0: expected a mapping with the keys path, weight; got the text 'a'"),
        ("teacher: {weight: 2}\n", "c.yaml:3: missing key 'teacher.path' (path): folder"),
    ],
)
def test_config__one_wrong_value_is_explained(text: str, said: str) -> None:
    start = "out: x\n# comment\n" if text.startswith("method") else "out: x\nmethod: {name: clip}\n"
    (problem,) = problems(start + text)
    assert said in problem


def test_errors__missing_key_has_type_and_meaning() -> None:
    assert problems("flag: true\n") == [
        "c.yaml: missing key 'out' (path): run folder",
        "c.yaml: missing key 'method.name' (one of clip, byol)",
    ]


def test_errors__key_of_another_variant_is_unknown() -> None:
    (problem,) = problems("out: x\nmethod:\n  name: byol\n  temperature: 1\n")
    assert problem == "c.yaml:4: method.temperature: unknown key for this choice (known: name, momentum, shared)"


def test_errors__duplicate_key_names_both_lines() -> None:
    (problem,) = problems(GOOD + "optim:\n  lr: 1\n  lr: 2\n")
    assert problem == "c.yaml:5: duplicate key 'lr' (first at c.yaml:4)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\nb: 3\n", "c.yaml:2: not readable as YAML: "),
        ("a: 'b\n", "not readable as YAML: "),
        ("a:\n\tb: 1\n", "c.yaml:2: not readable as YAML: "),
        ("x: 1\n---\ny: 2\n", "c.yaml:2: not readable as YAML: expected a single document"),
        ("a: \x01\n", "c.yaml:1: not readable as YAML: special characters"),
        (b"out: x\ntitle: caf\xe9\n", "c.yaml:2: not UTF-8 text"),
        ("- a\n- b\n", "c.yaml:1: expected lines of 'key: value', got [a, b]"),
        ("just text\n", "c.yaml:1: expected lines of 'key: value', got the text 'just text'"),
        ("3\n", "expected lines of 'key: value', got 3"),
        ("out: !!python/object/apply:os.system [ls]\n", "c.yaml:1: the tag "),
        ("out: !!binary aGk=\n", "c.yaml:1: the tag "),
        ("out: !mine x\n", "c.yaml:1: the tag '!mine' is not accepted"),
        ("size: !!int x\n", "c.yaml:1: not readable as int"),
        ("title: &x a\nloop:\n  <<: *x\n", "c.yaml:3: '<<' is not accepted"),
        ("? [a]\n: 1\n", "c.yaml:1: a key must be a word"),
        ('a: "\\ud800"\n', "c.yaml:1: text with half a surrogate pair"),
        ('a: "\\UFFFFFFFF"\n', "c.yaml: not readable as YAML"),
        ("a: " + "9" * 5000 + "\n", "c.yaml:1: not readable as int"),
        ("a: " + "[" * 100000 + "\n", "c.yaml:1: nested more than 32 levels deep"),
        ("a: &a [*a]\n", "c.yaml:1: nested more than 32 levels deep (does an alias contain itself?)"),
        ("a: *nobody\n", "c.yaml:1: not readable as YAML: found undefined alias"),
    ],
)
def test_errors__unreadable_yaml_has_a_line(text: str | bytes, said: str) -> None:
    assert said in problems(text)[0]


def test_yaml__alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "more than 20000 values, counting what aliases repeat" in problems("\n".join(lines))[0]


def test_yaml__too_many_values_are_refused() -> None:
    assert "more than 20000 values" in problems("words: [" + "x, " * 30_000 + "]")[0]


def test_yaml__ordinary_aliases_are_accepted() -> None:
    assert load(GOOD + "weights: {a: &x 3, b: *x}\n").weights == {"a": 3.0, "b": 3.0}


def test_yaml__file_over_a_megabyte_is_refused() -> None:
    assert problems(b"#" * 1_000_001) == ["c.yaml: larger than 1000 kB; is this a configuration?"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\ufeff"])
def test_yaml__empty_file_lacks_only_required_keys(text: str) -> None:
    assert {p.split("'")[1] for p in problems(text)} == {"out", "method.name"}


def test_yaml__crlf_and_bom_are_accepted() -> None:
    assert load("\ufeff" + GOOD.replace("\n", "\r\n")).out == Path("runs/x")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("base=x.yaml", "'base' can only stand in a file"),
        ("words=[a", "not readable as YAML"),
        ("title='a", "not readable as YAML"),
        ("size=" + "9" * 5000, "digit"),
        ("optim.lr.x=3", "optim.lr: expected number > 0 and <= 1000; got {x: 3}"),
        ("sources.0.path=x", "sources: "),
        ("title=\udcff", "not UTF-8 text"),
        (".".join("a" * 100) + "=1", "nested more than 32 levels deep"),
    ],
)
def test_override__wrong_one_is_named(override: str, said: str) -> None:
    (problem,) = problems(GOOD, override)
    assert problem.startswith("override '")
    assert said in problem
    assert len(problem) < 400


# --- out again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "title=1e-4x",
            "words=['on', 'null', '1e-4', '012', '3', '', ' ', '- a', '#', 'a: b', '2026-01-02', '\u00e9']",
        ),
        ("weights={a: 1e-5, 'on': 3, '1': 4}", "method.name=byol", "size=[1, 2]", "optim.lr=1e-30"),
        ("teacher={path: /a b}", "sources=[{path: x}, {path: y, weight: 2}]", "optim.betas=[0, 0.5]"),
    ],
)
def test_dump__round_trip(overrides: tuple[str, ...]) -> None:
    cfg = load(GOOD, *overrides)
    text = dump_config(cfg)
    assert load(text) == cfg
    assert dump_config(load(text)) == text
    assert dump_config(plain(cfg)) == text


def test_config_hash__covers_training_keys_only() -> None:
    cfg = load(GOOD)
    free = ["out=y", "loop.workers=3", "loop.log_every=7", "loop.save_every=8", "loop.keep=9", "loop.threads=2"]
    assert config_hash(load(GOOD, *free)) == config_hash(cfg)
    assert len(config_hash(cfg)) == 12
    learnt = [
        "loop.seed=1",
        "loop.steps=99",
        "optim.lr=1",
        "method.shared=5",
        "method.name=byol",
        "flag=true",
        "title=x",
    ]
    hashes = {config_hash(load(GOOD, override)) for override in learnt}
    assert len(hashes - {config_hash(cfg)}) == len(learnt)


class WithoutKey(Section):
    """As hashes were published."""

    depth: int = Field(default=18, description="layers")


class WithNewKey(WithoutKey):
    """The same with keys that came later."""

    freeze_at: int = Field(default=0, description="stages", json_schema_extra=LATER)
    cut: Source | None = Field(default=None, description="a section", json_schema_extra=LATER)


def test_config_hash__later_key_counts_only_if_set() -> None:
    assert config_hash(WithNewKey(depth=50)) == config_hash(WithoutKey(depth=50))
    changed = [WithNewKey(freeze_at=2), WithNewKey(cut=Source(path=Path("x"))), WithNewKey(cut=Source(path=Path("y")))]
    assert len({config_hash(cfg) for cfg in (WithNewKey(), *changed)}) == 4


def test_config_hash__does_not_depend_on_notation() -> None:
    write("root.yaml", "method: {name: clip}\nout: z\n")
    assert config_hash(load("base: root.yaml\noptim: {lr: 0.001}\n")) == config_hash(load(GOOD, "optim.lr=1e-3"))


def test_changed_keys__names_differing_training_keys() -> None:
    old, new = (
        plain(load(GOOD)),
        plain(load(GOOD, "optim.lr=1", "loop.steps=5", "loop.workers=0", "out=b", "method.name=byol")),
    )
    assert changed_keys(old, new) == [
        "loop.steps",
        "method.momentum",
        "method.name",
        "method.shared",
        "method.temperature",
        "optim.lr",
    ]
    assert changed_keys(old, new, ignore=["method", "out", "loop"]) == ["optim.lr"]
    assert changed_keys(old, old) == []


def test_changed_keys__tuples_equal_lists() -> None:
    assert changed_keys({"a": (1, 2), "b": {"c": 1}}, {"a": [1, 2], "b": {"c": 1.0}}) == []
    assert changed_keys({"a": {}}, {"a": {"b": 1}}) == ["a", "a.b"]


def test_section__field_default_wins_over_class_default() -> None:
    class Inner(Section):
        size: int = Field(default=1, description="Size.")
        name: str = Field(description="Name.")

    class Outer(Section):
        own: Inner = Field(default=Inner(size=2, name="a"), description="With a default.")
        given: Inner = Field(description="Without.")

    assert keys_at_default(Outer(given=Inner(name="b"))) == {"own.size", "own.name", "given.size"}
    assert keys_at_default(Outer(own=Inner(name="a"), given=Inner(size=2, name="b"))) == {"own.name"}


def test_free_keys__has_one_source() -> None:
    assert free_keys(Config) == FREE_BY_DEFAULT
    assert {"out", "loop.workers", "loop.log_every", "loop.save_every", "loop.keep", "loop.threads"} == FREE_BY_DEFAULT
    assert not set(training_keys(load(GOOD))) & FREE_BY_DEFAULT
    assert training_keys(load(GOOD))["optim.lr"] == 1e-3


def test_config_hash__infinite_numbers() -> None:
    class Loose(Section):
        """Anything goes."""

        extra: dict[str, Any] = Field(default={}, description="whatever")

    assert config_hash(Loose(extra={"a": math.inf})) != config_hash(Loose(extra={"a": 1.0}))


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (Annotated[int, Field(ge=1)] | None, "integer >= 1 or null"),
        (Annotated[float, Field(ge=0, le=1)], "number from 0 to 1"),
        (Annotated[float, Field(gt=0, lt=0.5)], "number > 0 and < 0.5"),
        (Annotated[int, Field(multiple_of=32)], "integer a multiple of 32"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["", "b"], "one of '', b"),
        (Literal["a"], "a"),
        (list[str], "list of text"),
        (Annotated[list[str], Field(min_length=1)], "list of text of length at least 1"),
        (Annotated[list[str], Field(min_length=2, max_length=2)], "list of text of length 2"),
        (tuple[int, float], "list of 2, namely integer, number"),
        (tuple[tuple[float, ...], ...], "list of list of number"),
        (dict[str, bool], "mapping of names to true or false"),
        (Path | str | None, "path or text or null"),
        (Source | None, "mapping of keys or null"),
        (Any, "anything"),
    ],
)
def test_type_text__describes_types(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


def test_errors__first_of_many_are_explained() -> None:
    found = problems(GOOD + "".join(f"key_{number}: 1\n" for number in range(70)))
    assert len(found) == 51
    assert found[-1] == "c.yaml: and 20 more; is this configuration for this command?"
    assert found[0].startswith("c.yaml:3: key_0: unknown key")
