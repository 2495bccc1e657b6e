# SPDX-License-Identifier: Apache-2.0
"""Detection models: ViLD on Detectron2, DETR and UP-DETR, dense proposals, and F-VLM heads on a frozen tower."""
