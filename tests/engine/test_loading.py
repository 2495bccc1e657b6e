# SPDX-License-Identifier: Apache-2.0
"""What loading does without: torch's compiler, and searches for garbage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "ovd/demo/examples/photos/dogs.jpg"


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_lazy_compiler__libraries_load_without_it_and_are_whole_afterwards() -> None:
    run("""
import sys
from pretrain.engine.loading import without_compiler
from pretrain.nets.open_clip_parts import open_clip_module
with without_compiler():
    import torchvision
    from ovd.demo.answer import Answerer
    from ovd.modeling.load import load_detector_model
    tokenizer = open_clip_module("tokenizer")
    assert open_clip_module("transformer").TextTransformer and open_clip_module("tokenizer") is tokenizer
assert not {"torch._dynamo", "torch._dynamo.utils", "sympy", "timm"} & set(sys.modules), "more was imported"
assert not [m for m in sys.modules if m.startswith("open_clip")]
import torch
boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0]])
assert torchvision.ops.nms(boxes, torch.tensor([0.1, 0.9]), 0.5).tolist() == [1]
assert torchvision.ops.roi_align(torch.ones(1, 1, 9, 9), [boxes], 2).shape == (2, 1, 2, 2)
assert tokenizer.SimpleTokenizer(context_length=9)(["a cat"]).shape == (1, 9)
import open_clip, open_clip.tokenizer
assert open_clip.tokenizer.SimpleTokenizer and open_clip_module("model") is open_clip.model
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") in (True, False) and "sympy" in sys.modules
assert torch._dynamo.is_compiling() is False
""")


@pytest.mark.parametrize("wanted", ["from torch._dynamo import is_compiling", "import torch._dynamo.config"])
def test_lazy_compiler__whoever_needs_more_gets_the_real_one(wanted: str) -> None:
    run(f"""
import sys
from pretrain.engine.loading import without_compiler
import torch
with without_compiler():
    {wanted}
import torch._dynamo
assert torch._dynamo.is_compiling() is False and torch._dynamo.__file__ and torch._dynamo.config.cache_size_limit
""")


def test_lazy_compiler__a_detector_loads_without_it() -> None:
    run(f"""
import sys
from ovd import Detector
assert len(Detector.load("default", runtime="torch", device="cpu", threads=1).find({str(PHOTO)!r}, "dog"))
assert not {{"torch._dynamo", "sympy"}} & set(sys.modules), "more was imported"
""")


def test_garbage_collection__waits_until_all_is_loaded() -> None:
    run("""
import gc, weakref
from pretrain.engine.loading import without_garbage_collection
class Thing:
    def __init__(self):
        self.itself = self
searches = []
gc.callbacks.append(lambda phase, facts: searches.append(facts["generation"]))
with without_garbage_collection():
    kept = [[] for _ in range(100_000)]
    garbage = weakref.ref(Thing())
    with without_garbage_collection():
        pass
    assert not searches and not gc.isenabled() and garbage() is not None
assert gc.isenabled() and not any(thing is kept for thing in gc.get_objects(generation=0))
gc.collect()
assert garbage() is None
try:
    with without_garbage_collection():
        raise KeyError
except KeyError:
    assert gc.isenabled()
gc.freeze()
frozen = gc.get_freeze_count()
with without_garbage_collection():
    pass
assert gc.isenabled() and gc.get_freeze_count() == frozen
gc.disable()
with without_garbage_collection():
    pass
assert not gc.isenabled()
""")


@pytest.mark.parametrize("end", ["return 0", "raise UserError('no')"])
def test_garbage_collection__a_command_ends_without_a_last_search(end: str) -> None:
    code = f"""
import gc
from pretrain.engine.errors import UserError, run_cli
class Thing:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("found")
def main(argv):
    gc.disable()
    Thing()
    {end}
run_cli(main, [])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == ((2, "") if "raise" in end else (0, ""))
