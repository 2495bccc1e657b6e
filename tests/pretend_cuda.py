# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: tensors that say they are on ``cuda:0`` and compute on the CPU, for tests without one.

What a GPU refuses is refused here: operations on tensors of both devices, a CPU generator for numbers on the GPU, and
`Tensor.numpy` of what was not brought to the CPU. So a forward pass that would stop on a GPU stops here too. What is
not here: backward passes (autograd asks the driver for the device), streams, the GPU's own kernels and their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Mixed(RuntimeError):
    """An operation was given tensors of both devices."""


class OnCuda(torch.Tensor):
    """A tensor that says it is on the GPU; ``inner`` is it, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> OnCuda:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
            requires_grad=real.requires_grad,
            dispatch_sizes_strides_policy="sizes",  # asked of ``inner``: ``unsqueeze_`` changes them
        )

    def __init__(self, real: Tensor) -> None:
        self.inner = real.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """A subclass has none of its own; a GPU's tensor has."""
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.inner!r})"


class _Mode(TorchDispatchMode):
    """For operations without a tensor on the GPU: ``torch.zeros(3, device="cuda")`` and ``.to("cuda")``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in leaves if isinstance(x, OnCuda)]
    _refuse_mixtures(func, args, leaves, here)
    target = kwargs.get("device")
    cuda = bool(here) if target is None else torch.device(target).type == "cuda"
    if func is aten.copy_.default:
        cuda = isinstance(args[0], OnCuda)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if cuda and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
    out = func(*_unwrapped(args), **_unwrapped(kwargs))
    known = {id(x.inner): x for x in here}  # what is written in place stays the same object
    return tree_map(lambda x: known.get(id(x), OnCuda(x)) if cuda and isinstance(x, Tensor) else x, out)


def _unwrapped(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, OnCuda) else x, tree)


def _refuse_mixtures(func: Any, args: tuple[Any, ...], leaves: list[Tensor], here: list[OnCuda]) -> None:
    if func in BETWEEN_DEVICES or not here:
        return
    if func in INDEXED and isinstance(args[0], OnCuda):  # a GPU takes indices from the CPU
        leaves = [args[0], *args[2:3]]
    # A number in a tensor without dimensions may come from anywhere.
    away = [x for x in leaves if not isinstance(x, OnCuda) and x.dim()]
    if away:
        shapes = [f"{tuple(x.shape)} on {x.device}" for x in leaves]
        raise Mixed(f"{func}: expected all tensors on one device, got {', '.join(shapes)}")


def _enter_no_grad(mode: Any) -> None:
    """Inference tensors cannot be wrapped; `torch.no_grad` in place of `torch.inference_mode` serves as well."""
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


def _exit_no_grad(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Within it ``device="cuda:0"`` works; without the number torch asks the driver for it."""
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes a tensor of the CPU and then moves it
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: one that does nothing
    try:
        with (
            torch.backends.cudnn.flags(enabled=False),
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch.multiple(torch.inference_mode, __enter__=_enter_no_grad, __exit__=_exit_no_grad),
            _Mode(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


def to_cuda(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers, and nothing else: as ``module.to("cuda:0")`` does."""
    moved: dict[int, Any] = {}

    def move(x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        return moved.setdefault(id(x), make(x))

    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = move(
                    value, lambda p: nn.Parameter(OnCuda(p.detach()), requires_grad=p.requires_grad)
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = move(value, OnCuda)
    return module
