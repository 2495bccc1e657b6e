# SPDX-License-Identifier: Apache-2.0
"""Detection models: pure-torch parts (classifier, distill, ensemble, scoring) and their Detectron2 assembly (rcnn,
build)."""
