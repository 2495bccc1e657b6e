# SPDX-License-Identifier: Apache-2.0
"""Detection models: ViLD on Detectron2, DETR and UP-DETR, proposals of PicoDet and NanoDet, and F-VLM heads on a frozen tower."""
