# SPDX-License-Identifier: Apache-2.0
"""Array functions for scoring. NumPy only, so that scores do not depend on the runtime of the network."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float32]

one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""Keeps OpenBLAS, or what else NumPy was built with, at one thread: a decorator, or a context.

After a product OpenBLAS's threads go on spinning for some milliseconds and take the processor from the network that
looks at the next picture: on two cores a photo takes 1.7 times as long (`benchmarks/bench_photo.py`). The products of
one picture are small.
"""


def as_array(values: Any) -> NDArray[Any]:
    """A network's output as an array: arrays unchanged, tensors of any device and precision as float32."""
    torch = sys.modules.get("torch")  # a caller with a tensor has imported it
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def unit_rows(rows: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow and with all digits of small values."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def logit(p: Floats, *, eps: float) -> Floats:
    """log(p / (1 − p)) of probabilities that are kept ``eps`` away from 0 and 1."""
    p = np.clip(p, eps, 1 - eps)
    return np.log(p / (1 - p))


PLATT_EPS = 1e-6
"""Distance from 0 and 1 of probabilities that Platt scaling takes."""


def platt_scaled(p: Floats, *, slope: float, offset: float) -> Floats:
    """``sigmoid(slope · logit(p) + offset)``, fitted by `ovd.inference.calibration.fit_platt`."""
    return sigmoid(slope * logit(p, eps=PLATT_EPS) + offset)


def softmax(logits: Floats) -> Floats:
    """Along the rows."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def best_first(scores: Floats, count: int | None = None) -> NDArray[np.int64]:
    """Indices of the best scores; of equal ones the first comes first."""
    order = -scores
    if count is None or not 0 < count < len(order):
        return np.argsort(order, kind="stable")[:count]
    last = np.partition(order, count - 1)[count - 1]
    if np.isnan(last):
        return np.argsort(order, kind="stable")[:count]
    index = np.flatnonzero(order <= last)  # few of many: only these are sorted
    return index[np.argsort(order[index], kind="stable")[:count]]
