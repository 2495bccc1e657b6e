# SPDX-License-Identifier: Apache-2.0
"""Representation learning: self-supervised methods, CLIP, and the engine both packages train with."""
