# SPDX-License-Identifier: Apache-2.0
"""A region head on the frozen image tower of an image-text encoder (F-VLM, arXiv:2209.15639), for photographs."""
