# SPDX-License-Identifier: Apache-2.0
"""Faster imports and loading: without torch's compiler and garbage collection."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_STUBBED = (_COMPILER, f"{_COMPILER}.utils")


class _CompilerStub(ModuleType):
    """Replaces torch's compiler while libraries are imported.

    torchvision and timm import it to ask whether something can be compiled and to mark functions that must not be; the
    page compiles nothing. The real one takes 2 seconds and, with sympy, triton and distributed tensors, 200 MB.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        spec = importlib.util.find_spec("torch")
        folders = (spec.submodule_search_locations or []) if spec is not None else []
        self.__path__ = [str(Path(folder, "_dynamo")) for folder in folders]

    def __getattr__(self, name: str) -> Any:
        """Any other attribute comes from the real one, which is imported then."""
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stubs()
        return getattr(importlib.import_module(self.__name__), name)

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
        """``torch._dynamo.disable``: what is not compiled stays as it is."""
        return (lambda wrapped: wrapped) if function is None else function

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """``torch._dynamo.utils.is_compile_supported`` of the real one, when somebody calls it."""
        return bool(importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type))


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import libraries inside without torch's compiler; afterwards it can be imported as ever."""
    if any(name in sys.modules for name in _STUBBED):
        yield
        return
    for name in _STUBBED:
        sys.modules[name] = _CompilerStub(name)
    try:
        yield
    finally:
        _remove_stubs()


def _remove_stubs() -> None:
    for name in _STUBBED:
        if isinstance(sys.modules.get(name), _CompilerStub):
            del sys.modules[name]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import and load inside without garbage collection, which takes a sixth of the time and finds little.

    Objects that exist afterwards are in the oldest generation, so that only a full collection looks at them again.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # `unfreeze` would undo what somebody else froze
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@contextmanager
def fast_loading() -> Iterator[None]:
    """Import and load inside without torch's compiler and without garbage collection."""
    with without_compiler(), without_garbage_collection():
        yield
