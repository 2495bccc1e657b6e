# SPDX-License-Identifier: Apache-2.0
"""Rules that hold over the whole source tree: nothing runs code from data, floors import only downwards.

The files are read as syntax trees and never imported, so a comment or a string that mentions a banned call is no
finding.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ovd", "pretrain", "scripts", "tests", "benchmarks", "examples")
FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.is_file()
) + ["app.py"]
PRODUCT = [file for file in FILES if file.startswith(("ovd/", "pretrain/")) or file == "app.py"]

# Reading these formats can run code that the file brings along.
UNSAFE_MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pdb"}
)
UNSAFE_YAML = frozenset({"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader"})
BANNED_CALLS = frozenset({"eval", "exec", "breakpoint", "__import__"})
BANNED_ATTRIBUTES = frozenset({"os.system", "os.popen", "torch.hub.load", "torch.package.PackageImporter"})
SAFE_LOADERS = frozenset({"SafeLoader", "CSafeLoader"})

# The floors, upper first. A file belongs to the first whose prefix it has, and may import its own floor and lower ones.
FLOORS = ("app", "ovd", "pretrain", "pretrain.engine")
DETECTRON2_FILES = re.compile(
    r"ovd/(data|evaluation)/.*|pretrain/export\.py"
    r"|ovd/modeling/(proposals/(network|pyramid)|region_head|backbone|vild/.*|detr/network)\.py"
)

# Spelt in two parts so that this file does not break its own rule.
MACHINE_PATHS = re.compile(r"(?<![\w.~])/" + r"work/|\.\./" + r"shared")


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for an attribute chain on a name, otherwise the empty string."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def may_be_true(node: ast.expr | None) -> bool:
    return node is not None and not (isinstance(node, ast.Constant) and node.value in (False, None))


def violations(source: str) -> Iterator[str]:
    """Yield ``line: what`` for everything in a file that could run code from data, a shell, or hide an error."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNSAFE_MODULES:
                    yield f"{line}: imports {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {alias.name for alias in node.names}
            if module.split(".")[0] in UNSAFE_MODULES:
                yield f"{line}: imports {module}"
            if module in ("torch", "yaml", "numpy", "torch.hub") and "load" in names:
                yield f"{line}: imports load from {module}; write {module}.load(...), which is checked"
            if module == "os" and names & {"system", "popen"}:
                yield f"{line}: imports a shell call from os"
            if module == "yaml" and names & UNSAFE_YAML:
                yield f"{line}: imports an unsafe YAML loader"
        elif isinstance(node, ast.Attribute):
            if dotted(node) in BANNED_ATTRIBUTES:
                yield f"{line}: {dotted(node)}"
            elif dotted(node).startswith("yaml.") and node.attr in UNSAFE_YAML:
                yield f"{line}: {dotted(node)}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{line}: bare except"
        elif isinstance(node, ast.Call):
            yield from call_violations(node)


def call_violations(node: ast.Call) -> Iterator[str]:
    """The part of `violations` that looks at one call."""
    name = dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in BANNED_CALLS:
        yield f"{node.lineno}: {name}()"
    if may_be_true(keywords.get("shell")):
        yield f"{node.lineno}: shell=True"
    if may_be_true(keywords.get("allow_pickle")):
        yield f"{node.lineno}: allow_pickle=True"
    if may_be_true(keywords.get("trust_remote_code")):
        yield f"{node.lineno}: trust_remote_code=True"
    if name == "torch.load" and not is_true(keywords.get("weights_only")):
        yield f"{node.lineno}: torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        last = dotted(loader).split(".")[-1] if loader is not None else ""
        # A loader class of our own is checked where it is defined: it must derive from a safe one (see below).
        if last not in SAFE_LOADERS and not last.endswith("SafeLoader"):
            yield f"{node.lineno}: yaml.load without a safe loader"


