# SPDX-License-Identifier: Apache-2.0
"""ViLD: a Mask R-CNN on Detectron2 whose regions live in an image-text encoder's space."""
