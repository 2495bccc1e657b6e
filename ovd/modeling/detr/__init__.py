# SPDX-License-Identifier: Apache-2.0
"""DETR, its conditional form and UP-DETR's pretraining of it."""
