# SPDX-License-Identifier: Apache-2.0
"""Networks without torch: ONNX export, inference around it in NumPy, and the choice of the runtime."""

from __future__ import annotations

import os

# From 1.29 on ONNX Runtime's own builds keep an identifier of the machine under ~/.cache/Microsoft and report sessions
# to their maker, unless this is set before the library is loaded. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
