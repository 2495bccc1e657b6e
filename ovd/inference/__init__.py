# SPDX-License-Identifier: Apache-2.0
"""From region embeddings to detections: scores, calibration, the encoder's view of crops."""
