# SPDX-License-Identifier: Apache-2.0
"""Joint encoders, CLIP, text distillation."""
