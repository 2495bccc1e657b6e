# SPDX-License-Identifier: Apache-2.0
"""Evaluation: COCO metrics by base and novel, class-agnostic recall, calibration, reports."""
