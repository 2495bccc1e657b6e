# SPDX-License-Identifier: Apache-2.0
"""Label formats of other tools: readers, which check them and convert to COCO's form, and writers."""
