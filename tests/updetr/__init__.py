# SPDX-License-Identifier: Apache-2.0
"""Detection transformers and their pretraining."""
