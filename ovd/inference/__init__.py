# SPDX-License-Identifier: Apache-2.0
"""From region embeddings to detections: scoring, calibration, crops, NMS."""
