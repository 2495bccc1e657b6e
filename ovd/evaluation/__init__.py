# SPDX-License-Identifier: Apache-2.0
"""What a detector is worth: COCO metrics by base and novel, class-agnostic recall, calibration, reports."""
