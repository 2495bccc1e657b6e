# SPDX-License-Identifier: Apache-2.0
"""Other people's label formats: read into COCO's form and checked, and written."""
