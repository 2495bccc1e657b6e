# SPDX-License-Identifier: Apache-2.0
"""Networks without torch: ONNX files, the numbers around them in NumPy, and the choice between the two runtimes."""
