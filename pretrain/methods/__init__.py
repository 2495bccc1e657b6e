# SPDX-License-Identifier: Apache-2.0
"""Pretraining methods, one file each."""
