# SPDX-License-Identifier: Apache-2.0
"""The limit on NumPy's threads while a picture is scored."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from ovd import Detector
from ovd.inference.arrays import one_blas_thread
from ovd.inference.scorers import Shown


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_blas_thread__ends_with_an_error() -> None:
    before = blas_threads()
    with one_blas_thread:
        assert blas_threads() <= {1}
    with pytest.raises(KeyError), one_blas_thread:
        raise KeyError
    assert blas_threads() == before


def test_classify__limits_numpy_and_gives_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector.load("default", regions=5)
    seen = detector.embed(np.zeros((40, 40, 3), np.uint8))
    inside: list[set[int]] = []
    of = Shown.of
    monkeypatch.setattr(Shown, "of", lambda *args, **named: inside.append(blas_threads()) or of(*args, **named))
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        seen.classify(["dog"])
        assert blas_threads() == before
    assert inside and all(threads <= {1} for threads in inside)
