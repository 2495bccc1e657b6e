# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.runtime.cpu import computes_int8
from pretrain.engine.errors import UserError


class Graph:
    """A graph of a file, loaded when it is first run.

    Args:
        file: `.onnx`.
        threads: that compute; None: one for each core.
    """

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        self.file, self.threads = file, threads
        self._session: object | None = None

    def __call__(self, outputs: list[str], **inputs: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run it; values by the names of its outputs and inputs."""
        if self._session is None:
            self._session = open_session(self.file, threads=self.threads)
        return self._session.run(outputs, inputs)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, object]:
        """Sessions cannot be pickled: a copy opens its own."""
        return {**self.__dict__, "_session": None}


def open_session(file: Path, *, threads: int | None = None) -> object:
    """An `onnxruntime.InferenceSession`.

    Raises:
        UserError: ONNX Runtime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as problem:
        raise UserError("runtime onnx needs the package onnxruntime: pip install onnxruntime") from problem
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about sizes that differ from the traced ones
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # The threads of one network do not spin while another one runs: on two cores a photo would take twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if computes_int8() is False:
        # Else sums of two products u8·s8 stop at 16 bits: exact sums for some speed (graphs in single precision: none).
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's own exceptions have no common base that it names
        raise UserError(f"{file}: ONNX Runtime cannot load it ({problem}); export the weights again") from problem