def unsafe_loader_classes(source: str) -> Iterator[str]:
    """Yield classes named like a safe YAML loader that do not derive from one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("SafeLoader"):
            if not any(dotted(base).split(".")[-1] in SAFE_LOADERS for base in node.bases):
                yield f"{node.lineno}: class {node.name} does not derive from yaml.SafeLoader"


def module_name(file: str) -> str:
    parts = file.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, file: str) -> set[str]:
    """Full names of every module a file imports, anywhere in it but under ``if TYPE_CHECKING``.

    ``from a.b import c`` counts as ``a.b`` and as ``a.b.c``, since ``c`` may be a module.
    """
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module_name(file).split(".")
    if not file.endswith("__init__.py"):
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def floor_of(module: str) -> int | None:
    """Index in `FLOORS` of the floor a module belongs to; None when it is none of ours."""
    levels = [index for index, floor in enumerate(FLOORS) if module == floor or module.startswith(floor + ".")]
    return levels[-1] if levels else None


def climbs(source: str, file: str) -> list[str]:
    """The imports of a file that lead to a floor above its own, or out of the product."""
    own = floor_of(module_name(file))
    assert own is not None, file
    found = []
    for module in sorted(imported_modules(source, file)):
        floor = floor_of(module)
        # `from pretrain import x` inside pretrain.engine names the floor above; importing `pretrain.engine.y` does not.
        if (floor is not None and floor < own) or module.split(".")[0] in ("scripts", "tests", "benchmarks"):
            found.append(module)
    return found


@pytest.mark.parametrize("file", FILES)
def test_source__runs_no_code_from_data_and_hides_no_error(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert [*violations(source), *unsafe_loader_classes(source)] == []


@pytest.mark.parametrize("file", FILES)
def test_source__has_a_licence_and_no_machine_path(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    if not lines:
        return
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
    assert [line for line in lines if MACHINE_PATHS.search(line)] == []


@pytest.mark.parametrize("file", PRODUCT)
def test_imports__go_down_only(file: str) -> None:
    assert climbs((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", [file for file in PRODUCT if not file.startswith("ovd/runtime/")])
def test_imports__onnxruntime_only_below_ovd_runtime(file: str) -> None:
    imported = imported_modules((ROOT / file).read_text(encoding="utf-8"), file)
    assert [name for name in imported if name.partition(".")[0] == "onnxruntime"] == []


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Names that import one another in a circle, the first one again at the end; [] when there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports__have_no_cycle() -> None:
    """Imports inside functions count: they hide a circle, they do not undo it."""
    modules = {module_name(file): file for file in PRODUCT}
    imports = {
        name: (imported_modules((ROOT / file).read_text(encoding="utf-8"), file) & modules.keys()) - {name}
        for name, file in modules.items()
    }
    assert circle(imports) == []


def test_checker__finds_a_cycle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


@pytest.mark.parametrize("file", [file for file in PRODUCT if not DETECTRON2_FILES.fullmatch(file)])
def test_imports__detectron2_only_in_allowed_files(file: str) -> None:
    modules = imported_modules((ROOT / file).read_text(encoding="utf-8"), file)
    assert [module for module in modules if module.split(".")[0] == "detectron2"] == []


@pytest.mark.parametrize("file", PRODUCT)
def test_source__never_edits_the_module_search_path(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = [dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith("sys.path.")] == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("tests/")])
def test_test_names__are_subject_and_behaviour(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [name for name in names if name.startswith("test_") and "__" not in name] == []


def test_source__no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for file in PRODUCT:
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(file)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", PRODUCT)
def test_source__files_are_short(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 450


# The checker itself: what it must find, and what it must leave alone.


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import cloudpickle",
        "def f():\n    import joblib",
        "eval('1')",
        "exec('x = 1')",
        "__import__('os')",
        "import os\nos.system('ls')",
        "import os\nrun = os.system",
        "from os import system",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import torch\ntorch.load('x.pt')",
        "import torch\ntorch.load('x.pt', weights_only=False)",
        "import torch\ntorch.load('x.pt', weights_only=flag)",
        "from torch import load",
        "import numpy as np\nnp.load('x.npy', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import unsafe_load",
        "try:\n    pass\nexcept:\n    pass",
        "model.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_checker__finds_each_violation(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "text = 'eval(x), pickle, torch.load(x)'",
        "# import pickle",
        "import torch\ntorch.load('x.pt', map_location='cpu', weights_only=True)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import numpy as np\nnp.load('x.npy', allow_pickle=False)",
        "try:\n    pass\nexcept Exception:\n    raise",
        "import os\nos.path.join('a')",
    ],
)
def test_checker__accepts_valid_code(source: str) -> None:
    assert list(violations(source)) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("pretrain/engine/loop.py", "from pretrain import losses", ["pretrain", "pretrain.losses"]),
        ("pretrain/engine/loop.py", "from .. import losses", ["pretrain", "pretrain.losses"]),
        ("pretrain/engine/loop.py", "from pretrain.engine import optim\nfrom . import log", []),
        ("pretrain/losses.py", "from ovd.text import x", ["ovd.text", "ovd.text.x"]),
        ("pretrain/train.py", "def f():\n    import ovd", ["ovd"]),
        ("ovd/train.py", "import app", ["app"]),
        ("ovd/train.py", "from pretrain.engine.loop import fit\nimport ovd.text\nimport apple", []),
        ("ovd/train.py", "import scripts.make_weights", ["scripts.make_weights"]),
        ("app.py", "from ovd.demo import page", []),
        ("pretrain/losses.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ovd", []),
    ],
)
def test_checker__knows_the_floors(file: str, source: str, expected: list[str]) -> None:
    assert climbs(source, file) == expected


def test_source__yaml_loaders_derive_from_a_safe_one() -> None:
    assert list(unsafe_loader_classes("class MySafeLoader(yaml.Loader): pass"))
    assert not list(unsafe_loader_classes("class MySafeLoader(yaml.SafeLoader): pass"))
