# SPDX-License-Identifier: Apache-2.0
"""Detection data sets: category splits, COCO files, catalog entries and the training mapper."""
